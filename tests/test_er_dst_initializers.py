"""Initialisations that know the mask: their moments, where they are, and orthogonal repair."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ER_DST import initializers
from ER_DST.initializers import (
    INITS,
    init_weights,
    ortho_repair,
    orthogonality_gap,
    orthogonality_gradient,
)
from startsparse import models
from startsparse.errors import OptionError
from startsparse.masks import (
    active,
    attach_masks,
    draw_masks,
    keep_inside,
    masked_weights,
    sparse_layers,
)

SCALED = {"normal": 3.0, "uniform": 1.8, "bimodal": 1.0}  # and their fourth moment over std^4


def network(density, seed=1):
    """Layers 0 and 3 masked, 6 not."""
    model = nn.Sequential(
        nn.Conv2d(6, 40, 3),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 60, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(60, 100),
    )
    shapes = {name: model[int(name)].weight.shape for name in ("0", "3")}
    attach_masks(model, draw_masks(shapes, [density] * 2, seed, "bernoulli"))
    return model


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("how", SCALED)
def test_mean_and_standard_deviation(how, density):
    model = network(density)
    init_weights(model, how, 1)
    for name, layer in sparse_layers(model).items():
        mask = active(layer)
        realised = mask.double().mean() if name != "6" else 1
        std = 1 / math.sqrt(layer.weight[0].numel() * realised)
        values = layer.weight.detach()[mask].double() / std
        assert values.mean().abs() < 4.5 / math.sqrt(len(values))
        spread = math.sqrt((SCALED[how] - 1) / len(values)) + 1e-6
        assert abs(values.square().mean() - 1) < 4.5 * spread
        if how == "bimodal":
            torch.testing.assert_close(values.abs(), torch.ones_like(values))
        if how == "uniform":
            assert values.abs().max() <= math.sqrt(3) + 1e-6
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("how", INITS)
def test_inside_the_mask_and_repeatable(how):
    one, other, third = (network(0.3) for _ in range(3))
    one[1].running_mean.fill_(3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    init_weights(one, how, 1)
    assert torch.equal(torch.get_rng_state(), state)
    init_weights(other, how, 1)
    init_weights(third, how, 2)
    assert (one[1].running_mean == 0).all()
    for (_, weight, mask), (_, same, _), (_, different, _) in zip(
        masked_weights(one), masked_weights(other), masked_weights(third)
    ):
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()
        assert torch.equal(weight, same)
        assert not torch.equal(weight, different)


def test_kaiming_is_kaiming_normal_inside_the_mask():
    one, other = network(0.3), network(0.3)
    init_weights(one, "kaiming", 4)
    models.init_weights(other, "kaiming_normal", 4)
    keep_inside(other)
    for (key, value), (_, same) in zip(one.state_dict().items(), other.state_dict().items()):
        assert torch.equal(value, same), key


def built(arch, imagenet=False):
    """A network of the scripts, half masked at random, begun by default."""
    graph = torch.eye(9).to_sparse() if arch == "gcn" else None
    channels = 50 if arch in ("mlp", "gcn", "algorithmic") else 3
    size = 32 if channels == 3 else 1
    model = models.build(
        arch, classes=200, channels=channels, size=size, imagenet=imagenet, adjacency=graph
    )
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.5] * len(shapes), 1, "exact"))
    init_weights(model, "default", 3)
    return model


def fan_out(layer):
    return layer.weight.shape[0] * layer.weight[0, 0].numel()


def is_normal(values, std):
    """Its spread and its fourth moment, within 4.5 standard errors."""
    values = values.double() / std
    assert values.mean().abs() < 4.5 / math.sqrt(len(values))
    assert abs(values.square().mean() - 1) < 4.5 * math.sqrt(2 / len(values))
    assert abs(values.pow(4).mean() - 3) < 4.5 * math.sqrt(96 / len(values))


def is_uniform(values, bound):
    values = values.double() / bound
    assert 1 - 20 / len(values) < values.abs().max() <= 1 + 1e-6
    assert values.mean().abs() < 4.5 / math.sqrt(3 * len(values))
    assert abs(values.square().mean() - 1 / 3) < 4.5 * math.sqrt(4 / 45 / len(values))


@pytest.mark.parametrize(
    ("arch", "imagenet"),
    [
        *(("vgg11", False), ("resnet20", False), ("resnet18", False), ("resnet18", True)),
        *(("mlp", False), ("gcn", False), ("algorithmic", False)),
    ],
)
def test_default_is_what_the_network_starts_from_as_published(arch, imagenet):
    model = built(arch, imagenet)
    for layer in sparse_layers(model).values():
        values, fan_in = layer.weight.detach()[active(layer)], layer.weight[0].numel()
        conv = isinstance(layer, nn.Conv2d)
        if arch == "vgg11" or (imagenet and conv):
            is_normal(values, math.sqrt(2 / fan_out(layer)) if conv else 0.01)
        elif arch == "gcn":
            is_uniform(values, math.sqrt(6 / sum(layer.weight.shape)))
        else:
            is_uniform(values, 1 / math.sqrt(fan_in))
        if layer.bias is not None and arch == "vgg11":
            assert (layer.bias == 0).all()
        elif layer.bias is not None:
            assert 0 < layer.bias.abs().max() <= 1 / math.sqrt(fan_in)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize("how", INITS)
def test_an_empty_mask(how):
    model = network(0.0)
    init_weights(model, how, 1)
    assert (model[0].weight == 0).all()
    assert model[6].weight.isfinite().all()


@pytest.mark.parametrize("how", INITS)
def test_float64_and_channels_last_get_the_same(how):
    one = network(0.3)
    other = copy.deepcopy(one).double().to(memory_format=torch.channels_last)
    init_weights(one, how, 1)
    init_weights(other, how, 1)
    for (_, weight, _), (_, same, _) in zip(masked_weights(one), masked_weights(other)):
        assert torch.equal(weight.double(), same)


@pytest.mark.parametrize("dense", [True, False])
def test_looks_linear_begins_linear_if_dense(dense):
    model = models.build("mlp", classes=3, channels=7, size=1, width=16)
    if not dense:
        shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
        attach_masks(model, draw_masks(shapes, [0.5] * len(shapes), 1, "exact"))
    init_weights(model, "looks-linear", 1)
    model.double().eval()
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, 7, dtype=torch.float64, generator=draw) for _ in range(2))
    apart = model(x) - 2 * model(y)
    assert torch.allclose(model(x - 2 * y), apart, rtol=1e-9, atol=1e-12) == dense


def test_looks_linear_names_the_layer_of_odd_size():
    model = models.build("mlp", classes=3, channels=7, size=1, width=15)
    with pytest.raises(OptionError, match="--init-method: looks-linear: layer 'hidden.0': 15 out"):
        init_weights(model, "looks-linear", 1)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(OptionError, match="--init-method: .*'he'.* default, kaiming, normal"):
        init_weights(network(0.5), "he", 1)


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_the_gradient_is_the_gradient(rows, columns, density, seed):
    draw = torch.Generator().manual_seed(seed)
    inside = torch.rand(rows, columns, generator=draw) < density
    weight = torch.randn(rows, columns, generator=draw, dtype=torch.float64, requires_grad=True)
    matrix = weight * inside
    (matrix @ matrix.T - torch.eye(rows)).square().sum().backward()
    matrix = matrix.detach()
    slope = orthogonality_gradient(matrix, orthogonality_gap(matrix), inside)
    torch.testing.assert_close(slope, weight.grad)


def objective(weight, mask):
    """Distance from orthogonality, in float64, the long way."""
    matrix = (weight * mask).flatten(1).detach().double()
    gram = matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T
    return float((gram - torch.eye(len(gram))).square().sum())


@pytest.mark.parametrize("how", ["default", "normal", "bimodal"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_ortho_repair_comes_nearer(how, density):
    model = network(density)
    init_weights(model, how, 1)
    untouched = model[6].weight.detach().clone()
    masks = {name: mask.clone() for name, _, mask in masked_weights(model)}
    before = {name: objective(weight, mask) for name, weight, mask in masked_weights(model)}
    found = ortho_repair(model)
    assert list(found) == ["0", "3"]
    assert torch.equal(model[6].weight, untouched)
    for name, weight, mask in masked_weights(model):
        assert torch.equal(mask, masks[name])
        assert (weight[~mask] == 0).all()
        after = objective(weight, mask)
        assert found[name] == pytest.approx((before[name], after), rel=1e-3, abs=1e-3)
        assert after < 0.2 * before[name]


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 1),
    st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    st.integers(0, 99),
)
def test_ortho_repair_never_makes_it_worse(rows, columns, density, scale, seed):
    model = nn.Sequential(nn.Linear(columns, rows))
    init_weights(model, "normal", seed)
    attach_masks(model, draw_masks({"0": (rows, columns)}, [density], seed, "exact"))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    last = float("inf")
    for steps in (0, 1, 2, 5, 20):
        clone = copy.deepcopy(model)
        before, after = ortho_repair(clone, steps)["0"]
        assert after <= min(before, last)
        assert clone[0].weight.isfinite().all()
        last = after


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 3, 3, 3)])
def test_a_dense_layer_becomes_orthogonal(shape):
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(3, 16, 3)
    model = nn.Sequential(layer)
    attach_masks(model, {"0": torch.ones(shape, dtype=torch.bool)})
    init_weights(model, "normal", 1)
    before, after = ortho_repair(model, 200)["0"]
    assert after < 1e-3 < before


@pytest.mark.parametrize(("density", "most"), [(0.3, 7), (0.0, 1)])
def test_few_steps_are_tried(monkeypatch, density, most):
    tried = []
    monkeypatch.setattr(
        initializers, "orthogonality_gap", lambda w: tried.append(1) or orthogonality_gap(w)
    )
    model = network(density)
    init_weights(model, "normal", 1)
    ortho_repair(model, 7)
    assert len(tried) == 2 * (1 + most)  # an empty layer is left at once
