"""Drop and grow, pruning and their schedule, against slow references made of lists and loops."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ER_DST.dynamic import remember, update
from ER_DST.topology import (
    GROWTH,
    METHODS,
    Change,
    Schedule,
    add_to_momentum,
    drop_and_grow,
    prune_globally,
    prune_uniformly,
)
from startsparse.masks import attach_masks, keep_inside, masked_weights, sparse_layers
from startsparse.method import Method
from startsparse.seeding import generator
from startsparse.training import Learner, new_sums, train_epoch

# --- one layer ------------------------------------------------------------------------------------


def slow_drop_and_grow(mask, importance, growth, fraction, allowed):
    """One weight at a time, in lists. Of equal scores, earlier positions stay, and come."""
    mask, allowed = list(mask), [a or m for a, m in zip(allowed, mask)]
    count = math.ceil(fraction * sum(mask))
    for _ in range(count):
        worst = None
        for place, there in enumerate(mask):
            if there and (worst is None or importance[place] <= importance[worst]):
                worst = place
        mask[worst] = False
    for _ in range(count):
        best = None
        for place, there in enumerate(mask):
            if not there and allowed[place] and (best is None or growth[place] > growth[best]):
                best = place
        mask[best] = True
    return mask


@st.composite
def layers(draw):
    """(shape, mask, importance, growth, where weights may grow); small integers have many ties."""
    shape = draw(st.sampled_from([(1, 1), (2, 3), (4, 5), (3, 2, 2, 2), (2, 3, 3, 1), (7, 4)]))
    size = math.prod(shape)
    flags = st.one_of(
        st.lists(st.booleans(), min_size=size, max_size=size),
        st.sampled_from([[True] * size, [False] * size]),
    )
    score = draw(st.sampled_from([st.integers(0, 2), st.floats(0, 9, width=32)]))
    scores = st.lists(score, min_size=size, max_size=size)
    mask, allowed = draw(flags), draw(flags)  # flow preservation may have left what is allowed
    return shape, mask, draw(scores), draw(scores), allowed


# Twentieths: 0.15 * 20 is above 3 in floating point, and 3 weights are meant.
fractions = st.integers(0, 20).map(lambda twentieths: Fraction(twentieths, 20))


@settings(max_examples=300)
@given(layers(), fractions, st.booleans(), st.booleans())
def test_drop_and_grow_is_the_slow_one(layer, fraction, anywhere, last):
    shape, mask, importance, growth, allowed = layer
    if anywhere:
        allowed = [True] * len(mask)
    expected = slow_drop_and_grow(mask, importance, growth, fraction, allowed)
    found, lowest, highest, where = (
        torch.tensor(values, dtype=dtype).view(shape)
        for values, dtype in (
            (mask, torch.bool),
            (importance, torch.float32),
            (growth, torch.float32),
            (allowed, torch.bool),
        )
    )
    if last and len(shape) == 4:
        found, lowest = (t.contiguous(memory_format=torch.channels_last) for t in (found, lowest))
    drop_and_grow(found, lowest, highest, float(fraction), None if anywhere else where)
    assert found.flatten().tolist() == expected
    assert sum(expected) == sum(mask)


@pytest.mark.parametrize("kept", [1, 3, 7, 10, 20, 100, 1000])
@pytest.mark.parametrize("percent", [1, 5, 7, 10, 15, 30, 35, 50, 55, 70, 95])
def test_ceil_of_rate_times_weights_is_dropped(percent, kept):
    mask = torch.arange(2 * kept) < kept
    before = mask.clone()
    drop_and_grow(mask, torch.rand(2 * kept), 1.0 - before.float(), percent / 100)
    assert (before & ~mask).sum() == (mask & ~before).sum() == -(-percent * kept // 100)


def test_what_was_dropped_may_come_back_and_keeps_its_value():
    mask = torch.tensor([True, True, False])
    drop_and_grow(mask, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 5.0, 4.0]), 0.5)
    assert mask.tolist() == [True, True, False]


def test_a_score_that_is_no_number_is_refused():
    for bad in range(2):
        scores = [torch.ones(4), torch.ones(4)]
        scores[bad][3 * bad] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            drop_and_grow(torch.tensor([True, True, False, False]), *scores, 0.5)


# --- networks -------------------------------------------------------------------------------------


def network(seed, density, ties=False, first_dense=False):
    """A convolution and two linear layers in the middle of a training, with gradients."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 4))
    names = ["2", "3"] if first_dense else ["0", "2", "3"]
    at = {name: torch.rand(model[int(name)].weight.shape, generator=draw) for name in names}
    attach_masks(model, {name: uniform < density for name, uniform in at.items()})
    remember(model, GROWTH["momentum"])
    for layer in sparse_layers(model).values():
        values = torch.randn(3, *layer.weight.shape, generator=draw)
        if ties:
            values = values.round()
        layer.weight.data, layer.weight.grad = values[0], values[1]
        if hasattr(layer, "growth_state"):
            layer.growth_state.copy_(values[2])
    keep_inside(model)
    return model


