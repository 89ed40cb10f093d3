"""Which layers compute sparsely, found by trying: ``--sparse-compute auto``.

Times are CPU seconds of all threads, which other work on the machine hardly changes. Where threads
spin while they wait that counts too; `threads` lets them do so for microseconds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from startsparse.engine import winograd
from startsparse.engine.gradients import gradients
from startsparse.engine.layers import Product
from startsparse.engine.maps import Space, lanes, to_map
from startsparse.engine.network import SparseForm
from startsparse.engine.program import DenseProduct, Either
from startsparse.masks import active, mask_gradients, masked_weights, sparse_layers
from startsparse.optimizers import make_optimizer
from startsparse.seeding import generator

_TRIES = 5  # at most; the fastest counts, since other work on the machine only adds
_LONGEST = 0.2  # seconds after which one thing is tried no more, if it was twice
_SHORTEST = 0.002  # seconds of a try: what is shorter is repeated, for the clock's sake
_AGREE = 1.1  # the second fastest try over the fastest, at most
_PIXELS = 1024  # positions of a map that a layer is tried on, if one block of images has as many
_GAIN = 0.95  # a step of the sparse form must take at most this part of a masked one
_HOPELESS = 0.8  # part of the multiplications inside the masks from which nothing is tried


@dataclass
class Choice:
    """What was found.

    Attributes:
        layers: name -> how many times faster the layer is in the sparse form than in the masked
            network, None where repeats disagreed; tried layers only.
        computes: the layers that should compute sparsely; empty if the network is faster dense.
        ratio: seconds of a step of the sparse form over those of the masked network, where that
            was tried and repeats agreed.
        faster: the layers that are faster sparse than dense between others in the sparse form.
    """

    layers: dict[str, float | None]
    computes: frozenset[str]
    ratio: float | None
    faster: frozenset[str] = frozenset()


@dataclass
class Seconds:
    """CPU time of all threads, the fastest of a few tries, and whether repeats agreed."""

    fastest: float
    agree: bool = True

    def over(self, other: "Seconds") -> float | None:
        """The ratio, if it can be trusted; a coarse clock may have seen no time at all."""
        trusted = self.agree and other.agree and other.fastest > 0
        return self.fastest / other.fastest if trusted else None


def choose(
    form: SparseForm, images: Tensor, classes: int, gain: frozenset[str] = frozenset()
) -> Choice:
    """Time each layer, then the whole network, forward and backward, in both forms.

    Leaves ``form`` computing what was chosen, and model and running statistics as they were.

    Args:
        form: not entered.
        images: [B, C, H, W], a batch of the size to be trained on; its values do not matter.
        gain: layers that are known to gain, for they did at a higher density. If there are any,
            the network gains too, and only the other layers are tried.
    """
    faster, times = set(gain), {}
    tried = form.layers.keys() - gain if gain or _work(form) <= _HOPELESS else ()
    for name, product in form.layers.items():
        if name not in tried:
            continue
        form.compute_sparsely([name])
        both = form.program.products[name]
        most = max(1, _PIXELS // (product.output.height * product.output.width))
        blocks = min(-(-len(images) // lanes()), most)
        needs_input = product.input is not form.program.spaces[form.program.start]
        masked = _masked(both, len(images), needs_input)
        with form.within():
            if name in form.program.effective:
                form.program.effective[name].compute()
            dense, sparse = _between_maps(both, blocks, needs_input)
        times[name] = masked.over(sparse)
        if sparse.fastest < dense.fastest:
            faster.add(name)
    chosen = frozenset(faster)
    form.compute_sparsely(chosen)
    if gain:
        return Choice(times, chosen, None, chosen)
    if not chosen:
        return Choice(times, chosen, None)
    masked, sparse = _steps(form, images, classes)
    if sparse.fastest > _GAIN * masked.fastest:
        form.compute_sparsely([])
    return Choice(times, form.computes, sparse.over(masked), chosen)


def _work(form: SparseForm) -> float:
    """Part of the layers' multiplications that are inside masks, not by effective zeros.

    No layer counts more than it would where it takes the same time with all its weights.
    """
    layers = sparse_layers(form.model)
    inside, every = 0.0, 0
    for name, product in form.layers.items():
        mask = active(layers[name])
        pixels = product.output.height * product.output.width
        most = min(1, winograd.break_even(product.window, product.input, product.output))
        inside += pixels * min(int(mask.count_nonzero()), most * mask.numel())
        every += pixels * mask.numel()
    return inside / every


def _masked(both: Either, images: int, needs_input: bool) -> Seconds:
    """Of an image, as the masked network computes the layer: with every weight, on the batch.

    On few images PyTorch takes much longer for each than in training, the kernels do not.
    """
    dense, window, stride = both.dense, both.dense.window, both.dense.window.stride
    tensors = _noise(images, dense.input), _noise(images, dense.output), _no_weight(dense)
    x, d_y, weight = (tensor.to(memory_format=torch.channels_last) for tensor in tensors)
    if window.kernel == (1, 1) and window.padding == (0, 0):  # as models.resnet.Projection
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    linear = isinstance(dense.layer, nn.Linear)
    if linear:
        x, d_y, weight = x.flatten(1), d_y.flatten(1), weight.flatten(1)
    x, weight = x.detach().requires_grad_(needs_input), weight.requires_grad_()
    wanted = [weight, x] if needs_input else [weight]

    def step() -> None:
        y = F.linear(x, weight) if linear else F.conv2d(x, weight, None, stride, window.padding)
        gradients(y, wanted, d_y)

    return cpu_seconds(step, images)


def _noise(images: int, space: Space) -> Tensor:
    shape = images, space.channels, space.height, space.width
    return torch.randn(shape, generator=generator(0, "timing"))


def _no_weight(dense: DenseProduct) -> Tensor:
    return torch.zeros(dense.output.channels, dense.input.channels, *dense.window.kernel)


def _between_maps(both: Either, blocks: int, needs_input: bool) -> tuple[Seconds, Seconds]:
    """Of an image, of the dense product and of the sparse one, whose weights are entered."""
    product, input, output = both.sparse, both.sparse.input, both.sparse.output
    images = lanes() * blocks
    x, d_y = (to_map(_noise(images, space), space) for space in (input, output))
    dense = DenseProduct(both.dense.layer, product.window, input, output)
    dense.effective = nn.Parameter(_no_weight(both.dense))

    def run(layer: Product | DenseProduct) -> Seconds:
        def step() -> None:
            _, saved = layer.forward(x, images)
            layer.backward(saved, d_y, [None] if needs_input else None)

        return cpu_seconds(step, images)

    return run(dense), run(product)


def _steps(form: SparseForm, images: Tensor, classes: int) -> tuple[Seconds, Seconds]:
    """Of a training step of the masked network, and of the sparse form."""
    model = form.model
    training, labels = model.training, torch.arange(len(images)) % classes
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()

    def seconds(forward: Callable[[Tensor], Tensor], learning: list[Tensor]) -> Seconds:
        """Of one; the optimizer's, on copies, is a good part of it."""
        copies = [nn.Parameter(torch.zeros_like(p)) for p in learning]
        optimizer = make_optimizer("sgd", copies, lr=0.1, momentum=0.9, nesterov=False)
        masks = {id(weight): mask for _, weight, mask in masked_weights(model)}
        masked = [(i, masks[id(p)]) for i, p in enumerate(learning) if id(p) in masks]

        def step() -> None:
            found = torch.autograd.grad(F.cross_entropy(forward(images), labels), learning)
            mask_gradients([found[i] for i, _ in masked], [mask for _, mask in masked])
            for copy, gradient in zip(copies, found):
                copy.grad = gradient
            optimizer.step()

        return cpu_seconds(step)

    def learning(*more: Tensor) -> list[Tensor]:
        return [p for p in (*more, *model.parameters()) if p.requires_grad and p.numel()]

    masked = seconds(model, learning())
    with form.within():
        own = form.layers.keys() & form.computes - form.program.effective.keys()
        sparse = seconds(form, learning(*(form.layers[name].values for name in own)))
    model.train(training)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return masked, sparse


def cpu_seconds(run: Callable[[], object], images: int = 1) -> Seconds:
    """Of an image, once ``run`` has run, on so many: until two tries agree, or for long enough."""

    def once(times: int) -> float:
        started = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - started) / times

    run()
    tries = [once(1)]
    times = max(1, round(_SHORTEST / max(tries[0], 1e-6)))
    if times > 1:
        tries = [once(times)]
    while True:
        tries.append(once(times))
        fastest, second, *_ = sorted(tries)
        agree = second <= _AGREE * fastest
        if agree or len(tries) == _TRIES or times * sum(tries) > _LONGEST:
            return Seconds(fastest / images, agree)
