"""Scores and pruners, against slow references on small networks."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from startsparse import pruning, scores
from startsparse.masks import attach_masks, draw_masks, keep_inside, masked_weights, sparse_layers
from startsparse.models import build
from startsparse.pruning import PRUNERS, layer_counts, prune

SHAPE = (1, 3, 6, 6)
WITH_RATIO = {"random-uniform": "uniform", "random-balanced": "balanced", "random-erk": "ERK"}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed=0, density=0.6, width=5, dtype=torch.float64, dense=()):
    """Convolutions, BatchNorm in the middle of its life, a shortcut-free linear end."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(6, 3),
    ).to(dtype)
    for i, tensor in enumerate([*model.parameters(), model[1].running_mean]):
        tensor.data = 0.5 * draw(*tensor.shape, seed=100 * seed + i, dtype=dtype)
    model[1].running_var = draw(width, seed=seed, dtype=dtype).abs() + 0.1
    shapes = {n: x.weight.shape for n, x in sparse_layers(model).items() if n not in dense}
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), seed, "exact"))
    return model


def batch(seed=0, dtype=torch.float64):
    return draw(8, *SHAPE[1:], seed=seed, dtype=dtype), torch.arange(8) % 3


def inputs(seed=0, dtype=torch.float64):
    return {"seed": seed, "level": 1, "batch": lambda: batch(seed, dtype), "shape": SHAPE}


def masks_of(model):
    return {name: mask.clone() for name, _, mask in masked_weights(model)}


def left(model):
    return sum(int(mask.sum()) for _, _, mask in masked_weights(model))


# --- SNIP and GraSP against differences -----------------------------------------------------------


def plainly(model):
    """A copy in training mode without dropout, for the references to change as they like."""
    other = copy.deepcopy(model).train()
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return other


@pytest.mark.parametrize("seed", range(3))
def test_snip_is_the_change_of_the_loss(seed):
    model = network(seed)
    images, labels = batch(seed)
    found = scores.snip(model, images, labels)
    other, step = plainly(model), 1e-6
    for name, weight, mask in masked_weights(other):
        assert found[name].shape == weight.shape
        assert (found[name][~mask] == 0).all()
        for place in mask.nonzero().tolist()[::5]:
            place = tuple(place)
            value = weight[place].item()
            losses = []
            for factor in (1 + step, 1 - step):  # w dL/dw is the slope by a factor before w
                weight.data[place] = value * factor
                losses.append(F.cross_entropy(other(images), labels).item())
            weight.data[place] = value
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert found[name][place].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("dense", [(), ("9",)])
@pytest.mark.parametrize("seed", range(3))
def test_grasp_is_weight_times_hessian_times_gradient(seed, dense):
    model = network(seed, dense=dense)
    images, labels = batch(seed)
    found = scores.grasp(model, images, labels, temperature=1)
    other = plainly(model)
    layers = sparse_layers(other)

    def gradients():
        other.zero_grad()
        F.cross_entropy(other(images), labels).backward()
        return {name: layer.weight.grad.clone() for name, layer in layers.items()}

    along = gradients()  # the direction: only weights that exist move
    for name, _, mask in masked_weights(other):
        along[name] *= mask

    def moved(by):
        for name, layer in layers.items():
            layer.weight.data += by * along[name]
        return gradients()

    step = 1e-5 / math.sqrt(sum(float(g.square().sum()) for g in along.values()))
    forward, backward = moved(step), moved(-2 * step)
    assert set(found) == {name for name, _, _ in masked_weights(model)}
    for name, weight, mask in masked_weights(model):
        product = (forward[name] - backward[name]) / (2 * step)
        expected = weight.detach() * product * mask
        assert found[name].abs().max() > 1e-6
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("temperature", [1, 200])
def test_grasp_is_that_of_the_whole_hessian(temperature):
    """Entry by entry, of the softmax of logits over the temperature, written out."""
    model = with_masks(mlp([4, 5, 3]), 0.7).double()
    images, labels = draw(6, 4), torch.arange(6) % 3
    shapes = {name: weight.shape for name, weight, _ in masked_weights(model)}
    mask, weights = (
        torch.cat([entry[i].detach().flatten() for entry in masked_weights(model)]) for i in (2, 1)
    )

    def loss(flat):
        first, last = (w.view(s) for w, s in zip(flat.split([20, 15]), shapes.values()))
        logits = (images @ first.T).relu() @ last.T
        odds = (logits / temperature).exp()
        return -(odds[range(6), labels] / odds.sum(1)).log().mean()

    slope = torch.autograd.functional.jacobian(loss, weights) * mask
    hessian = torch.autograd.functional.hessian(loss, weights)
    expected = [
        float(w * sum(h * g for h, g in zip(row, slope))) for w, row in zip(weights, hessian)
    ]
    found = scores.grasp(model, images, labels, temperature)
    found = torch.cat([found[name].flatten() for name in shapes]).tolist()
    assert max(map(abs, found)) > 1e-9
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_temperature_of_grasp_reaches_its_scores():
    """It is 200 unless another is asked for, and weights that stay differ."""
    kept = {}
    for temperature in (None, 200, 1):
        model = network(4)
        given = {} if temperature is None else {"temperature": temperature}
        prune(model, "grasp", 100, **inputs(4), **given)
        kept[temperature] = torch.cat([mask.flatten() for mask in masks_of(model).values()])
    assert torch.equal(kept[None], kept[200])
    assert not torch.equal(kept[200], kept[1])


