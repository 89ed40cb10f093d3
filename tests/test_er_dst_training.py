"""Training whose masks move: optimizer state, counts, densities, flow, and what is written down."""

import math

import pytest
import torch
from dst_runs import (
    CPU,
    STEPS,
    WEIGHTS,
    begin,
    counts,
    dead_units,
    masks,
    options,
    some_data,
    train,
    watched,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ER_DST import main as script
from ER_DST.checks import warn_of_thin_start
from ER_DST.dynamic import phase, preserve_flow, update
from ER_DST.options import FLOW
from ER_DST.topology import GROWTH, METHODS, Change
from startsparse import checkpoint, flops, flow
from startsparse.errors import UserError
from startsparse.masks import attach_masks, draw_masks, keep_inside, masked_weights, sparse_layers
from startsparse.trainer import Trainer

PRUNE = [method for method in METHODS if METHODS[method].prune]


def states(optimizer, weight):
    """Momentum or moments of a weight."""
    found = optimizer.state[weight]
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    return [found[name] for name in names if found.get(name) is not None]


# --- weights and optimizer state ------------------------------------------------------------------


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("method", ["DST", "GraNet"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("compute", ["off", "on"])
def test_dropped_and_grown_weights_have_neither_value_nor_momentum(
    tmp_path, compute, optimizer, method, growth
):
    seen = {"dropped": 0, "grown": 0, "moved": 0, "kept": 0}
    new, trainers = {}, []

    def look(trainer, step, before):
        trainers[:] = [trainer]
        for name, weight, mask in masked_weights(trainer.model):
            held = states(trainer.optimizer, weight)
            assert len(held) == (1 if optimizer == "sgd" else 2)
            grown, gone = mask & ~before[name], before[name] & ~mask
            for values in (weight, *held):
                assert (values[~mask] == 0).all()
                assert (values[grown] == 0).all()
            seen["kept"] += int((held[-1][mask & before[name]] != 0).sum())
            seen["dropped"] += int(gone.sum())
            seen["grown"] += int(grown.sum())
            new[name] = grown

    def after_step(_, *__):
        if not new:  # the sparse form may have no weights outside the masks
            return
        for name, weight, mask in masked_weights(trainers[0].model):
            values = [weight, *states(trainers[0].optimizer, weight)]
            assert all((v[~mask] == 0).all() for v in values)
            seen["moved"] += sum(int((v[new[name]] != 0).sum()) for v in values)
        new.clear()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        asked = options(
            optimizer=optimizer,
            method=method,
            growth=growth,
            final_density=0.2,
            sparse_compute=compute,
        )
        train(tmp_path, asked, look)
    finally:
        hook.remove()
    assert seen.pop("moved") == 0  # the gradient that chose a weight does not move it
    assert min(seen.values()) > 0


@pytest.mark.parametrize("method", ["DST", "GraNet"])
def test_an_update_moves_what_stays_and_the_next_step_what_has_come(tmp_path, method):
    """Nesterov SGD weight by weight: v = m v + g, w = w - lr (g + m v), g with weight decay."""
    asked = options(method=method, final_density=0.2, lr=0.1, lr_policy="constant", epochs=3)
    trainer, whole = begin(tmp_path, asked)
    decay, momentum, rate = asked.weight_decay, asked.momentum, asked.lr
    plain = {name: weight.detach().clone() for name, weight, _ in masked_weights(trainer.model)}
    velocity = {name: torch.zeros_like(value) for name, value in plain.items()}
    arrived = 0

    def look(_step, make):
        nonlocal arrived
        before = masks(trainer.model)
        for name, weight, _ in masked_weights(trainer.model):  # as the steps so far have left it
            torch.testing.assert_close(weight.detach(), plain[name])
        gradients = {n: w.grad.clone() for n, w, _ in masked_weights(trainer.model)}
        make()
        for name, mask in masks(trainer.model).items():
            arrived += int((mask & ~before[name]).sum())
            w, v, g = plain[name].view(-1), velocity[name].view(-1), gradients[name].view(-1)
            for i, (was, now) in enumerate(zip(before[name].view(-1), mask.view(-1))):
                if was and now:
                    slope = g[i] + decay * w[i]
                    v[i] = momentum * v[i] + slope
                    w[i] -= rate * (slope + momentum * v[i])
                else:
                    w[i] = v[i] = 0

    trainer.run_phases([watched(whole, look)])
    assert arrived > 0
    for name, weight, _ in masked_weights(trainer.model):
        torch.testing.assert_close(weight.detach(), plain[name])


def test_momentum_for_growth_sums_the_dense_gradients_of_every_step(tmp_path):
    asked = options(method="DST", growth="momentum", momentum=0.7, optimizer="adam")
    trainer, whole = begin(tmp_path, asked)
    sums, outside = {}, 0

    def look(_step, make):
        nonlocal outside
        for name, weight, mask in masked_weights(trainer.model):
            sums[name] = 0.7 * sums.get(name, 0.0) + weight.grad
            outside += int((weight.grad[~mask] != 0).sum())
        make()

    trainer.run_phases([watched(whole, look)])
    assert outside > 0
    for name, layer in sparse_layers(trainer.model).items():
        torch.testing.assert_close(layer.growth_state, sums[name])


def test_a_gradient_that_is_no_number_is_one_line(tmp_path):
    trainer, whole = begin(tmp_path, options(method="DST"))

    def poisoned(step, make):
        _, weight, mask = next(masked_weights(trainer.model))
        if step == 2:
            weight.grad[tuple((~mask).nonzero()[0])] = torch.nan
        make()

    message = r"^--growth: at step 3: hidden\.0: growth: a score is NaN$"
    with pytest.raises(UserError, match=message):
        trainer.run_phases([watched(whole, poisoned)])


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", GROWTH)
def test_the_number_of_weights_per_layer_never_changes_in_dst(tmp_path, growth):
    seen, moved = [], []

    def look(trainer, step, before):
        seen.append(counts(trainer.model))
        moved.append(any((mask != before[n]).any() for n, mask in masks(trainer.model).items()))
        row = trainer.tables["topology"][-1]
        assert all(row[f"dropped/{name}"] == row[f"grown/{name}"] for name in before)
        assert row["dropped"] == row["grown"] == sum(row[f"grown/{name}"] for name in before)

    asked = options(method="DST", growth=growth, epochs=3, update_frequency=1)
    first = counts(begin(tmp_path, asked)[0].model)
    trainer = train(tmp_path, asked, look)
    assert seen == [first] * (3 * STEPS - 1)
    assert sum(moved) > STEPS
    assert counts(trainer.model) == first
    assert {row["density"] for row in trainer.tables["topology"]} == {sum(first.values()) / WEIGHTS}


# 24 steps, an update every 5. Pruning starts with epoch 1, at step 4, and ends after 110/160 of 6
# epochs, at step 16.5, which is rounded to 16.
CUBIC = {
    5: 0.1 + 0.4 * (11 / 12) ** 3,
    10: 0.1 + 0.4 * (6 / 12) ** 3,
    15: 0.1 + 0.4 * (1 / 12) ** 3,
    16: 0.1,
    20: 0.1,
}


@pytest.mark.parametrize("method", PRUNE)
@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_densities_follow_the_cubic_schedule_exactly(tmp_path, method, sampling):
    asked = options(
        method=method,
        final_density=0.1,
        epochs=6,
        update_frequency=5,
        init_prune_epoch=1,
        er_sampling=sampling,
    )
    kept = []
    trainer = train(tmp_path, asked, lambda t, *_: kept.append(sum(counts(t.model).values())))
    rows = trainer.tables["topology"]
    first = rows[0]["dropped"] - rows[0]["grown"] + kept[0]
    assert [row["step"] for row in rows] == list(CUBIC)
    assert kept == [min(first, round(density * WEIGHTS)) for density in CUBIC.values()]
    assert [row["density"] for row in rows] == [count / WEIGHTS for count in kept]
    assert [row["epoch"] for row in rows] == [2, 3, 4, 5, 6]
    if sampling == "exact":
        assert first == WEIGHTS // 2


@pytest.mark.parametrize("method", PRUNE)
@pytest.mark.parametrize(
    ("short", "steps"),
    [
        ({"epochs": 1, "update_frequency": 1000}, [3]),  # 110/160 of an epoch of 4 steps
        ({"epochs": 1, "update_frequency": 2, "final_prune_epoch": 1}, [2, 3]),
        ({"epochs": 3, "update_frequency": 7, "init_prune_epoch": 2}, [7, 8]),
        ({"epochs": 3, "update_frequency": 100, "final_prune_epoch": 3}, [11]),
    ],
)
def test_short_runs_end_at_exactly_the_final_density(tmp_path, method, short, steps):
    for seed in (1, 2):
        trainer = train(tmp_path, options(method=method, final_density=0.07, seed=seed, **short))
        assert sum(counts(trainer.model).values()) == round(0.07 * WEIGHTS)
        assert [row["step"] for row in trainer.tables["topology"]] == steps


def test_a_training_of_one_step_ends_at_the_final_density(tmp_path):
    trainer, _ = begin(tmp_path, options(final_density=0.1, epochs=1))
    batches = trainer.data.train
    batches.batch_size = batches.examples
    assert len(batches) == 1
    trainer.run_phases([phase(trainer.options, 1)])
    assert sum(counts(trainer.model).values()) == round(0.1 * WEIGHTS)


def test_a_dense_layer_stays_dense_and_counts(tmp_path):
    asked = options(
        first_layer_dense=True, er_sparse_init=0.8, final_density=0.5, update_frequency=1
    )
    kept = []

    def look(trainer, step, before):
        assert "hidden.0" not in before
        kept.append(128 + sum(counts(trainer.model).values()))

    trainer = train(tmp_path, asked, look)
    assert not hasattr(trainer.model.hidden[0], "weight_mask")
    assert kept[-1] == WEIGHTS // 2
    assert [row["density"] for row in trainer.tables["topology"]] == [k / WEIGHTS for k in kept]
    assert (trainer.model.hidden[0].weight != 0).all()


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("method", ["DST", "GraNet"])
def test_nothing_is_dropped_and_grown_after_the_stop(tmp_path, method, growth):
    """24 steps, of which the first 9 drop and grow; pruning goes on to step 16.5."""
    asked = {"method": method, "growth": growth, "final_density": 0.1, "epochs": 6}
    asked |= {"update_frequency": 2, "stop_updates": 9 / 24, "prune_rate": 0.4}
    rows = train(tmp_path, options(**asked)).tables["topology"]
    assert [row["step"] for row in rows] == [2, 4, 6, 8] + [10, 12, 14, 16] * (method == "GraNet")
    cosine = [0.005 + 0.5 * 0.395 * (1 + math.cos(math.pi * step / 9)) for step in (2, 4, 6, 8)]
    assert [row["drop_fraction"] for row in rows] == pytest.approx(cosine + [0] * len(rows[4:]))
    assert [row["grown"] > 0 for row in rows] == [True] * 4 + [False] * len(rows[4:])
    if method == "GraNet":
        assert [row["dropped"] > 0 for row in rows[4:7]] == [True] * 3
        assert rows[-1]["density"] == round(0.1 * WEIGHTS) / WEIGHTS


@pytest.mark.parametrize("growth", GROWTH)
def test_dense_gradients_are_paid_for_up_to_the_stop_only(tmp_path, growth):
    """A mask of fixed counts: FLOPs of 24 steps, and of the dense gradients of some of them."""
    asked = options(method="DST", growth=growth, epochs=6, update_frequency=3, stop_updates=10 / 24)
    trainer = train(tmp_path, asked)
    moving = phase(
        asked, STEPS
    ).method.moves_masks  # steps that sparse compute leaves to the masked network
    assert [step for step in range(24) if moving(step)] == [3, 6, 9]
    density = flops.densities(trainer.model)
    outside = flops.dense_gradients(trainer.ledger.forward, density)
    assert outside > 0
    times = {"random": 0, "gradient": 3, "momentum": 10}[growth]
    spent = 24 * flops.training(trainer.ledger.forward, density) + times * outside
    assert trainer.ledger.training == pytest.approx(spent)


# --- flow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("method", METHODS)
def test_flow_preservation_leaves_no_dead_unit(tmp_path, monkeypatch, method, growth):
    """Units need 16 + 8 + 8 + 8 = 40 weights; 0.16 has 46, which a pruning puts where it will."""
    repairs, repair = [], flow.repair

    def watched(model, *args, **kwargs):
        before, dead = counts(model), dead_units(model)
        more = repair(model, *args, **kwargs)
        repairs.append((dead, before, more))
        return more

    monkeypatch.setattr(flow, "repair", watched)

    def look(trainer, step, before):
        now, (_, unrepaired, more) = counts(trainer.model), repairs[-1]
        assert dead_units(trainer.model) == 0
        assert trainer.tables["topology"][-1]["dead_units"] == 0
        assert now == {name: count + more.get(name, 0) for name, count in unrepaired.items()}
        for name, _, mask in masked_weights(trainer.model):
            assert more.get(name, 0) == max(0, flow.needed(mask.shape) - unrepaired[name])
        scheduled = trainer.tables["topology"][-1]["density"] * WEIGHTS - sum(more.values())
        if method != "DST" and step >= 6:
            assert scheduled == pytest.approx(round(0.16 * WEIGHTS))

    asked = options(
        method=method,
        growth=growth,
        er_sparse_init=0.16 if method == "DST" else 0.3,
        final_density=0.16,
        flow_preservation="always",
        update_frequency=1,
        seed=2,
        lr=1.0,
    )
    trainer = train(tmp_path, asked, look)
    assert len(repairs) == 2 * STEPS  # at the start and before every step but the first
    assert sum(dead > 0 for dead, *_ in repairs) > 1
    assert trainer.tables["topology"][-1]["density"] == pytest.approx(0.16, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_flow_preservation_true_repairs_the_initial_mask_only(tmp_path, monkeypatch, method):
    steps, repair = [], flow.repair

    def watched(model, seed, step, **kwargs):
        steps.append(step)
        return repair(model, seed, step, **kwargs)

    monkeypatch.setattr(flow, "repair", watched)
    asked = {"method": method, "er_sparse_init": 0.2, "final_density": 0.1, "seed": 2}
    asked |= {"growth": "random", "update_frequency": 1}
    assert dead_units(begin(tmp_path, options(**asked))[0].model) > 0
    assert dead_units(begin(tmp_path, options(**asked, flow_preservation="True"))[0].model) == 0
    trainer = train(tmp_path, options(**asked, flow_preservation="True"))
    assert steps == [0, 0]  # of the two networks
    assert trainer.tables["topology"][-1]["dead_units"] == dead_units(trainer.model) > 0


def test_repair_does_not_undo_growth():
    """Of the edges that make room for others, as many have just been grown as chance has it."""
    removed, new, expected = 0, 0, 0.0
    settings = {"density": 1.0, "prune": "magnitude", "growth": "random", "within_initial": False}
    for seed in range(20):
        model = nn.Sequential(nn.Linear(100, 100))
        attach_masks(model, draw_masks({"0": (100, 100)}, [0.03], seed, "exact"))
        keep_inside(model)
        old = masks(model)["0"]
        update(model, Change("DST", fraction=0.5, seed=seed, step=7, **settings))
        moved = masks(model)["0"]
        preserve_flow(model, seed, step=7)
        gone = moved & ~masks(model)["0"]
        spare = moved & (moved.sum(0) > 1) & (moved.sum(1, keepdim=True) > 1)
        removed += int(gone.sum())
        new += int((gone & ~old).sum())
        expected += float(gone.sum() * (spare & ~old).sum() / spare.sum())
    assert removed > 100
    assert abs(new - expected) < 3 * (removed / 4) ** 0.5


def test_without_it_units_die(tmp_path):
    trainer = train(tmp_path, options(final_density=0.1, update_frequency=1))
    assert trainer.tables["topology"][-1]["dead_units"] == dead_units(trainer.model) > 0


# --- topology.csv ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preserved", FLOW)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("method", ["DST", "GraNet", "GMP"])
def test_a_row_says_where_the_masks_are_and_have_been(tmp_path, method, within, preserved):
    asked = options(
        method=method,
        growth="random",
        final_density=0.2,
        update_frequency=1,
        flow_preservation=preserved,
        grow_within_init=within,
    )

    def places(found):
        return {(n, *place) for n, mask in found.items() for place in mask.nonzero().tolist()}

    initial = places(masks(begin(tmp_path, asked)[0].model))
    ever, last = set(initial), 0.0

    def look(trainer, step, before):
        nonlocal ever, last
        old, new, row = places(before), places(masks(trainer.model)), trainer.tables["topology"][-1]
        ever |= new
        assert row["ever_active"] == len(ever) / WEIGHTS
        assert row["inside_initial"] == len(new & initial) / len(new)
        assert (row["dropped"], row["grown"]) == (len(old - new), len(new - old))
        for name in before:
            part = [{place for place in s if place[0] == name} for s in (old - new, new - old)]
            assert [row[f"{what}/{name}"] for what in ("dropped", "grown")] == list(map(len, part))
        assert row["ever_active"] >= last
        last = row["ever_active"]
        assert row["step"] == step
        if preserved != "always" and (within or method == "GMP"):
            assert new <= initial

    trainer = train(tmp_path, asked, look)
    rows = trainer.tables["topology"]
    assert len(rows) == 2 * STEPS - 1
    if method != "GMP" and not within:
        assert rows[-1]["ever_active"] > len(initial) / WEIGHTS
        assert rows[-1]["inside_initial"] < 1


def test_the_drop_fraction_is_written_down(tmp_path):
    asked = options(method="DST", prune_rate=0.3, update_frequency=4)
    rows = train(tmp_path, asked).tables["topology"]
    assert [row["drop_fraction"] for row in rows] == [pytest.approx((0.3 + 0.005) / 2)]
    rows = train(tmp_path, options(method="GMP")).tables["topology"]
    assert {row["drop_fraction"] for row in rows} == {0.0}


# --- the best epoch -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "best"),
    [
        ({"epochs": 8}, 6),  # 110/160 of 8 epochs is 5.5: step 22 is in epoch 6
        ({"epochs": 8, "final_prune_epoch": 3}, 4),  # reached by the first step of epoch 4
        ({"epochs": 8, "final_prune_epoch": 8, "update_frequency": 100}, 8),
        ({"epochs": 1}, 1),
        ({"epochs": 3, "method": "DST"}, 1),
        ({"epochs": 3, "is_prune": False}, 1),
    ],
)
def test_no_epoch_before_the_final_density_is_the_best(tmp_path, monkeypatch, asked, best):
    accuracies = [1 - epoch / 100 for epoch in range(8)]  # the denser, the better
    monkeypatch.setattr(
        Trainer,
        "evaluate",
        lambda self, _: {"loss": 1.0, "accuracy": accuracies[len(self.history)]},
    )
    trainer = train(tmp_path, options(final_density=0.1, **asked))
    assert trainer.candidates.best["epoch"] == best
    state = checkpoint.load(tmp_path / "best.pt", CPU)["model"]
    kept = sum(int(mask.sum()) for name, mask in state.items() if name.endswith("weight_mask"))
    assert kept == sum(counts(trainer.model).values())
    if trainer.options.prunes:
        assert kept == round(0.1 * WEIGHTS)


@pytest.mark.parametrize(
    ("final", "budget", "said"), [(0.49, "clip", 1), (0.49, "exact", 0), (0.48, "clip", 0)]
)
def test_a_final_density_above_a_clipped_start_is_said(caplog, final, budget, said):
    """By hand: 0.5 of 288 is 36 a layer, the last one has 32; clipped, that is 140 or 0.486."""
    asked = options(
        er_sparse_method="balanced", er_budget=budget, er_sampling="exact", final_density=final
    )
    model, *_ = script.network(asked, some_data(), CPU)
    warn_of_thin_start(model, asked)
    line = f"warning: --final-density: {final:g} is above the {140 / 288:.6f} that the mask has; "
    assert [line in message for message in caplog.messages].count(True) == said
