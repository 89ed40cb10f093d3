"""How the frozen weights and biases of edge-popup begin: moments, symmetry, and where from."""

import math

import pytest
import torch
from torch import nn

from ER_SLT.edge_popup import found_masks, popup, popup_layers, set_density
from ER_SLT.initializers import INITS, he_deviation, init_weights
from startsparse import models
from startsparse.errors import OptionError
from startsparse.masks import attach_masks, draw_masks, sparse_layers

WITH_BIAS = [name for name, (_, biases) in INITS.items() if biases != "none"]
BFAC = 0.5


def wide():
    """Layers "0", "3" and "7", large enough for statistics; the last has an odd size."""
    return nn.Sequential(
        nn.Conv2d(4, 200, 3, bias=False),
        nn.BatchNorm2d(200),
        nn.ReLU(),
        nn.Conv2d(200, 400, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(400, 1001),
    )


def deviations(model, how, gains=(1, 1, 1)):
    """Of the biases of each layer: the product of all before, or that of its own weights."""
    total, found = BFAC, []
    for layer, gain in zip(sparse_layers(model).values(), gains):
        own = gain * he_deviation(layer.weight.shape)
        total *= own
        found.append(own if how == "signed-const-with-bias" else total)
    return found


def drawn(how, seed=1, **options):
    model = wide()
    init_weights(model, how, seed, BFAC, **options)
    return model


def is_normal(values, deviation):
    """Mean and standard deviation within five standard errors, and few beyond two of them."""
    n = values.numel()
    assert abs(values.mean()) < 5 * deviation / math.sqrt(n)
    assert values.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))
    assert (values.abs() > 2 * deviation).double().mean() == pytest.approx(
        0.0455, abs=5 * math.sqrt(0.0455 / n)
    )