def test_grasp_keeps_what_the_gradient_norm_needs():
    """Removing the kept side of the scores lowers the gradient norm more than the pruned side."""
    changes = []
    images, labels = batch()
    for sign in (1, -1):
        model = plainly(network())
        found = scores.grasp(model, images, labels, temperature=1)
        shrunk = model.state_dict()
        for name, weight, _ in masked_weights(model):  # a small step to zero, where eq. 8 is exact
            side = (sign * found[name] > 0).to(weight.dtype)
            shrunk[f"{name}.weight"] = weight.detach() * (1 - 1e-4 * side)
        norms = []
        for state in (model.state_dict(), shrunk):
            model.load_state_dict(copy.deepcopy(state))
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            norms.append(
                sum(float((w.grad * m).square().sum()) for _, w, m in masked_weights(model))
            )
        changes.append(norms[1] - norms[0])
    assert changes[0] < 0 < changes[1]


# --- SynFlow --------------------------------------------------------------------------------------


def mlp(widths, seed=0, scale=1.0):
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        layer = nn.Linear(n_in, n_out, bias=False)
        layer.weight.data = scale * draw(n_out, n_in, seed=31 * seed + i, dtype=torch.float32)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_masks(model, density, seed=0):
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), seed, "exact"))
    return model


def test_synflow_is_the_sum_over_paths():
    """For a multilayer perceptron: the product of absolute matrices, one entry at a time."""
    model = with_masks(mlp([4, 5, 3, 2]), 0.7)
    found = scores.synflow(model, (1, 4))
    weights = [w.detach().double().abs().numpy() for _, w, _ in masked_weights(model)]
    for layer, name in enumerate(found):
        below = np.ones(4)
        for weight in weights[:layer]:
            below = weight @ below
        above = np.ones(2)
        for weight in reversed(weights[layer + 1 :]):
            above = above @ weight
        expected = above[:, None] * weights[layer] * below[None, :]
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-12)


def test_synflow_of_a_fresh_network_is_the_published_code():
    """All of the state absolute, in float64 and evaluation mode; gradients by backward()."""
    model = with_masks(build("resnet20", classes=4, channels=3, size=8, width=4), 0.5)
    found = scores.synflow(model, (1, 3, 8, 8))
    other = copy.deepcopy(model).double().eval()
    nn.init.zeros_(other.fc.bias)
    for value in other.state_dict().values():
        if value.is_floating_point():
            value.abs_()
    other(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
    for name, weight, _ in masked_weights(other):
        expected = (weight.grad * weight.detach()).abs()
        assert expected.max() > 0
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=0)


@given(st.integers(0, 1000), st.floats(0.3, 1))
@settings(max_examples=15)
def test_synflow_is_conserved(seed, density):
    """Per layer, and per channel what comes in is what goes out; with shifts and statistics too."""
    model = network(seed, density)
    names = ["0", "3", "6", "9"]
    found = scores.synflow(model, SHAPE)
    totals = [float(found[name].sum()) for name in names]
    assert totals == pytest.approx([totals[0]] * 4, rel=1e-9)
    for first, second in pairwise(names):
        came = found[first].flatten(1).sum(1)
        gone = found[second].transpose(0, 1).reshape(len(came), -1).sum(1)  # 16 inputs: 4 channels
        torch.testing.assert_close(came, gone, rtol=1e-9, atol=1e-12 * totals[0])