def lists(model, of):
    return {name: of(name, w).flatten().tolist() for name, w, _ in masked_weights(model)}


def masks_of(model):
    return {name: mask.flatten().tolist() for name, _, mask in masked_weights(model)}


def sizes(model):
    return {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}


def slow_global(model, density):
    """Masks of the round(density N) largest weights, of the whole network, as lists."""
    masks, all_sizes = masks_of(model), sizes(model)
    count = round(density * sum(all_sizes.values()))
    count -= sum(size for name, size in all_sizes.items() if name not in masks)
    weights, ranking = lists(model, lambda _, w: w.abs()), []
    for layer, (name, mask) in enumerate(masks.items()):
        for place, there in enumerate(mask):
            if there:
                ranking.append((-weights[name][place], layer, place, name))
    result = {name: [False] * len(mask) for name, mask in masks.items()}
    for _, _, place, name in sorted(ranking)[:count]:
        result[name][place] = True
    return result


def best_of(scores, mask, count):
    """``count`` highest of the mask, the first of equals."""
    order = sorted((-score, place) for place, score in enumerate(scores) if mask[place])
    chosen = {place for _, place in order[:count]}
    return [place in chosen for place in range(len(mask))]


def common_density(left, total, layer_sizes):
    """d with sum(min(left, d size)) = total, exactly: fill up the layer that is full first."""
    level, full = Fraction(0), Fraction(0)
    rest = sorted(left, key=lambda name: Fraction(left[name], layer_sizes[name]))
    while rest:
        room = sum(layer_sizes[name] for name in rest)
        level = (total - full) / room
        if left[rest[0]] >= level * layer_sizes[rest[0]]:
            return level
        full += left[rest.pop(0)]
    return level


seeds, densities = st.integers(0, 9999), st.floats(0, 1)


@settings(max_examples=300)
@given(seeds, densities, densities, st.booleans(), st.booleans())
def test_global_pruning_is_the_slow_one(seed, start, target, ties, first_dense):
    model = network(seed, start, ties, first_dense)
    if first_dense:
        target = 1 / 3 + 2 / 3 * target  # above the share of the dense layer
    before, held = masks_of(model), [mask for _, _, mask in masked_weights(model)]
    expected = slow_global(model, target)
    prune_globally(model, target, "magnitude")
    assert masks_of(model) == expected
    assert all(a is b for a, (_, _, b) in zip(held, masked_weights(model)))
    total, all_sizes = sum(map(sum, masks_of(model).values())), sizes(model)
    dense = all_sizes["0"] if first_dense else 0
    drawn = sum(map(sum, before.values()))
    assert total + dense == min(drawn + dense, round(target * sum(all_sizes.values())))


@settings(max_examples=300)
@given(seeds, densities, densities, st.booleans(), st.booleans())
def test_uniform_pruning_is_the_slow_one(seed, start, target, ties, first_dense):
    model = network(seed, start, ties, first_dense)
    if first_dense:
        target = 1 / 3 + 2 / 3 * target
    before, weights = masks_of(model), lists(model, lambda _, w: w.abs())
    left, all_sizes = {name: sum(mask) for name, mask in before.items()}, sizes(model)
    dense = all_sizes["0"] if first_dense else 0
    total = min(sum(left.values()), round(target * sum(all_sizes.values())) - dense)
    level = common_density(left, total, all_sizes)
    prune_uniformly(model, target, "magnitude")
    counts = {name: sum(mask) for name, mask in masks_of(model).items()}
    assert sum(counts.values()) == total
    for name, mask in masks_of(model).items():
        assert abs(counts[name] - min(left[name], level * all_sizes[name])) < 1
        assert mask == best_of(weights[name], before[name], counts[name])


def test_uniform_pruning_leaves_the_same_density_everywhere():
    model = network(1, 1.0)
    prune_uniformly(model, 0.5, "magnitude")
    assert [int(mask.sum()) for _, _, mask in masked_weights(model)] == [12, 15, 10]


