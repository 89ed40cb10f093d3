"""Shared by the tests of the engine: networks, a step in either form, a clock that can be set."""

import torch
import torch.nn.functional as F

from startsparse import models
from startsparse.engine import choice
from startsparse.engine.layers import Product
from startsparse.engine.maps import Space
from startsparse.engine.network import SparseForm
from startsparse.masks import (
    attach_masks,
    draw_masks,
    mask_gradients,
    masked_weights,
    sparse_layers,
)

WIDTHS = {"resnet20": 4, "resnet18": 6, "resnet50": 4, "vgg11": 4, "vgg16": 4, "mlp": 24}
SHAPE = 3, 32, 32


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product_of(mask, window, height, width):
    """A product for maps of that size, with borders as wide as they must be."""
    input, output = Space(mask.shape[1], height, width), None
    output = window.output(input, len(mask))
    input.border, output.border = window.border_in(input, output), window.border_out(input, output)
    product = Product(window, input, output)
    product.set_mask(mask)
    return product


def network(arch, density=0.3, dtype=torch.float64, width=None):
    model = models.build(arch, classes=10, width=width or WIDTHS[arch])
    models.init_weights(model, "kaiming_normal", 1)
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), 1, "bernoulli"))
    return model.to(dtype, memory_format=torch.channels_last)


def batch(images=19, dtype=torch.float64, shape=SHAPE):
    draw = torch.Generator().manual_seed(2)
    return torch.randn(images, *shape, generator=draw, dtype=dtype), torch.arange(images) % 10


def sparse_form(model, without=(), shape=SHAPE):
    form = SparseForm(model, shape)
    form.compute_sparsely(set(form.layers) - set(without))
    return form


def optimizer_of(model, kind):
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-3, fused=True)
    return torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True, fused=True
    )


def step(forward, model, optimizer, images, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(forward(images), labels)
    loss.backward()
    pairs = [(w.grad, m) for _, w, m in masked_weights(model) if w.grad is not None]
    mask_gradients([g for g, _ in pairs], [m for _, m in pairs])
    optimizer.step()
    return loss.item()


def equal_states(one, other, tolerance):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        assert a.stride() == b.stride(), name
        assert (a.double() - b.double()).abs().max() <= tolerance, name


def clock(monkeypatch, dense, sparse):
    """Trials run, but report ``dense`` seconds, or ``sparse`` in the sparse form."""

    def runs(name, seconds):
        original = getattr(choice, name)
        monkeypatch.setattr(choice, name, lambda *args: (original(*args), seconds)[1])

    dense, sparse = choice.Seconds(dense), choice.Seconds(sparse)
    monkeypatch.setattr(choice, "cpu_seconds", lambda run, *_: run())
    runs("_masked", dense)
    runs("_between_maps", (dense, sparse))
    runs("_steps", (dense, sparse))