def test_synflow_does_not_favour_units_that_never_fire():
    model = with_masks(build("mlp", classes=3, channels=2, size=2, width=6), 1.0)
    before = scores.synflow(model, (1, 2, 2, 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var[0], module.running_mean[1], module.bias.data[2] = 0, -3, 3
    for name, score in scores.synflow(model, (1, 2, 2, 2)).items():
        assert torch.equal(score, before[name])


def test_synflow_where_float32_would_overflow():
    model = with_masks(mlp([32] * 30, scale=50.0), 0.9)
    found = scores.synflow(model, (1, 32))
    totals = [float(score.sum()) for score in found.values()]
    assert totals[0] > torch.finfo(torch.float32).max
    assert totals == pytest.approx([totals[0]] * 29, rel=1e-9)
    with pytest.raises(ValueError, match="float64"):
        scores.synflow(with_masks(mlp([32] * 30, scale=1e15), 0.9), (1, 32))


@pytest.mark.parametrize("paths", [1, 3])
def test_synflow_empties_no_layer(monkeypatch, paths):
    """As many weights as make that many paths: magnitude and a single round cut the network."""

    def fewest(pruner):
        model = with_masks(mlp([40, 100, 20, 100, 5], seed=3), 0.9)
        with torch.no_grad():
            model[2].weight *= 0.3
        prune(model, pruner, 4 * paths, seed=1, level=1, shape=(1, 40))
        flow = sum(float(s.sum()) for s in scores.synflow(model, (1, 40)).values())
        return min(int(mask.sum()) for _, _, mask in masked_weights(model)), flow

    layer, flow = fewest("synflow")
    assert layer >= 1
    assert flow > 0
    assert fewest("mag")[0] == 0
    monkeypatch.setattr(pruning, "ROUNDS", 1)
    assert fewest("synflow")[1] == 0


def test_synflow_rounds_fall_exponentially(monkeypatch):
    model, targets = with_masks(mlp([20, 30, 10]), 1.0), []
    shrink = scores.keep_top
    monkeypatch.setattr(scores, "keep_top", lambda m, s, n: (targets.append(n), shrink(m, s, n)))
    prune(model, "synflow", 9, seed=0, level=0, shape=(1, 20))
    expected = [round(900 * 100 ** (-k / 100)) for k in range(1, 101)]
    assert targets == sorted(set(expected), reverse=True)
    assert targets[-1] == 9


def test_synflow_is_a_hundred_rounds_of_a_plain_loop():
    """Scores by products of absolute matrices, entries sorted one by one."""
    model = with_masks(mlp([8, 12, 10, 4], seed=5), 0.8)
    weights = [w.detach().double().abs().numpy().copy() for _, w, _ in masked_weights(model)]
    start = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    for k in range(1, 101):
        entries = []
        for layer, weight in enumerate(weights):
            below, above = np.ones(8), np.ones(4)
            for other in weights[:layer]:
                below = other @ below
            for other in reversed(weights[layer + 1 :]):
                above = above @ other
            for i, j in zip(*np.nonzero(weight)):
                entries.append((above[i] * weight[i, j] * below[j], layer, i, j))
        entries.sort(key=lambda entry: -entry[0])
        for _, layer, i, j in entries[round(start * (20 / start) ** (k / 100)) :]:
            weights[layer][i, j] = 0
    once = copy.deepcopy(model)
    prune(model, "synflow", 20, seed=1, level=1, shape=(1, 8))
    for (_, _, mask), weight in zip(masked_weights(model), weights):
        assert np.array_equal(mask.numpy(), weight > 0)
    assert sum((weight > 0).sum() for weight in weights) == 20
    # A single round would have kept others.
    scores.keep_top(once, scores.synflow(once, (1, 8)), 20)
    assert any(
        not torch.equal(a, b) for a, b in zip(masks_of(once).values(), masks_of(model).values())
    )


# --- Random ---------------------------------------------------------------------------------------


def expected_counts(ratio, shapes, left, count):
    """min(left_l, c * profile_l * n_l) with c found by bisection."""
    sizes = [math.prod(shape) for shape in shapes]
    share = {
        "uniform": sizes,
        "balanced": [1] * len(sizes),
        "ERK": [sum(shape) for shape in shapes],
    }[ratio]
    low, high = 0.0, float(max(sizes)) + 1
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(min(n, middle * s) for n, s in zip(left, share))
        low, high = (middle, high) if total < count else (low, middle)
    return [min(n, high * s) for n, s in zip(left, share)]


LAYER = st.tuples(
    st.one_of(
        st.tuples(st.integers(1, 30), st.integers(1, 30)),
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    ),
    st.floats(0, 1),
)


@given(
    st.sampled_from(["uniform", "balanced", "ERK"]),
    st.lists(LAYER, min_size=1, max_size=6),
    st.floats(0, 1),
)
@settings(max_examples=300)
def test_counts_follow_the_ratio_as_far_as_weights_are_left(ratio, layers, share):
    shapes = [shape for shape, _ in layers]
    remaining = [round(part * math.prod(shape)) for shape, part in layers]
    count = round(share * sum(remaining))
    found = layer_counts(ratio, shapes, remaining, count)
    assert found.sum() == count
    assert all(0 <= n <= most for n, most in zip(found, remaining))
    if count:
        wanted = expected_counts(ratio, shapes, remaining, count)
        assert all(abs(n - w) < 1 + 1e-6 for n, w in zip(found, wanted))


@pytest.mark.parametrize("pruner", WITH_RATIO)
def test_random_pruners_use_these_counts(pruner):
    model = network(3, 0.9)
    model.get_submodule("6").weight_mask[:, 3:] = False  # fewer left than balanced and ERK ask for
    shapes = [weight.shape for _, weight, _ in masked_weights(model)]
    remaining = [int(mask.sum()) for _, _, mask in masked_weights(model)]
    wanted = expected_counts(WITH_RATIO[pruner], shapes, remaining, 150)
    prune(model, pruner, 150, seed=5, level=2)
    found = [int(mask.sum()) for _, _, mask in masked_weights(model)]
    assert all(abs(n - w) < 1 for n, w in zip(found, wanted))
    others = {tuple(expected_counts(r, shapes, remaining, 150)) for r in WITH_RATIO.values()}
    assert len(others) == 3


@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name.startswith("random")])
def test_random_pruners_keep_each_weight_as_often(pruner):
    times, repeats = None, 400
    for seed in range(repeats):
        model = with_masks(mlp([6, 5, 4]), 1.0)
        prune(model, pruner, 20, seed=seed, level=1)
        kept = torch.cat([mask.flatten().double() for _, _, mask in masked_weights(model)])
        times = kept if times is None else times + kept
    layers = times.split([30, 20])
    for layer in layers:
        share = layer.mean() / repeats
        error = torch.sqrt(repeats * share * (1 - share))
        assert ((layer - share * repeats).abs() < 4.5 * error).all()
    if pruner == "random-global":
        assert abs(layers[0].sum() / times.sum() - 0.6) < 0.02