def change(model, method="DST", **changed):
    """An update in place, with the arguments that a test does not care for."""
    values = {"seed": 1, "step": 10, "fraction": 0.4}
    update(model, Change(method, **values | changed))
    return masks_of(model)


@settings(max_examples=300)
@given(
    seeds,
    densities,
    densities,
    fractions,
    st.sampled_from(list(METHODS)),
    st.sampled_from(list(GROWTH)),
    st.booleans(),
    st.booleans(),
)
def test_an_update_is_the_slow_one(seed, start, target, fraction, method, growth, within, ties):
    model = network(seed, start, ties)
    # In the middle of a training there are fewer weights than at first.
    for name, _, mask in masked_weights(model):
        layer = model.get_submodule(name)
        layer.initial_mask |= layer.weight.grad > 1
        assert bool((layer.initial_mask | ~mask).all())
    initial, before = lists(model, lambda n, _: model[int(n)].initial_mask), masks_of(model)
    importance = lists(model, lambda _, w: w.abs())
    score = {
        "gradient": lambda n, w: w.grad.abs(),
        "momentum": lambda n, w: model[int(n)].growth_state.abs(),
        "random": lambda n, w: torch.rand(w.shape, generator=generator(seed, f"grow/{n}", 0, 30)),
    }[growth]
    growing = lists(model, score)

    if method.endswith("_uniform"):
        other = copy.deepcopy(model)
        prune_uniformly(other, target, "magnitude")  # has a reference of its own
        expected = masks_of(other)
    else:
        expected = before if method == "DST" else slow_global(model, target)
    if not method.startswith("GMP"):
        for name, mask in expected.items():
            allowed = initial[name] if within else [True] * len(mask)
            expected[name] = slow_drop_and_grow(
                mask, importance[name], growing[name], fraction, allowed
            )
    weights = {name: weight.detach().clone() for name, weight, _ in masked_weights(model)}
    found = change(
        model,
        method,
        density=target,
        fraction=float(fraction),
        growth=growth,
        within_initial=within,
        seed=seed,
        step=30,
    )
    assert found == expected
    assert all(torch.equal(w, weights[name]) for name, w, _ in masked_weights(model))
    count = sum(map(sum, before.values()))
    if method != "DST":
        count = min(count, round(target * sum(sizes(model).values())))
    else:
        assert {n: sum(m) for n, m in found.items()} == {n: sum(m) for n, m in before.items()}
    assert sum(map(sum, found.values())) == count


def test_the_three_ways_to_grow_differ():
    grown = [change(network(3, 0.4), growth=growth) for growth in GROWTH]
    assert all(a != b for i, a in enumerate(grown) for b in grown[:i])
    counts = [[sum(mask) for mask in masks.values()] for masks in grown]
    assert counts[0] == counts[1] == counts[2]


def test_grown_weights_stay_inside_the_initial_mask():
    model = network(3, 0.6)
    initial = masks_of(model)
    outside = 0
    for step in range(10, 60, 10):
        free = change(copy.deepcopy(model), "GraNet", density=0.3, step=step, growth="random")
        outside += sum(f and not i for n in free for f, i in zip(free[n], initial[n]))
        found = change(
            model, "GraNet", density=0.3, step=step, growth="random", within_initial=True
        )
        assert not any(f and not i for n in found for f, i in zip(found[n], initial[n]))
    assert outside > 0


def test_random_growth_depends_on_seed_step_and_layer_only():
    model = network(3, 0.4)
    first = change(copy.deepcopy(model), growth="random")
    other = network(4, 0.4)  # other gradients and momenta, another state of the global generator
    for (_, weight, mask), (_, value, there) in zip(masked_weights(other), masked_weights(model)):
        weight.data.copy_(value)
        mask.copy_(there)
    torch.rand(3)
    assert change(copy.deepcopy(other), growth="random") == first
    assert change(copy.deepcopy(other), growth="random", seed=2) != first
    assert change(copy.deepcopy(other), growth="random", step=11) != first

    # Two layers alike in all but their name, and one of them in another network.
    pair, alone = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), nn.Sequential(nn.Linear(9, 9))
    for net in (pair, alone):
        for layer in net:
            nn.init.ones_(layer.weight)
        attach_masks(net, {str(i): torch.eye(9) > 0 for i in range(len(net))})
    one, two = change(pair, growth="random").values()
    assert one != two
    assert change(alone, growth="random")["0"] == one


