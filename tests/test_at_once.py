"""The update of all layers at once, as on GPUs, against the one layer by layer, here on the CPU."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ER_DST import at_once
from ER_DST.dynamic import move, remember
from ER_DST.joined import Joined
from ER_DST.topology import GROWTH, METHODS, Change
from startsparse.masks import attach_masks, keep_inside, masked_weights, nnz, sparse_layers


def network(seed, density, ties=False, large=False, device="cpu"):
    """A network in the middle of a training, with gradients and momentum; some layers span rows."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 40 if large else 4, 3),
        nn.Conv2d(40 if large else 4, 5, 1),
        nn.Conv2d(5, 6, 2),
        nn.Flatten(),
        nn.Linear(24, 50 if large else 5),
        nn.Linear(50 if large else 5, 4),
    )
    model.to(memory_format=torch.channels_last)
    names = [name for name in sparse_layers(model) if name != "2"]  # which stays dense
    shapes = {name: sparse_layers(model)[name].weight.shape for name in names}
    attach_masks(model, {n: torch.rand(s, generator=draw) < density for n, s in shapes.items()})
    remember(model, GROWTH["momentum"])
    for parameter in model.parameters():
        parameter.grad = nn.init.zeros_(torch.empty_like(parameter))
        nn.init.zeros_(parameter)
    for layer in sparse_layers(model).values():
        values = torch.randn(3, *layer.weight.shape, generator=draw)
        if ties:
            values = values.round()
        layer.weight.data.copy_(values[0])
        layer.weight.grad = torch.empty_like(layer.weight).copy_(values[1])
        if hasattr(layer, "growth_state"):
            layer.growth_state.copy_(values[2])
            layer.initial_mask |= torch.rand(layer.weight.shape, generator=draw) < 0.2
    keep_inside(model)
    gradients = [parameter.grad.to(device) for parameter in model.parameters()]
    model.to(device)
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0, momentum=0.9)
    optimizer.step()  # which has momentum now
    return model, optimizer


def as_on_a_gpu(model, optimizer, change):
    with patch.object(at_once, "possible", lambda *_: True):
        return move(model, optimizer, change)


def copied(model):
    """With its gradients."""
    copy_ = copy.deepcopy(model)
    for parameter, mine in zip(model.parameters(), copy_.parameters()):
        mine.grad = parameter.grad
    return copy_