def test_random_draws_derive_from_seed_level_and_name():
    model = with_masks(mlp([6, 5, 4]), 1.0)
    first = scores.random(model, 1, 1)
    torch.manual_seed(99)
    assert all(
        torch.equal(a, b) for a, b in zip(first.values(), scores.random(model, 1, 1).values())
    )
    for seed, level in ((2, 1), (1, 2)):
        assert not torch.equal(first["0"], scores.random(model, seed, level)["0"])
    del model[2].weight_mask
    assert torch.equal(first["0"], scores.random(model, 1, 1)["0"])


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", PRUNERS)
@given(st.integers(0, 10_000), st.integers(2, 7), st.floats(0.05, 1), st.floats(0, 1))
@settings(max_examples=12)
def test_exactly_count_weights_stay_and_none_comes_back(pruner, seed, width, density, share):
    model = network(seed, density, width, torch.float32, dense=("6",))
    dense = model[6].weight.clone()
    held = [mask for _, _, mask in masked_weights(model)]
    before = [mask.clone() for mask in held]
    count = round(share * left(model))
    prune(model, pruner, count, **inputs(seed, torch.float32))
    assert sum(int(mask.sum()) for mask in held) == count  # the same tensors: changed in place
    assert not any((mask & ~old).any() for mask, old in zip(held, before))
    assert all((weight[~mask] == 0).all() for _, weight, mask in masked_weights(model))
    assert torch.equal(model[6].weight, dense)


BY_ONE_SCORE = {
    "mag": scores.magnitude,
    "random-global": lambda m: scores.random(m, 4, 1),
    "snip": lambda m: scores.snip(m, *batch(4)),
    "grasp": lambda m: scores.grasp(m, *batch(4)),
}