def test_a_layer_with_a_bad_score_is_named():
    for growth in ("gradient", "momentum"):
        model = network(3, 0.4)
        _, weight, mask = list(masked_weights(model))[1]
        place = tuple((~mask).nonzero()[0])
        weight.grad[place] = model[2].growth_state[place] = torch.nan
        with pytest.raises(ValueError, match="^2: growth: a score is NaN"):
            change(model, growth=growth)


# --- gradients of a true loss ---------------------------------------------------------------------


class Batch:
    """The same batches in every epoch."""

    def __init__(self, steps):
        draw = torch.Generator().manual_seed(5)
        self.data = [
            (torch.randn(12, 6, generator=draw), torch.randint(3, (12,), generator=draw))
            for _ in range(steps)
        ]

    def __len__(self):
        return len(self.data)

    def epoch(self, _, start=0):
        yield from self.data[start:]


def small(density=0.3):
    """A masked network and the same as a function of plain weights."""
    draw = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    for layer in (model[0], model[2]):
        values = torch.randn(layer.weight.shape, generator=draw, dtype=torch.float64)
        layer.weight.data = values
        nn.init.zeros_(layer.bias)
    attach_masks(
        model,
        {n: torch.rand(model[int(n)].weight.shape, generator=draw) < density for n in ("0", "2")},
    )
    remember(model, GROWTH["momentum"])
    return model


def plain_gradients(model, images, labels):
    """dL/dw of every weight by autograd, of a network that knows nothing of masks."""
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    first, first_bias, last, last_bias = values
    logits = F.linear(torch.tanh(F.linear(images, first, first_bias)), last, last_bias)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    found = torch.autograd.grad(loss, [first, last])
    return dict(zip(("0", "2"), found))


def train(model, batches, look):
    """One epoch of the true loop."""
    method, optimizer = Method(), torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    method.after_backward = lambda step, _model, _optimizer: look(step)
    learner = Learner(model, optimizer, label_smoothing=0.1)
    sums = new_sums(torch.device("cpu"))
    train_epoch(learner, batches, lambda _: 0.5, sums, epoch=0, method=method)


def largest_outside(scores, before, fraction):
    """(layer, place) of what must come when nothing that was there may come back."""
    expected = set()
    for name, score in scores.items():
        count = math.ceil(fraction * sum(before[name]))
        free = [(-abs(s), p) for p, s in enumerate(score) if not before[name][p]]
        expected |= {(name, place) for _, place in sorted(free)[:count]}
    return expected


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_growth_takes_the_largest_dense_gradients_and_their_sums(growth):
    """By autograd through a network without masks, on the same batches."""
    model, batches = small(), Batch(4)
    batches.data = [(x.double(), y) for x, y in batches.data]
    sums, updates = {"0": [0.0] * 54, "2": [0.0] * 27}, []

    def look(step):
        gradients = plain_gradients(model, *batches.data[step])
        for name, total in sums.items():
            values = gradients[name].flatten().tolist()
            for place, value in enumerate(values):
                total[place] = 0.9 * total[place] + value
        add_to_momentum(model, 0.9)
        for name, total in sums.items():
            momentum = model[int(name)].growth_state.flatten().tolist()
            assert momentum == pytest.approx(total, rel=1e-9, abs=1e-14)
        if step % 2 == 0:
            return
        scores = sums if growth == "momentum" else {}
        scores = scores or {name: g.flatten().tolist() for name, g in gradients.items()}
        before, weights = masks_of(model), lists(model, lambda _, w: w.abs())
        importance, found = weights, change(model, fraction=0.25, growth=growth)
        for name, mask in found.items():
            expected = slow_drop_and_grow(
                before[name],
                importance[name],
                [abs(value) for value in scores[name]],
                0.25,
                [True] * len(mask),
            )
            assert mask == expected
        grown = {
            (name, place)
            for name, mask in found.items()
            for place, there in enumerate(mask)
            if there and not before[name][place]
        }
        assert grown <= largest_outside(scores, before, 0.25)
        updates.append(len(grown))
        keep_inside(model)

    train(model, batches, look)
    assert len(updates) == 2
    assert sum(updates) > 3


# --- when -----------------------------------------------------------------------------------------


def plan(**changed):
    values = {
        "steps": 100,
        "per_epoch": 10,
        "every": 7,
        "start": 20,
        "end": 60,
        "stop": 100,
        "initial": 0.5,
        "final": 0.1,
        "fraction": 0.5,
        "prunes": True,
    }
    return Schedule(**values | changed)


