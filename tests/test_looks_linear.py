"""Looks-linear weights: mirrored orthogonal blocks, and networks that begin linear."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from startsparse import models
from startsparse.masks import sparse_layers
from startsparse.models.looks_linear import looks_linear

kernels = st.sampled_from([(), (1, 1), (3, 3), (2, 3)])
ends = st.tuples(st.booleans(), st.booleans())


def source(seed=1):
    return torch.Generator().manual_seed(seed)


def fill(model, seed=1):
    """Looks-linear weights and zero biases."""
    layers = list(sparse_layers(model).values())
    draw = source(seed)
    with torch.no_grad():
        for layer in layers:
            first, last = layer is layers[0], layer is layers[-1]
            layer.weight.copy_(looks_linear(layer.weight.shape, draw, first=first, last=last))
            if layer.bias is not None:
                layer.bias.zero_()
    return model


@torch.no_grad()
def assert_linear(model, shape):
    x, y = (torch.randn(5, *shape, dtype=torch.float64, generator=source(i)) for i in range(2))
    a, b = 1.7, -0.6
    apart = a * model(x) + b * model(y)
    assert apart.abs().max() > 1e-3
    torch.testing.assert_close(model(a * x + b * y), apart, rtol=1e-12, atol=1e-12)


def test_an_mlp_is_linear():
    sizes = [7, 12, 20, 16, 6, 3]
    layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes)]
    layers[-1] = layers[-1][0]
    model = nn.Sequential(*layers).double()
    assert_linear(fill(model), (7,))


def test_a_convolutional_network_is_linear():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(12, 6, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    )
    assert_linear(fill(model.double().eval()), (3, 16, 18))


def test_max_pooling_is_not_linear():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)
    )
    with pytest.raises(AssertionError, match="not close"):
        assert_linear(fill(model.double()), (3, 10, 10))


def test_the_mlp_is_linear_in_evaluation():
    model = models.build("mlp", classes=3, channels=11, size=1, width=24)
    models.init_weights(model, "kaiming_normal", 1)
    assert_linear(fill(model).double().eval(), (11,))


def test_size_is_kept_through_depth():
    width, depth = 32, 20
    layers = [nn.Linear(width, 2 * width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(2 * width, 2 * width), nn.ReLU()]
    model = fill(nn.Sequential(*layers, nn.Linear(2 * width, width)).double())
    x = torch.randn(9, width, dtype=torch.float64, generator=source())
    torch.testing.assert_close(model(x).norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)


@given(st.integers(1, 9), st.integers(1, 9), kernels, ends)
def test_blocks_are_orthogonal_and_mirrored(outputs, inputs, kernel, ends):
    first, last = ends
    rows, columns = outputs, inputs
    outputs, inputs = outputs if last else 2 * outputs, inputs if first else 2 * inputs
    weight = looks_linear((outputs, inputs, *kernel), source(), first=first, last=last)
    assert weight.shape == (outputs, inputs, *kernel)
    assert weight.dtype == torch.float32

    block = weight[:rows, :columns]
    flat = block.flatten(1).double()
    gram = flat @ flat.T if len(flat) <= flat.shape[1] else flat.T @ flat
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-5)
    if not first:
        assert torch.equal(weight[:rows, columns:], -block)
    if not last:
        assert torch.equal(weight[rows:, :columns], -block)
    if not first and not last:
        assert torch.equal(weight[rows:, columns:], block)


def test_a_draw_repeats_whatever_the_number_of_threads():
    def draw(seed):
        return looks_linear((64, 64, 3, 3), source(seed), first=False, last=False)

    threads = torch.get_num_threads()
    one = draw(1)
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw(1), one)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(draw(2), one)


def test_odd_sizes():
    with pytest.raises(ValueError, match="^7 outputs cannot be halved"):
        looks_linear((7, 4), source(), first=True, last=False)
    with pytest.raises(ValueError, match="^5 inputs cannot be halved"):
        looks_linear((4, 5, 3, 3), source(), first=False, last=False)
    for shape, first, last in (((7, 4), False, True), ((4, 5), True, False), ((7, 5), True, True)):
        assert looks_linear(shape, source(), first=first, last=last).shape == shape
