"""To the bit: the same for any number of threads; NaN and infinity where PyTorch has them."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from engine_runs import batch, network, normal, product_of, sparse_form
from torch import nn

from startsparse.engine import whole, winograd
from startsparse.engine.compaction import CompactedProduct
from startsparse.engine.entries import Window, forward_entries
from startsparse.engine.kernels import kernels_for
from startsparse.engine.layers import Affine, MaxPool, Product
from startsparse.engine.maps import Space, to_images, to_map
from startsparse.engine.protocol import Norm, Plane

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
FORMS = {"listed": (2.0, 2.0), "whole": (2.0, 0.0), "winograd": (0.0, 2.0)}


@contextmanager
def computed_as(form):
    """Within it, products take this form, whatever their density and size."""
    tiled, every = FORMS[form]
    with (
        patch.object(winograd, "break_even", lambda *_: tiled),
        patch.object(whole, "break_even", lambda _: every),
    ):
        yield


def by_threads(compute):
    """What ``compute()`` returns with 1, 2, 3 and 4 threads."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            yield compute()
    finally:
        torch.set_num_threads(before)


def same_bits(compute):
    one, *others = by_threads(compute)
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def check_product_bits(form, dtype, rows, columns, pixels, images, density):
    mask = torch.rand(rows, columns, 3, 3, generator=torch.Generator().manual_seed(0)) < density
    with computed_as(form):
        product = product_of(mask, Window((3, 3), padding=(1, 1)), pixels, pixels)
    product.values = nn.Parameter(normal(1, len(product.flat), dtype=dtype))
    x = to_map(normal(2, images, columns, pixels, pixels, dtype=dtype), product.input)
    d_y = to_map(normal(3, images, rows, pixels, pixels, dtype=dtype), product.output)

    def compute():
        y, saved = product.forward(x, images)
        (d_x,), (d_values,) = product.backward(saved, d_y, [None])
        parts = (y, product.output), (d_x, product.input)
        return [*(to_images(data, space, images).clone() for data, space in parts), d_values]

    same_bits(compute)


# conv1 of the default ResNet20 is (16, 3), 32 pixels, with all its weights.
@DTYPES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("channels", "pixels", "images"),
    [((16, 3), 32, 64), ((5, 1), 9, 3), ((13, 7), 10, 35), ((64, 64), 8, 17)],
)
def test_products_are_the_same_for_any_number_of_threads(form, channels, pixels, images, dtype):
    check_product_bits(form, dtype, *channels, pixels, images, 0.9)


@DTYPES
@pytest.mark.parametrize("effective", [False, True])
def test_lists_are_the_same_for_any_number_of_threads(effective, dtype):
    mask = torch.rand(70, 40, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.2
    window, input = Window((3, 3), padding=(1, 1)), Space(40, 5, 5, border=1)
    weight = normal(1, int(mask.sum()), dtype=dtype).relu()
    x = to_map(normal(2, 20, 40, 5, 5, dtype=dtype), input)
    d_y = to_map(normal(3, 20, 70, 5, 5, dtype=dtype), Space(70, 5, 5, border=1))

    def compute():
        sizes = window, input, Space(70, 5, 5, border=1)
        product = CompactedProduct(*sizes, zeros_learn=False) if effective else Product(*sizes)
        product.set_mask(mask)
        product.values = nn.Parameter(weight)
        y, saved = product.forward(x, 20)
        (d_x,), (d_values,) = product.backward(saved, d_y, [None])
        lists = [] if effective else product.lists()
        return [product.output.inside(y).clone(), input.inside(d_x).clone(), d_values, *lists]

    same_bits(compute)


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "mlp"])
def test_networks_inside_masks_are_the_same_for_any_number_of_threads(arch):
    model = network(arch, density=0.3, dtype=torch.float32, width=16)
    form, (images, labels) = sparse_form(model), batch(20, torch.float32)

    def compute():
        with form.within():
            loss = F.cross_entropy(form(images), labels)
            learning = [p for p in model.parameters() if p.numel()]
            learning += [layer.values for layer in form.layers.values()]
            gradients = torch.autograd.grad(loss, learning)
            model.eval()
            with torch.inference_mode():
                single = form(images[:2])
            model.train()
        return [loss, single, *gradients]

    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def from_the_same_statistics():
        for buffer, before in statistics:
            buffer.copy_(before)
        return compute()

    same_bits(from_the_same_statistics)


SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 2.0, -3.0, 4.0])


def special(seed, *shape, dtype, numbers=8):
    draw = torch.Generator().manual_seed(seed)
    return SPECIAL[:numbers].to(dtype)[torch.randint(numbers, shape, generator=draw)]


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("kernel", [(2, 2, 0), (3, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("numbers", [1, 3, 8])
def test_max_pooling_of_nan_and_infinity(kernel, numbers, dtype):
    size, stride, padding = kernel
    input = Space(3, 6, 6)
    window = Window((size, size), (stride, stride), (padding, padding))
    output = window.output(input, 3)
    x = special(1, 20, 3, 6, 6, dtype=dtype, numbers=numbers).requires_grad_()
    y = F.max_pool2d(x, size, stride, padding)
    d_y = normal(2, *y.shape, dtype=dtype).round()
    (d_x,) = torch.autograd.grad(y, x, d_y)
    pool = MaxPool(window, input, output)
    found, saved = pool.forward(to_map(x.detach(), input), 20)
    equal(to_images(found, output, 20), y)
    (found,), _ = pool.backward(saved, to_map(d_y, output), [None])
    equal(to_images(found, input, 20), d_x)


@DTYPES
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_affine_of_nan_and_infinity(first, residual, relu, dtype):
    """BatchNorm by running statistics, scale 2: exact, so all bits are compared."""
    space, norm = Space(4, 3, 3), nn.BatchNorm2d(4, eps=0, dtype=dtype).eval()
    norm.weight.data.fill_(2)
    bias = nn.Parameter(torch.tensor([0.0, 1.0, -1.0, float("inf")], dtype=dtype))
    layer = Affine(norm, bias if first else None, relu, space, first)
    layer.residual = layer.output = space
    y, r = (special(s, 18, 4, 3, 3, dtype=dtype).requires_grad_() for s in (1, 2))
    z = F.relu(y + bias[:, None, None]) if first else y
    z = norm(z) + r if residual else norm(z)
    z = F.relu(z) if relu else z
    d_z = normal(3, *z.shape, dtype=dtype)
    expected = torch.autograd.grad(z, [y, r] if residual else [y], d_z)
    maps = [to_map(t.detach(), space) for t in ((y, r) if residual else (y,))]
    found, saved = layer.forward(*maps, 18)
    equal(to_images(found, space, 18), z)
    assert not found[:, -1, ..., 2:].any()  # images that are not there
    gradients, _ = layer.backward(saved, to_map(d_z, space), [None] * len(maps))
    for gradient, exact in zip(gradients, expected):
        equal(to_images(gradient, space, 18), exact)


@DTYPES
def test_batch_statistics_of_nan_and_infinity(dtype):
    """The channel with the odd pixel becomes NaN, as PyTorch's, and no other."""
    space, norm = Space(3, 2, 2), nn.BatchNorm2d(3, dtype=dtype)
    for odd in SPECIAL[:3]:
        y = normal(1, 18, 3, 2, 2, dtype=dtype)
        y[4, 1, 0, 1] = odd
        layer = Affine(norm, None, True, space)
        layer.output = space
        found, _ = layer.forward(to_map(y, space), 18)
        expected = F.relu(F.batch_norm(y, None, None, norm.weight, norm.bias, training=True))
        found = to_images(found, space, 18)
        assert torch.equal(found.isnan(), expected.isnan())
        assert found[:, 1].isnan().all()


def plane(data):
    """[C, H, W] as the kernels of single images take it."""
    return Plane(data, *data.shape, data.stride(0), data.stride(1))


@DTYPES
@pytest.mark.parametrize("numbers", [1, 3, 8])
def test_single_images_of_nan_and_infinity(numbers, dtype):
    kernels, x = kernels_for(dtype), special(1, 4, 6, 6, dtype=dtype, numbers=numbers)
    for size, stride, padding in ((2, 2, 0), (3, 1, 1), (3, 2, 1)):
        expected = F.max_pool2d(x, size, stride, padding)
        found = torch.empty_like(expected)
        kernels.plane_max_pool(plane(x), size, stride, padding, plane(found))()
        equal(found, expected)
    other = special(2, 4, 6, 6, dtype=dtype)
    bias = torch.tensor([0.0, 1.0, -1.0, float("inf")], dtype=dtype)
    none = Norm("plain", torch.empty(2, 4, dtype=dtype))
    for first, relu, residual in ((False, True, None), (True, False, other), (True, True, other)):
        expected = F.relu(x + bias[:, None, None]) if first else x + bias[:, None, None]
        expected = expected if residual is None else expected + residual
        expected = F.relu(expected) if relu else expected
        found = torch.empty_like(x)
        more = None if residual is None else plane(residual)
        norm = none if first else replace(none, beta=bias)
        kernels.plane_affine(
            plane(x), first, bias if first else None, norm, more, relu, plane(found)
        )()
        equal(found, expected)
    mean = torch.empty(4, 1, 1, dtype=dtype)
    kernels.plane_mean(plane(x), plane(mean))()
    equal(mean.flatten(), x.sum((1, 2)) / 36)


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_products_of_nan_and_infinity(form, dtype):
    """Winograd's algorithm mixes the pixels of a tile, of which all may become NaN."""
    mask = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    with computed_as(form):
        product = product_of(mask, Window((3, 3)), 9, 9)
    weight = normal(1, *mask.shape, dtype=dtype)
    product.values = nn.Parameter(weight.reshape(-1)[product.flat])
    for odd in SPECIAL[:3]:
        x = normal(2, 18, 3, 9, 9, dtype=dtype)
        x[5, 1, 4, 7] = odd
        expected = torch.einsum("nchwij,ocij->nohw", x.unfold(2, 3, 1).unfold(3, 3, 1), weight)
        y, saved = product.forward(to_map(x, product.input), 18)
        found = to_images(y, product.output, 18)
        if form == "winograd":
            assert not (~expected.isfinite() & found.isfinite()).any()
            assert found[torch.arange(18) != 5].isfinite().all()  # no other image
        else:
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(found), kind(expected))
        d_y = normal(3, *expected.shape, dtype=dtype)
        _, (d_values,) = product.backward(saved, to_map(d_y, product.output), None)
        d_weight = torch.einsum("nchwij,nohw->ocij", x.unfold(2, 3, 1).unfold(3, 3, 1), d_y)
        lost = ~d_weight.isfinite().reshape(-1)[product.flat] & d_values.isfinite()
        assert not lost.any()


@DTYPES
def test_a_linear_layer_of_one_image_with_nan_and_infinity(dtype):
    weight, kernels = normal(1, 5, 9, dtype=dtype), kernels_for(dtype)
    for odd in SPECIAL[:3]:
        x = normal(2, 9, dtype=dtype)
        x[7], y = odd, torch.empty(5, dtype=dtype)
        input = Space(9, 1, 1)
        entries = forward_entries(torch.ones(5, 9, 1, 1, dtype=torch.bool), input, blocked=False)
        listed = entries.for_stride(1)
        values = weight.reshape(-1)[entries.flat]
        kernels.dot(plane(x[:, None, None]), y, values, listed)()
        expected = weight @ x
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(expected))