def test_the_density_is_cubic_between_start_and_end():
    schedule = plan()
    assert [schedule.density(step) for step in (0, 20)] == [0.5, 0.5]
    # 1 - progress is 3/4, 1/2, 1/4; cubed: 27, 8 and 1 of 64 parts
    cubed = {30: 27 / 64, 40: 8 / 64, 50: 1 / 64, 60: 0}
    for step, share in cubed.items():
        assert schedule.density(step) == pytest.approx(0.1 + 0.4 * share, rel=1e-12)
    assert [schedule.density(step) for step in (60, 61, 99)] == [0.1, 0.1, 0.1]


@given(st.integers(0, 50), st.integers(1, 50), st.floats(1e-3, 1), st.floats(0, 1))
def test_the_density_falls_from_the_initial_to_exactly_the_final_one(start, length, initial, part):
    end, final = start + length, part * initial
    schedule = plan(start=start, end=end, initial=initial, final=final)
    values = [schedule.density(step) for step in range(110)]
    assert values[: start + 1] == pytest.approx([initial] * (start + 1))
    assert values[end:] == [final] * (110 - end)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


def test_updates_come_at_multiples_and_at_the_end_of_the_pruning():
    due = [step for step in range(100) if plan().due(step)]
    assert due == [7, 14, 21, 28, 35, 42, 49, 56, 60, 63, 70, 77, 84, 91, 98]
    assert [step for step in range(100) if plan(prunes=False).due(step)] == list(range(7, 100, 7))
    assert [step for step in range(100) if plan(every=1000).due(step)] == [60]
    assert [step for step in range(100) if plan(every=1000, prunes=False).due(step)] == []
    assert [step for step in range(100) if plan(every=30).due(step)] == [30, 60, 90]


@pytest.mark.parametrize(
    ("changed", "due"),
    [
        ({"stop": 75, "prunes": False}, [20, 40, 60]),
        ({"stop": 60, "prunes": False}, [20, 40]),  # RigL moves masks in steps before T_end
        ({"stop": 61, "prunes": False}, [20, 40, 60]),
        ({"stop": 5, "prunes": False}, []),
        ({"stop": 75, "end": 50}, [20, 40, 50, 60]),
        ({"stop": 30, "end": 70}, [20, 40, 60, 70]),  # pruning goes on
        ({"stop": 30, "end": 80}, [20, 40, 60, 80]),
        ({"stop": 0, "end": 50}, [20, 40, 50]),
    ],
)
def test_updates_end_with_drop_and_grow_or_pruning_whichever_is_later(changed, due):
    schedule = plan(every=20, **changed)
    assert [step for step in range(100) if schedule.due(step)] == due
    for step in due:
        assert (schedule.drop_fraction(step) > 0) == (step < schedule.stop)


def test_the_drop_fraction_is_a_cosine_down_to_a_two_hundredth():
    schedule = plan()
    assert schedule.drop_fraction(0) == pytest.approx(0.5)
    assert schedule.drop_fraction(50) == pytest.approx((0.5 + 0.005) / 2)
    assert schedule.drop_fraction(99) == pytest.approx(0.005, rel=0.03)
    for step in range(100):
        angle = math.pi * step / 100
        expected = 0.005 + 0.5 * (0.5 - 0.005) * (1 + math.cos(angle))
        assert schedule.drop_fraction(step) == pytest.approx(expected)
    short = plan(stop=75)  # as RigL: down to the stop, and nothing from there on
    for step in range(75):
        expected = 0.005 + 0.5 * (0.5 - 0.005) * (1 + math.cos(math.pi * step / 75))
        assert short.drop_fraction(step) == pytest.approx(expected)
    assert [short.drop_fraction(step) for step in range(75, 100)] == [0] * 25
    assert [plan(fraction=0.002).drop_fraction(step) for step in (0, 50, 99)] == [0.002] * 3
    assert [plan(fraction=0).drop_fraction(step) for step in (0, 50, 99)] == [0] * 3


@pytest.mark.parametrize("end", [0, 5])
def test_a_pruning_of_no_steps_reaches_the_final_density_at_once(end):
    schedule = plan(start=end, end=end, every=1000)
    assert [step for step in range(10) if schedule.due(step)] == [end]
    assert schedule.density(end) == schedule.density(end + 1) == 0.1
    if end:
        assert schedule.density(end - 1) == 0.5