def is_signed(values, deviation):
    n = values.numel()
    assert torch.allclose(values.abs(), torch.tensor(deviation), rtol=1e-6, atol=0)
    assert abs((values > 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


def mirrored(tensor):
    first, second = tensor.chunk(2)
    return torch.equal(first, -second)


@pytest.mark.parametrize("how", INITS)
def test_weights_have_the_moments_and_symmetry_of_their_name(how):
    model = drawn(how)
    layers = list(sparse_layers(model).values())
    for index, layer in enumerate(layers):
        weight, deviation = layer.weight.detach(), he_deviation(layer.weight.shape)
        if how.startswith("kn"):
            is_normal(weight, deviation)
        elif how.startswith("signed"):
            is_signed(weight, deviation)
        else:
            if index < 2:
                assert mirrored(weight)
            if index > 0:
                assert mirrored(weight.transpose(0, 1))
            rows = len(weight) if index == 2 else len(weight) // 2
            columns = weight.shape[1] if index == 0 else weight.shape[1] // 2
            block = weight[:rows, :columns].flatten(1)
            block = block if len(block) <= block.shape[1] else block.T
            product = block @ block.T
            assert torch.allclose(product, torch.eye(len(block)), atol=1e-4)
            assert abs(weight.mean()) < 5 * weight.std() / math.sqrt(weight.numel())


@pytest.mark.parametrize("how", INITS)
def test_biases_have_the_moments_and_symmetry_of_their_name(how):
    model = drawn(how)
    layers = list(sparse_layers(model).values())
    if how not in WITH_BIAS:
        assert all(layer.bias is None for layer in layers)
        return
    for index, (layer, deviation) in enumerate(zip(layers, deviations(model, how))):
        bias = layer.bias.detach()
        assert bias.shape == layer.weight.shape[:1]
        if how.startswith("signed"):
            is_signed(bias, deviation)
        elif how == "kn-nonzero-bias":
            is_normal(bias, deviation)
        elif index == 1 and how == "ortho-bias-special":
            assert mirrored(bias)
        elif index == 2:
            is_normal(bias, deviation)
        else:
            assert mirrored(bias)
            is_normal(bias[: len(bias) // 2], deviation)


@pytest.mark.parametrize("how", ["ortho-zero-bias", "ortho-bias-special"])
def test_looks_linear_networks_are_linear_with_cancelling_biases_too(how):
    model = nn.Sequential(*(nn.Linear(20, 20) if i % 2 == 0 else nn.ReLU() for i in range(9)))
    init_weights(model, how, 1, bfac=50.0)
    x, y = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1))
    offset = model[-1].bias
    offset = 0 if offset is None else offset  # the last of five layers has nothing to undo
    together, apart = model(x + 2 * y) - offset, (model(x) - offset) + 2 * (model(y) - offset)
    assert torch.allclose(together, apart, atol=1e-4)
    assert together.std() > 0.1
    if how == "ortho-bias-special":
        assert model[0].bias.std() > 1
        with torch.no_grad():
            model[2].bias.zero_()
        apart = (model(x) - offset) + 2 * (model(y) - offset)
        assert not torch.allclose(model(x + 2 * y) - offset, apart, atol=0.1)


def test_a_convolution_undoes_the_bias_before_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    init_weights(model, "ortho-bias-special", 1, bfac=10.0)
    assert torch.allclose(model(torch.zeros(1, 3, 9, 9)), torch.zeros(()), atol=1e-5)
    assert model[0].bias.abs().min() > 0


def test_cancelling_biases_in_a_residual_network():
    model = models.build("resnet20", classes=10)
    init_weights(model, "ortho-bias-special", 1, bfac=1.0)
    for layer in list(sparse_layers(model).values())[:-1]:
        assert mirrored(layer.bias)
    assert (model.fc.bias != 0).all()


def masked(densities):
    """`wide` with Bernoulli masks, and the masks."""
    model = wide()
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    masks = draw_masks(shapes, densities, 1, "bernoulli")
    attach_masks(model, masks)
    return model, masks


@pytest.mark.parametrize("how", INITS)
def test_a_density_divides_by_the_root_of_that_which_a_layer_computes_with(how):
    plain, (scaled, masks) = drawn(how), masked([0.5, 0.1, 0.0])
    init_weights(scaled, how, 1, BFAC, 0.3)
    # The ticket's; the mask's own, which is lower; the ticket's, as nothing is kept to go by.
    gains = [0.3**-0.5, float(masks["3"].double().mean()) ** -0.5, 0.3**-0.5]
    expected, ratio = deviations(plain, how, gains), 1.0
    for name, gain, deviation in zip(masks, gains, expected):
        one, other = plain.get_submodule(name), scaled.get_submodule(name)
        assert torch.allclose(other.weight, gain * one.weight * masks[name], rtol=1e-5)
        ratio = gain if how == "signed-const-with-bias" else ratio * gain
        if how in WITH_BIAS and not (how == "ortho-bias-special" and name == "3"):
            assert torch.allclose(other.bias, ratio * one.bias, rtol=1e-4)
            assert other.bias.std().item() == pytest.approx(deviation, rel=0.3)


@pytest.mark.parametrize("how", [name for name in INITS if name != "signed-const-with-bias"])
def test_a_scale_is_a_factor_of_the_logits_for_each_layer(how):
    x = torch.rand(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    model, other = drawn(how), drawn(how, scale=3.0)
    model[1], other[1] = nn.Identity(), nn.Identity()
    assert torch.allclose(other(x), 27 * model(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_the_variance_is_that_of_he_for_the_entries_in_use(density):
    """What scaling is for: fan_in times the density in use times the variance is 2."""
    model, masks = masked([0.5, 0.1, 0.3])
    init_weights(model, "signed-const-zero-bias", 1, density=density)
    popup(model, 1)
    set_density(model, density)
    used = found_masks(model)
    for name, layer in popup_layers(model).items():
        fan_in = used[f"{name}.weight"].double().sum() / len(layer.weight)
        variance = layer.weight[masks[name]].double().square().mean()
        assert float(fan_in * variance) == pytest.approx(2, rel=0.001)


@pytest.mark.parametrize("how", INITS)
def test_draws_depend_on_seed_and_name_only(how):
    one, same, other = drawn(how), drawn(how), drawn(how, seed=2)
    state, again, stranger = (model.state_dict() for model in (one, same, other))
    assert all(torch.equal(state[name], again[name]) for name in state)
    for name, layer in sparse_layers(one).items():
        assert not torch.equal(layer.weight, stranger[f"{name}.weight"])
        if how in WITH_BIAS:
            assert not torch.equal(layer.bias, stranger[f"{name}.bias"])
    before = torch.random.get_rng_state()
    init_weights(one, how, 1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_batchnorm_begins_anew_and_everything_can_be_popped_up():
    model = models.build("resnet20", classes=10)
    model.bn1.running_mean.fill_(3)
    init_weights(model, "signed-const-with-bias", 1)
    assert (model.bn1.running_mean == 0).all()
    popup(model, 1)
    assert all(not layer.bias.requires_grad for layer in sparse_layers(model).values())


def test_errors_name_the_option():
    with pytest.raises(OptionError, match="--initBias: no rule is called 'zero'; choose from kn-"):
        init_weights(wide(), "zero", 1)
    odd = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    with pytest.raises(OptionError, match="--initBias ortho-zero-bias: layer 0: 5 outputs"):
        init_weights(odd, "ortho-zero-bias", 1)
