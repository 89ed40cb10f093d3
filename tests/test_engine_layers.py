"""Sparse products, BatchNorm with addition and ReLU, and pooling, against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from startsparse.engine.entries import Window
from startsparse.engine.layers import Affine, MaxPool, Product, mean_pixels
from startsparse.engine.maps import LANES, Space, to_images, to_map

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
DTYPES = st.sampled_from([torch.float32, torch.float64])


def close(found, expected, tolerance):
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    assert found.shape == expected.shape
    assert ((found - expected).abs() / scale <= tolerance).all()


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product_of(mask, window, height, width):
    """A product for maps of that size, with borders as wide as they must be."""
    given, made = Space(mask.shape[1], height, width), None
    made = window.output(given, len(mask))
    given.border, made.border = window.border_in(given, made), window.border_out(given, made)
    product = Product(window, given, made)
    product.set_mask(mask)
    return product


def check_product(mask, window, height, width, images, dtype):
    product = product_of(mask, window, height, width)
    x = normal(1, images, mask.shape[1], height, width, dtype=dtype).requires_grad_()
    weight = (normal(2, *mask.shape, dtype=dtype) * mask).requires_grad_()
    y = F.conv2d(x, weight, None, window.stride, window.padding)
    d_y = normal(3, *y.shape, dtype=dtype)
    y.backward(d_y)

    product.values = nn.Parameter(weight.detach().reshape(-1)[product.flat])
    mine = x.detach().clone().requires_grad_()
    found = product(to_map(mine, product.given))
    close(to_images(found, product.made, images), y, TOLERANCE[dtype])
    found.backward(to_map(d_y, product.made))
    tolerance = TOLERANCE[dtype] * max(1, y.numel() / 100)
    close(mine.grad, x.grad, tolerance)
    close(product.values.grad, weight.grad.reshape(-1)[product.flat], tolerance)


@given(
    dtype=DTYPES,
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    images=st.integers(1, 35),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_products(dtype, channels, size, kernel, stride, padding, images, density, seed):
    kernel = [min(k, n + 2 * p) for k, n, p in zip(kernel, size, padding)]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*channels, *kernel, generator=generator) < density
    check_product(mask, Window(tuple(kernel), stride, padding), *size, images, dtype)


@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize(("channels", "pixels"), [((40, 200), 6), ((30, 300), 1), ((7, 64), 11)])
def test_products_in_several_blocks_of_channels(channels, pixels, density):
    kernel = min(3, pixels)
    mask = torch.rand(*channels, kernel, kernel) < density
    mask[3] = mask[:, 5] = False  # an output and an input without an edge
    window = Window((kernel, kernel), padding=(kernel // 2,) * 2)
    product = product_of(mask, window, pixels, pixels)
    assert (density == 0.5) <= (len(product.forward.first) > len(mask) + 1)
    check_product(mask, window, pixels, pixels, 37, torch.float64)


def test_results_do_not_depend_on_the_number_of_threads():
    mask = torch.rand(24, 30, 3, 3) < 0.2
    product = product_of(mask, Window((3, 3), padding=(1, 1)), 7, 7)
    product.values = nn.Parameter(normal(1, len(product.forward), dtype=torch.float32))
    affine = Affine(nn.BatchNorm2d(24), None, True, product.made)
    x = to_map(normal(2, 20, 30, 7, 7, dtype=torch.float32), product.given).requires_grad_()

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        z = affine(product(x), None, 20)
        d_z = to_map(normal(3, 20, 24, 7, 7, dtype=torch.float32), product.made)
        gradients = torch.autograd.grad(z, [x, product.values], d_z)
        torch.set_num_threads(before)
        return [product.made.inside(z), product.given.inside(gradients[0]), gradients[1]]

    for one, three in zip(run(1), run(3)):
        assert torch.equal(one, three)


@given(
    dtype=DTYPES,
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    borders=st.tuples(*[st.integers(0, 2)] * 3),
    images=st.integers(2, 35),
    norm=st.sampled_from(["batch", "plain", "running", "bias", "none"]),
    relu=st.booleans(),
    residual=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_affine(dtype, channels, size, borders, images, norm, relu, residual):
    mine = theirs = bias = None
    if norm in ("batch", "plain", "running"):
        mine, theirs = (nn.BatchNorm2d(channels, affine=norm != "plain") for _ in range(2))
        for module in (mine, theirs):
            module.to(dtype)
            module.running_mean.copy_(normal(4, channels))
            if norm != "plain":
                module.weight.data.copy_(normal(5, channels))
                module.bias.data.copy_(normal(6, channels))
            module.train(norm != "running")
    elif norm == "bias":
        bias = nn.Parameter(normal(7, channels, dtype=dtype))
    spaces = [Space(channels, *size, border) for border in borders]
    layer = Affine(mine, bias, relu, spaces[0])
    layer.residual, layer.made = spaces[1:]

    y, r = (normal(s, images, channels, *size, dtype=dtype).requires_grad_() for s in (1, 2))
    z = y if theirs is None else theirs(y)
    z = z if bias is None else z + bias[:, None, None]
    z = z + r if residual else z
    z = F.relu(z) if relu else z
    d_z = normal(3, *z.shape, dtype=dtype)
    leaves = [y, *([r] if residual else []), *([bias] if bias is not None else [])]
    leaves += [] if theirs is None else list(theirs.parameters())
    expected = torch.autograd.grad(z, leaves, d_z)

    maps = [to_map(t, space) for t, space in ((y, spaces[0]), (r, spaces[1]))]
    found = layer(maps[0], maps[1] if residual else None, images)
    outside = found.clone()
    layer.made.inside(outside).zero_()
    assert not outside.any()  # the border
    lost = layer.made.inside(found)[-1, ..., (images - 1) % LANES + 1 :]
    assert not lost.any()  # images that are not there
    tolerance = TOLERANCE[dtype] * 100
    close(to_images(found, layer.made, images), z, tolerance)
    mine_leaves = [y, *([r] if residual else []), *([bias] if bias is not None else [])]
    mine_leaves += [] if mine is None else list(mine.parameters())
    for a, b in zip(torch.autograd.grad(found, mine_leaves, to_map(d_z, layer.made)), expected):
        close(a, b, tolerance)
    if mine is not None:
        for name, buffer in theirs.named_buffers():
            close(mine.get_buffer(name).double(), buffer.double(), tolerance)


@given(
    dtype=DTYPES,
    size=st.integers(1, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    borders=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    images=st.integers(1, 20),
)
@settings(max_examples=80, deadline=None)
def test_max_pool(dtype, size, kernel, stride, padding, borders, images):
    padding, kernel = min(padding, kernel // 2), min(kernel, size)
    padding = min(padding, kernel // 2)
    given = Space(3, size, size, borders[0])
    window = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    made = window.output(given, 3)
    made.border = borders[1]
    # Few values, so that many are equal.
    x = normal(1, images, 3, size, size, dtype=dtype).round().requires_grad_()
    y = F.max_pool2d(x, kernel, stride, padding)
    d_y = normal(2, *y.shape, dtype=dtype)
    (expected,) = torch.autograd.grad(y, x, d_y)
    found = MaxPool(window, given, made)(to_map(x, given))
    assert torch.equal(to_images(found, made, images), y)
    close(torch.autograd.grad(found, x, to_map(d_y, made))[0], expected, TOLERANCE[dtype])


def test_mean_of_pixels():
    space = Space(3, 4, 5, border=1)
    x = normal(1, 18, 3, 4, 5).requires_grad_()
    found = to_images(mean_pixels(to_map(x, space), space), Space(3, 1, 1), 18).flatten(1)
    close(found, x.mean((2, 3)), 1e-14)
    d = normal(2, 18, 3)
    expected = (d / 20)[:, :, None, None].expand_as(x)
    close(torch.autograd.grad(found, x, d)[0], expected, 1e-14)