@settings(max_examples=60)
@given(
    st.integers(0, 9999),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 20).map(lambda twentieths: twentieths / 20),
    st.sampled_from(list(METHODS)),
    st.sampled_from(["gradient", "momentum"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_it_is_the_update_layer_by_layer(
    seed, start, target, fraction, method, growth, within, flow, ties
):
    one, other = (network(seed, start, ties, large=seed % 2 == 1) for _ in range(2))
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(one[0]).items()}
    dense = sizes["2"] / sum(sizes.values())
    change = Change(
        method, seed, 30, dense + (1 - dense) * target, fraction, "magnitude", growth, within, flow
    )
    expected, found = move(*one, change), as_on_a_gpu(*other, change)
    assert found == expected
    (model, optimizer), (same, its) = one, other
    for (name, tensor), mine in zip(model.state_dict().items(), same.state_dict().values()):
        assert torch.equal(tensor, mine), name
    for parameter, mine in zip(model.parameters(), same.parameters()):
        assert torch.equal(parameter.grad, mine.grad)
        states = optimizer.state[parameter], its.state[mine]
        assert torch.equal(*(state["momentum_buffer"] for state in states))
    assert nnz(model) == nnz(same)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("flow", [False, True])
def test_a_gpu_moves_masks_as_the_cpu_does(method, growth, flow):
    one, other = (network(5, 0.6, large=True, device=where) for where in ("cpu", "cuda:0"))
    for step, density in enumerate((0.5, 0.4)):
        change = Change(method, 1, step, density, 0.3, "magnitude", growth, False, flow)
        expected, found = move(*one, change), move(*other, change)
        assert found["density"] == expected["density"]
        if growth != "random":
            assert found == expected
    for (name, mask), its in zip(one[0].state_dict().items(), other[0].state_dict().values()):
        if growth != "random":
            assert torch.equal(mask, its.cpu()), name


@pytest.mark.parametrize("method", METHODS)
def test_random_growth_keeps_the_counts_and_the_rest(method):
    one, other = network(1, 0.4), network(1, 0.4)
    change = Change(method, 1, 30, density=0.6, fraction=0.5, growth="random", within_initial=True)
    expected, found = move(*one, change), as_on_a_gpu(*other, change)
    assert found["density"] == expected["density"]
    assert {k: nnz(one[0])[k] for k in nnz(one[0])} == nnz(other[0])
    for name, _, mask in masked_weights(other[0]):
        assert not (mask & ~other[0].get_submodule(name).initial_mask).any()


def test_random_growth_is_uniform_and_independent_of_nothing_but_seed_and_step():
    """A chi-square test of the positions that come, of layers that lie channels last and not."""
    first, optimizer = network(3, 0.4)
    before = {name: mask.clone() for name, _, mask in masked_weights(first)}
    for _, weight, mask in masked_weights(first):
        weight.data.copy_(mask)  # all alike, so that the last of them go
    grown = {name: torch.zeros(mask.shape) for name, mask in before.items()}
    repeats = 200
    for step in range(repeats):
        model = copied(first)
        as_on_a_gpu(model, optimizer, Change("DST", 1, step, fraction=0.2, growth="random"))
        for name, _, mask in masked_weights(model):
            grown[name] += mask & ~before[name]
    for name, counts in grown.items():
        free = counts[~before[name]]
        # Those dropped may come back, and all free places are alike.
        expected = free.mean()
        statistic = float(((free - expected) ** 2 / expected).sum())
        size = len(free)
        assert abs(statistic - size) < 5 * math.sqrt(2 * size), name
    same = [copied(first) for _ in range(3)]
    for model, seed in zip(same, (1, 1, 2)):
        as_on_a_gpu(model, optimizer, Change("DST", seed, 7, fraction=0.5, growth="random"))
    alike = [all(torch.equal(a[2], b[2]) for a, b in zip(*map(masked_weights, pair)))
             for pair in (same[:2], same[1:])]  # fmt: skip
    assert alike == [True, False]


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_a_layer_with_a_bad_score_is_named_and_nothing_has_changed(growth):
    for where, said in (("weight", "importance"), ("growth", "growth")):
        model, optimizer = network(3, 0.4)
        _, weight, mask = list(masked_weights(model))[1]
        if where == "weight":
            weight.data[tuple(mask.nonzero()[0])] = torch.nan
        else:
            place = tuple((~mask).nonzero()[0])
            weight.grad[place] = model[1].growth_state[place] = torch.nan
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"^1: {said}: a score is NaN"):
            as_on_a_gpu(model, optimizer, Change("DST", 1, 7, fraction=0.5, growth=growth))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_a_rule_of_ones_own_may_give_any_scores_in_any_layout():
    """Below 0, infinite, and contiguous where weights are channels last."""

    def score(layers, _):
        gradients = [layer.weight.grad for layer in layers]
        return [torch.where(g > 0, g.log(), -torch.inf).contiguous() for g in gradients]

    with patch.dict(GROWTH, own=GROWTH["gradient"]._replace(score=score)):
        one, other = network(5, 0.3), network(5, 0.3)
        change = Change("DST", 1, 3, fraction=0.5, growth="own")
        assert move(*one, change) == as_on_a_gpu(*other, change)
    for a, b in zip(*map(masked_weights, (one[0], other[0]))):
        assert torch.equal(a[2], b[2])


def test_joined_is_split_as_it_was():
    model, _ = network(1, 0.5, large=True)
    weights = [weight.detach() for _, weight, _ in masked_weights(model)]
    joined = Joined(weights)
    both = joined.join(weights, weights)
    flat = both[1]
    for weight, back, part in zip(2 * weights, joined.split(both), 2 * joined.parts(flat)):
        assert torch.equal(back, weight)
        assert back.is_contiguous(memory_format=torch.channels_last) or weight.dim() == 2
        assert torch.equal(part, weight)
        assert part.is_contiguous()
    assert joined.count(flat > 0).tolist() == [int((weight > 0).sum()) for weight in weights]