@pytest.mark.parametrize("pruner", BY_ONE_SCORE)
def test_the_best_scores_stay(pruner):
    model = network(4)
    found, before = BY_ONE_SCORE[pruner](model), masks_of(model)
    prune(model, pruner, 60, **inputs(4))
    values = torch.cat([found[name][mask] for name, mask in before.items()])
    lowest = values.sort(descending=True).values[59]
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, before[name] & (found[name] >= lowest))


def everything(model):
    """State to the byte: tensors, where they lie, gradients, modes, the global random state."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {
            name: (t.data_ptr(), t.stride(), t.requires_grad, t.detach().numpy().tobytes())
            for name, t in tensors.items()
        },
        {n: p.grad is None or p.grad.numpy().tobytes() for n, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        torch.get_rng_state().numpy().tobytes(),
    )


SCORES = {
    "mag": scores.magnitude,
    "random": lambda m: scores.random(m, 1),
    "snip": lambda m: scores.snip(m, *batch(1, torch.float32)),
    "grasp": lambda m: scores.grasp(m, *batch(1, torch.float32)),
    "synflow": lambda m: scores.synflow(m, SHAPE),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scores_leave_the_model_as_it_was(score, raises, layout):
    model = network(1, dtype=torch.float32).to(memory_format=layout).train()
    model[1].eval()  # mixed modes, as when BatchNorm is frozen
    F.cross_entropy(model(batch(1, torch.float32)[0]), batch(1)[1]).backward()
    model[3].bias.grad = None
    before = everything(model)

    def stop(*_):
        raise RuntimeError("in the middle")

    hook = model[9].register_forward_hook(stop) if raises else None
    if raises and score not in (SCORES["mag"], SCORES["random"]):  # these do not run the network
        with pytest.raises(RuntimeError, match="in the middle"):
            score(model)
    else:
        with torch.no_grad():
            found = score(model)
        assert not any(tensor.requires_grad for tensor in found.values())
    if hook:
        hook.remove()
    assert everything(model) == before


@pytest.mark.parametrize("pruner", PRUNERS)
def test_channels_last_prunes_the_same(pruner):
    model = network(2)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert last[0].weight_mask.is_contiguous(memory_format=torch.channels_last)
    assert not last[0].weight_mask.is_contiguous()
    for each in (model, last):
        prune(each, pruner, 60, **inputs(2))
    for (name, mask), other in zip(masks_of(model).items(), masks_of(last).values()):
        assert torch.equal(mask, other), name


@pytest.mark.parametrize("pruner", ["snip", "grasp", "synflow"])
def test_a_residual_network_in_channels_last(pruner):
    """In-place ReLUs, shortcuts and double backward through the kernels for channels_last."""
    counts = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = with_masks(build("resnet20", classes=3, channels=3, size=6, width=4), 0.5)
        model.to(memory_format=layout)
        prune(model, pruner, 2000, **inputs(0, torch.float32))
        counts.append(torch.cat([mask.flatten() for mask in masks_of(model).values()]))
    assert int(counts[0].sum()) == 2000
    assert (counts[0] != counts[1]).float().mean() < 0.01  # float32 sums in another order


def test_errors_change_nothing():
    model = network(0)
    before, most = everything(model), left(model)
    with pytest.raises(ValueError, match=f"{most + 1} weights cannot be kept: {most} are left"):
        prune(model, "random-erk", most + 1, **inputs())
    with pytest.raises(ValueError, match="-1 weights"):
        prune(model, "random-erk", -1, **inputs())
    with pytest.raises(ValueError, match=r"'mags'.*mag, random-global"):
        prune(model, "mags", 5, **inputs())
    for pruner, what in (("snip", "batch"), ("grasp", "batch"), ("synflow", "shape")):
        with pytest.raises(ValueError, match=f"{pruner} needs .*{what}"):
            prune(model, pruner, 5, seed=0, level=0)
    images, labels = batch()
    with pytest.raises(ValueError, match="0: a score is NaN"):
        prune(model, "snip", 5, seed=0, level=0, batch=lambda: (images * torch.nan, labels))
    assert everything(model) == before


def test_a_model_that_is_one_layer():
    model = nn.Linear(5, 3)
    attach_masks(model, {"": torch.ones(3, 5, dtype=torch.bool)})
    keep_inside(model)
    images, labels = draw(4, 5, dtype=torch.float32), torch.arange(4) % 3
    for pruner, count in (("snip", 12), ("grasp", 9), ("synflow", 6), ("random-erk", 4)):
        prune(model, pruner, count, seed=0, level=0, batch=lambda: (images, labels), shape=(1, 5))
        assert left(model) == count
