"""Soft thresholds: value and gradients against autograd of the formula, in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from startsparse import models, selection
from startsparse.effective import EffectiveLayer, effective_layers, plain_state, replace_layers
from startsparse.masks import active, attach_masks, density_table, draw_masks, sparse_layers
from STR.thresholds import (
    FUNCTIONS,
    SoftThreshold,
    SoftThresholded,
    SoftThresholdOfAll,
    layer_table,
    thresholds,
    why_dense,
)


def formula(weight, s, function, mask=None):
    """Kusupati et al. 2020, eq. 4, times the mask."""
    g = {"sigmoid": lambda s: 1 / (1 + torch.exp(-s)), "exp": torch.exp}[function]
    effective = weight.sign() * torch.relu(weight.abs() - g(s))
    return effective if mask is None else effective * mask


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("s_init", [-200.0, -3.0, -1.0])
def test_value_and_gradients_of_the_formula(function, masked, s_init):
    torch.manual_seed(1)
    plain = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64)
    model = nn.Sequential(plain)
    replace_layers(model, SoftThresholded, s_init, function)
    layer = model[0].double()
    mask = torch.rand(6, 4, 3, 3) < 0.4
    if masked:
        attach_masks(model, {"0": mask})
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    upstream = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    layer(x).backward(upstream)

    weight = layer.weight.detach().clone().requires_grad_()
    s = torch.full((1,), s_init, dtype=torch.float64, requires_grad=True)
    effective = formula(weight, s, function, mask if masked else None)
    nn.functional.conv2d(x, effective).backward(upstream)

    assert torch.allclose(layer.effective_weight(), effective, rtol=0, atol=1e-15)
    assert torch.allclose(layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-14)
    assert torch.allclose(layer.threshold_logit.grad, s.grad, rtol=1e-10, atol=1e-300)
    if masked:
        assert (layer.effective_weight()[~mask] == 0).all()
        assert (layer.weight.grad[~mask] == 0).all()


def test_gradcheck():
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = weight[(weight.abs() - 0.3).abs() > 1e-3].requires_grad_()  # away from the kink
    threshold = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SoftThreshold.apply, (weight, threshold))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_all_layers_together_are_those_one_by_one(format, monkeypatch):
    """As on a GPU, to the bit."""

    def pass_through():
        model = models.build("resnet20", classes=10, width=4)
        models.init_weights(model, "kaiming_normal", 1)
        replace_layers(model, SoftThresholded, -2.0, "sigmoid")
        model.to(memory_format=format)
        output = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        output.square().sum().backward()
        assert all(layer.held is None for layer in effective_layers(model).values())
        return [output, *(p.grad for p in model.parameters())]

    one_by_one = pass_through()
    monkeypatch.setattr(selection, "one_by_one", lambda _: False)
    with monkeypatch.context() as patch:
        patch.setattr(SoftThreshold, "apply", lambda *_: pytest.fail("one by one"))
        patch.setattr(EffectiveLayer, "check", lambda _: None)
        all_at_once = pass_through()
    for one, other in zip(one_by_one, all_at_once, strict=True):
        assert torch.equal(one, other)


def test_gradcheck_of_all_together():
    draw = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in [(3, 2), 5]]
    weights.append(torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=draw))
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    limits = torch.tensor([0.3, 0.2, 0.6], dtype=torch.float64)
    for weight, limit in zip(weights, limits):
        near = (weight.abs() - limit).abs() < 1e-3
        weight.masked_fill_(near, 1.0).requires_grad_()  # away from the kink
    assert torch.autograd.gradcheck(SoftThresholdOfAll.apply, (limits.requires_grad_(), *weights))


def test_layers_with_other_functions_compute_one_by_one(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    replace_layers(model, SoftThresholded, -2.0, "sigmoid", dense=["1"])
    replace_layers(model, SoftThresholded, -2.0, "exp", dense=["0"])
    expected = model(torch.ones(1, 3))
    monkeypatch.setattr(selection, "one_by_one", lambda _: False)
    assert torch.equal(model(torch.ones(1, 3)), expected)


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "mlp"])
def test_a_very_negative_s_is_the_plain_network(arch):
    model = models.build(arch, classes=10).eval()
    models.init_weights(model, "kaiming_normal", 1)
    soft = copy.deepcopy(model)
    replace_layers(soft, SoftThresholded, -200.0, "sigmoid")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), soft(x))
    assert list(sparse_layers(soft)) == list(sparse_layers(model))
    assert all(isinstance(layer, SoftThresholded) for layer in sparse_layers(soft).values())


def test_plain_state_computes_the_same_in_an_ordinary_network():
    model = models.build("resnet20", classes=10).eval()
    models.init_weights(model, "kaiming_normal", 1)
    plain = copy.deepcopy(model)
    replace_layers(model, SoftThresholded, -3.0, "sigmoid")
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.3] * len(shapes), 1, "bernoulli"))
    plain.load_state_dict(plain_state(model))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    zeros = sum(int((layer.weight == 0).sum()) for layer in sparse_layers(plain).values())
    total = density_table(model).iloc[-1]
    assert zeros == total["weights"] - total["kept"] > 0


def test_dense_layers_stay_plain_and_tables_agree():
    model = models.build("resnet20", classes=10)
    models.init_weights(model, "kaiming_normal", 1)
    names = list(sparse_layers(model))
    replace_layers(model, SoftThresholded, -2.0, "exp", dense=names[:1])
    assert not isinstance(sparse_layers(model)[names[0]], SoftThresholded)
    assert list(thresholds(model)) == names[1:]
    assert list(thresholds(model).values()) == pytest.approx([math.exp(-2)] * (len(names) - 1))
    table = layer_table(model)
    assert list(table) == names
    assert table[names[0]] == {"density": 1.0}
    share = active(sparse_layers(model)[names[3]]).double().mean().item()
    assert table[names[3]]["density"] == share < 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("s", "said"), [(-200.0, True), (-2.0, False)])
def test_a_network_that_thresholds_left_dense_says_why(masked, s, said):
    """Of normal weights with a standard deviation of 0.1 and more, g(-2) = 0.12 prunes many."""
    model = models.build("mlp", classes=10, width=16)
    models.init_weights(model, "kaiming_normal", 1)
    replace_layers(model, SoftThresholded, s, "sigmoid")
    if masked:
        shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
        attach_masks(model, draw_masks(shapes, [0.3] * len(shapes), 1, "bernoulli"))
    line = why_dense(model, s, 1e-4)
    assert ("--sInit-value: soft thresholds use 1.0000 of the weights" in line) == said
    assert ("began at -200 and is -200 at most" in line and "(0.0001; --st-decay" in line) == said
    assert "\n" not in line
    assert said or line == ""
