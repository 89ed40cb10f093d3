"""Sparse products, BatchNorm with addition and ReLU, and pooling, against PyTorch."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from engine_runs import normal, product_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from startsparse.engine import whole, winograd
from startsparse.engine.entries import Window
from startsparse.engine.layers import Affine, MaxPool, MeanPixels
from startsparse.engine.maps import Space, lanes, to_images, to_map

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
DTYPES = st.sampled_from([torch.float32, torch.float64])


def close(found, expected, tolerance):
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    assert found.shape == expected.shape
    assert ((found - expected).abs() / scale <= tolerance).all()


def check_product(mask, window, height, width, images, dtype):
    product = product_of(mask, window, height, width)
    x = normal(1, images, mask.shape[1], height, width, dtype=dtype).requires_grad_()
    weight = (normal(2, *mask.shape, dtype=dtype) * mask).requires_grad_()
    y = F.conv2d(x, weight, None, window.stride, window.padding)
    d_y = normal(3, *y.shape, dtype=dtype)
    y.backward(d_y)

    product.values = nn.Parameter(weight.detach().reshape(-1)[product.flat])
    found, saved = product.forward(to_map(x.detach(), product.input), images)
    close(to_images(found, product.output, images), y, TOLERANCE[dtype])
    (d_x,), (d_values,) = product.backward(saved, to_map(d_y, product.output), [None])
    tolerance = TOLERANCE[dtype] * max(1, y.numel() / 100)
    close(to_images(d_x, product.input, images), x.grad, tolerance)
    close(d_values, weight.grad.reshape(-1)[product.flat], tolerance)

    so_far = normal(4, *x.shape, dtype=dtype)
    d_x = product.backward(saved, to_map(d_y, product.output), [to_map(so_far, product.input)])[0][
        0
    ]
    close(to_images(d_x, product.input, images), x.grad + so_far, tolerance)
    product.values.requires_grad_(False)
    assert product.backward(saved, to_map(d_y, product.output), None) == ([None], [None])


@given(
    dtype=DTYPES,
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    images=st.integers(1, 35),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]),
    every=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_products(dtype, channels, size, kernel, stride, padding, images, density, every, seed):
    kernel = [min(k, n + 2 * p) for k, n, p in zip(kernel, size, padding)]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*channels, *kernel, generator=generator) < density
    with patch.object(
        whole, "break_even", lambda _: 1e-9 if every else 2
    ):  # all weights are computed
        check_product(mask, Window(tuple(kernel), stride, padding), *size, images, dtype)


@given(
    dtype=DTYPES,
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    images=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_products_by_winograd(dtype, channels, size, padding, images, density, seed):
    size = [max(n, 3 - 2 * p) for n, p in zip(size, padding)]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*channels, 3, 3, generator=generator) < density
    with patch.object(winograd, "break_even", lambda *_: 0):
        check_product(mask, Window((3, 3), padding=padding), *size, images, dtype)


@pytest.mark.parametrize("channels", [(32, 150), (150, 33)])
def test_winograd_in_several_blocks_of_channels_and_positions(channels):
    window = Window((3, 3), padding=(1, 1))
    for density, pays in (0.3, False), (0.45, True):
        mask = torch.rand(*channels, 3, 3) < density
        product = product_of(mask, window, 12, 11)
        assert isinstance(product.whole, winograd.Winograd) == pays
    for dtype in (torch.float32, torch.float64):
        check_product(mask, window, 12, 11, 37, dtype)


def test_winograd_is_for_3x3_kernels_and_large_maps():
    large, small, narrow = Space(64, 8, 8), Space(64, 7, 7), Space(16, 8, 8)
    same = Window((3, 3), padding=(1, 1))
    assert winograd.break_even(same, large, large) == pytest.approx(0.29, abs=0.01)
    for sizes in [
        (Window((3, 3), (2, 2), (1, 1)), large, large),
        (Window((5, 5), padding=(2, 2)), large, large),
        (Window((3, 3), padding=(3, 3)), large, large),
        (same, small, small),
        (same, narrow, large),
        (same, large, narrow),
    ]:
        assert winograd.break_even(*sizes) > 1


@pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
@pytest.mark.parametrize(("channels", "pixels"), [((40, 200), 6), ((30, 300), 1), ((7, 64), 11)])
def test_products_in_several_blocks_of_channels(channels, pixels, density):
    kernel = min(3, pixels)
    mask = torch.rand(*channels, kernel, kernel) < density
    mask[3] = mask[:, 5] = False  # an output and an input without an edge
    window = Window((kernel, kernel), padding=(kernel // 2,) * 2)
    product = product_of(mask, window, pixels, pixels)
    # All weights are computed, four rows at once.
    assert bool(product.whole) == (density == 0.9 and pixels == 11)
    if density == 0.5:
        assert len(product.entries.first) > len(mask) + 1
    check_product(mask, window, pixels, pixels, 37, torch.float64)


@pytest.mark.parametrize(("density", "form"), [(0.2, type(None)), (0.6, winograd.Winograd)])
def test_results_do_not_depend_on_the_number_of_threads(density, form):
    mask = torch.rand(34, 40, 3, 3) < density
    product = product_of(mask, Window((3, 3), padding=(1, 1)), 9, 9)
    assert isinstance(product.whole, form)
    product.values = nn.Parameter(normal(1, len(product.flat), dtype=torch.float32))
    affine = Affine(nn.BatchNorm2d(34), None, True, product.output)
    x = to_map(normal(2, 20, 40, 9, 9, dtype=torch.float32), product.input)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y, of_product = product.forward(x, 20)
        z, of_affine = affine.forward(y, 20)
        z = product.output.inside(z).clone()
        d_z = to_map(normal(3, 20, 34, 9, 9, dtype=torch.float32), product.output)
        (d_y,), learned = affine.backward(of_affine, d_z, [None])
        (d_x,), (d_values,) = product.backward(of_product, d_y, [None])
        torch.set_num_threads(before)
        return [z, product.input.inside(d_x), d_values, *learned[:2]]

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
    first=st.booleans(),
)
@settings(max_examples=160, deadline=None)
def test_affine(dtype, channels, size, borders, images, norm, relu, residual, first):
    mine = theirs = bias = None
    first = first and norm in ("batch", "plain", "running")
    if norm in ("batch", "plain", "running"):
        mine, theirs = (nn.BatchNorm2d(channels, affine=norm != "plain") for _ in range(2))
        for module in (mine, theirs):
            module.to(dtype)
            module.running_mean.copy_(normal(4, channels))
            if norm != "plain":
                module.weight.data.copy_(normal(5, channels))
                module.bias.data.copy_(normal(6, channels))
            module.train(norm != "running")
    if norm == "bias" or first:
        bias = nn.Parameter(normal(7, channels, dtype=dtype))
    spaces = [Space(channels, *size, border) for border in borders]
    layer = Affine(mine, bias, relu, spaces[0], first)
    layer.residual, layer.output = spaces[1:]

    y, r = (normal(s, images, channels, *size, dtype=dtype).requires_grad_() for s in (1, 2))
    z = y if bias is None else y + bias[:, None, None]
    z = F.relu(z) if first else z
    z = z if theirs is None else theirs(z)
    z = z + r if residual else z
    z = F.relu(z) if relu else z
    d_z = normal(3, *z.shape, dtype=dtype)
    leaves = [y, *([r] if residual else [])]
    leaves += [] if theirs is None else list(theirs.parameters())
    leaves += [] if bias is None else [bias]
    expected = torch.autograd.grad(z, leaves, d_z)

    maps = [to_map(t.detach(), space) for t, space in ((y, spaces[0]), (r, spaces[1]))]
    found, saved = layer.forward(*maps[: 1 + residual], images)
    outside = found.clone()
    layer.output.inside(outside).zero_()
    assert not outside.any()  # the border
    lost = layer.output.inside(found)[:, -1, ..., (images - 1) % lanes() + 1 :]
    assert not lost.any()  # images that are not there
    tolerance = TOLERANCE[dtype] * 100
    close(to_images(found, layer.output, images), z, tolerance)
    so_far = normal(8, *r.shape, dtype=dtype)
    into = [None, *([to_map(so_far, spaces[1])] if residual else [])]
    gradients, learned = layer.backward(saved, to_map(d_z, layer.output), into)
    outside = gradients[0].clone()
    layer.input.inside(outside).zero_()
    assert not outside.any()
    maps = [to_images(g, space, images) for g, space in zip(gradients, spaces)]
    if residual:
        maps[1] = maps[1] - so_far
    learned = [g for p, g in zip(layer.parameters, learned) if p is not None]
    for a, b in zip([*maps, *learned], expected, strict=True):
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
    input = Space(3, size, size, borders[0])
    window = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    output = window.output(input, 3)
    output.border = borders[1]
    # Few values, so that many are equal.
    x = normal(1, images, 3, size, size, dtype=dtype).round().requires_grad_()
    y = F.max_pool2d(x, kernel, stride, padding)
    d_y = normal(2, *y.shape, dtype=dtype)
    (expected,) = torch.autograd.grad(y, x, d_y)
    pool = MaxPool(window, input, output)
    found, saved = pool.forward(to_map(x.detach(), input), images)
    assert torch.equal(to_images(found, output, images), y)
    (d_x,), _ = pool.backward(saved, to_map(d_y, output), [None])
    close(to_images(d_x, input, images), expected, TOLERANCE[dtype])


def test_mean_of_pixels():
    space = Space(3, 4, 5, border=1)
    x = normal(1, 18, 3, 4, 5)
    layer = MeanPixels(space)
    found, saved = layer.forward(to_map(x, space), 18)
    close(to_images(found, Space(3, 1, 1), 18).flatten(1), x.mean((2, 3)), 1e-14)
    d, so_far = normal(2, 18, 3), normal(3, 18, 3, 4, 5)
    d_y = to_map(d[:, :, None, None], Space(3, 1, 1))
    (d_x,), _ = layer.backward(saved, d_y, [to_map(so_far, space)])
    expected = (d / 20)[:, :, None, None].expand_as(x) + so_far
    close(to_images(d_x, space, 18), expected, 1e-14)
