"""Which layers compute sparsely, found by trying: ``--sparse-compute auto``."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from startsparse.engine import winograd
from startsparse.engine.layers import Product
from startsparse.engine.maps import LANES, to_map
from startsparse.engine.network import SparseForm
from startsparse.engine.program import DenseProduct, Either
from startsparse.masks import kept, mask_gradients, masked_weights
from startsparse.seeding import generator

_TRIES = 3  # at most; the fastest counts, since other work on the machine only adds
_ENOUGH = 0.2  # seconds that one thing is tried
_PIXELS = 1024  # positions of a map that a layer is tried on, if one block of images has as many
_GAIN = 0.95  # a step of the sparse form must take at most this share of a dense one
_HOPELESS = 0.8  # share of multiplications inside the masks from which nothing is tried


@dataclass
class Choice:
    """What was found.

    Attributes:
        layers: name -> how many times faster the layer is in the sparse form, tried layers only.
        computes: the layers that should compute sparsely; empty if the network is faster dense.
        share: seconds of a step of the sparse form over those of the masked model, where the
            network was tried.
    """

    layers: dict[str, float]
    computes: frozenset[str]
    share: float | None


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
    times = {}
    tried = form.layers.keys() - gain if gain or _work(form) <= _HOPELESS else ()
    for name, product in form.layers.items():
        if name not in tried:
            continue
        form.compute_sparsely([name])
        with form.within():
            most = max(1, _PIXELS // (product.made.height * product.made.width))
            blocks = min(-(-len(images) // LANES), most)
            needs_input = product.given is not form.program.spaces[form.program.start]
            if name in form.program.effective:
                form.program.effective[name].compute()
            times[name] = _ratio(form.program.products[name], blocks, needs_input)
    chosen = gain.union(name for name, ratio in times.items() if ratio > 1)
    form.compute_sparsely(chosen)
    if gain:
        return Choice(times, chosen, None)
    share = _share(form, images, classes) if chosen else float("inf")
    if share > _GAIN:
        form.compute_sparsely([])
    return Choice(times, form.computes, share)


def _work(form: SparseForm) -> float:
    """Share of the layers' multiplications that are inside masks, not by effective zeros.

    No layer counts more than it would where it takes the same time with all its weights.
    """
    inside = every = 0
    for name, product in form.layers.items():
        mask = kept(form.model.get_submodule(name))
        pixels = product.made.height * product.made.width
        most = min(1, winograd.worth(product.window, product.given, product.made))
        inside += pixels * min(int(mask.count_nonzero()), most * mask.numel())
        every += pixels * mask.numel()
    return inside / every


def _ratio(both: Either, blocks: int, needs_input: bool) -> float:
    """Seconds of the dense product over those of the sparse one, whose weights are entered."""
    product, given, made = both.sparse, both.sparse.given, both.sparse.made
    draw = generator(0, "timing")
    x, d_y = (
        to_map(torch.randn(LANES * blocks, s.channels, s.height, s.width, generator=draw), s)
        for s in (given, made)
    )
    stand_in = nn.Module()
    shape = made.channels, given.channels, *product.window.kernel
    stand_in.weight = nn.Parameter(torch.zeros(shape))
    dense = DenseProduct(stand_in, product.window, given, made)

    def run(layer: Product | DenseProduct) -> float:
        def step() -> None:
            _, kept = layer.forward(x, LANES * blocks)
            layer.backward(kept, d_y, [None] if needs_input else None)

        return _fastest(step)

    return run(dense) / run(product)


def _share(form: SparseForm, images: Tensor, classes: int) -> float:
    model = form.model
    training, labels = model.training, torch.arange(len(images)) % classes
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()

    def seconds(forward: Callable[[Tensor], Tensor], learning: list[nn.Parameter]) -> float:
        """Of a training step; the optimizer's, on copies, is a good part of it."""
        copies = [nn.Parameter(torch.zeros_like(p)) for p in learning]
        optimizer = torch.optim.SGD(copies, 0.1, momentum=0.9, fused=True)
        masks = {id(weight): mask for _, weight, mask in masked_weights(model)}
        masked = [(i, masks[id(p)]) for i, p in enumerate(learning) if id(p) in masks]

        def step() -> None:
            gradients = torch.autograd.grad(F.cross_entropy(forward(images), labels), learning)
            mask_gradients([gradients[i] for i, _ in masked], [mask for _, mask in masked])
            for copy, gradient in zip(copies, gradients):
                copy.grad = gradient
            optimizer.step()

        return _fastest(step)

    def learning(*more: nn.Parameter) -> list[nn.Parameter]:
        return [p for p in (*more, *model.parameters()) if p.requires_grad and p.numel()]

    masked = seconds(model, learning())
    with form.within():
        own = form.layers.keys() & form.computes - form.program.effective.keys()
        sparse = seconds(form, learning(*(form.layers[name].values for name in own)))
    model.train(training)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return sparse / masked


def _fastest(run: Callable[[], object]) -> float:
    run()
    seconds = []
    while len(seconds) < _TRIES and sum(seconds) < _ENOUGH:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
