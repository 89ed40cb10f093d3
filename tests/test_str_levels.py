"""Pruning levels from end to end: counts, masks and starts from other runs."""

import dataclasses
import itertools
import json

import pandas as pd
import pytest
import torch
from script_runs import MLP, TINY, same, weights

from startsparse import checkpoint
from startsparse.data import SHAPES
from startsparse.errors import OptionError
from startsparse.masks import masked_weights
from startsparse.schedules import geometric
from startsparse.trainer import Trainer
from STR import iterative
from STR import main as script
from STR.options import STROptions

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_levels_prune_to_exactly_what_was_asked(run):
    folder = run(
        *MLP,
        "--er-sparse-init",
        "0.5",
        "--threshold-list",
        "0.3",
        "0.1",
        "0.01",
        "--final_prune_epoch",
        "2",
        "--warmup-epochs",
        "1",
    )
    epochs = pd.read_csv(folder / "epochs.csv")
    assert epochs["phase"].tolist() == [
        "warm-up",
        *["level 0"] * 2,
        *["level 1"] * 2,
        *["level 2"] * 2,
        "final",
    ]
    total = json.loads((folder / "summary.json").read_text())["weights"]
    kept = (epochs["density"] * total).round().astype(int)
    assert kept[3:].tolist() == [round(p * total) for p in (0.3, 0.3, 0.1, 0.1, 0.01)]
    assert kept[0] == pytest.approx(0.5 * total, rel=0.05)
    result = json.loads((folder / "summary.json").read_text())
    assert result["requested"] == 0.01
    levels = pd.read_csv(folder / "levels.csv")
    assert levels["level"].tolist() == [0, 1, 2, 3]
    assert levels["kept"].tolist()[1:] == [round(p * total) for p in (0.3, 0.1, 0.01)]
    assert levels["test_accuracy"].iloc[-1] == result["test_accuracy"]
    assert levels["valid_accuracy_pruned"].notna().tolist() == [True] * 3 + [False]
    assert levels["flipped"].between(0, 0.5).all()
    assert levels["dead_units"].iloc[-1] > 0
    kept = [weights(folder, f"levels/level-{k}.pt") for k in range(4)]
    for denser, sparser in itertools.pairwise(kept):
        for name in denser:
            if name.endswith("_mask"):
                assert (sparser[name] <= denser[name]).all()  # nothing comes back
    table = pd.read_csv(folder / "levels/level-3.csv").set_index("layer")
    assert table.loc["total", "flipped"] == pytest.approx(levels["flipped"].iloc[-1])


def test_a_level_that_asks_for_more_than_there_is_stops_before_training(run, tmp_path):
    # The ER mask of this seed has fewer weights than its density expects.
    with pytest.raises(OptionError, match="--threshold-list: 0.2 asks for 9965 weights, the fir"):
        run(*MLP, "--threshold-list", "0.2")
    with pytest.raises(OptionError, match="--threshold-list: 0.001 is below the share"):
        run(*MLP, "--last-layer-dense", "--threshold-list", "0.001")
    assert not (tmp_path / "a").exists()
    folder = run(
        *MLP, "--threshold-list", "0.2", "--final_prune_epoch", "1", "--er-sampling", "exact"
    )
    assert json.loads((folder / "summary.json").read_text())["kept"] == 9965


def test_mask_ref_takes_the_masks_of_another_run(run):
    levels = [*MLP, "--threshold-list", "0.1", "0.03", "--final_prune_epoch", "1"]
    source = run(*levels, "--pruner", "snip", where="source")
    other = [*levels, "--lr", "0.03", "--pruner", "mask-ref", "--target-expt-name", str(source)]
    folder = run(*other, where="other")
    for level in (1, 2):
        mine, theirs = (weights(f, f"levels/level-{level}.pt") for f in (folder, source))
        assert all(torch.equal(mine[n], theirs[n]) for n in mine if n.endswith("_mask"))
    assert not torch.equal(mine["hidden.0.weight"], theirs["hidden.0.weight"])
    with pytest.raises(OptionError, match="--target-expt-name: the mask of 'hidden.0'"):
        run(*other, "--seed", "2", where="x")
    with pytest.raises(OptionError, match="--target-expt-name: level 1 of .* keeps 4982 weights"):
        run(*other, "--threshold-list", "0.12", where="x")
    with pytest.raises(OptionError, match="--target-expt-name: .*level-3.pt: no such checkpoint"):
        run(*other, "--threshold-list", "0.1", "0.03", "0.02", where="x")
    first = checkpoint.load(source / "levels/level-1.pt")
    first["model"]["hidden.0.weight_mask"] = first["model"]["hidden.0.weight_mask"].float()
    checkpoint.save_by_rank_0(source / "levels/level-1.pt", first)
    with pytest.raises(OptionError, match="--target-expt-name: the mask of 'hidden.0'"):
        run(*other, where="y")


def test_start_from_begins_with_weights_and_masks_of_another_run(run, monkeypatch):
    plain = run(*MLP, "--er-sparse-method", "ERK", "--er-sparse-init", "0.5", where="plain")
    short = [*MLP, "--final_prune_epoch", "1"]
    # Above the default --er-sparse-init: what counts is the density of the other run.
    level = ["--threshold-list", "0.4", "--epochs", "4", "--lr", "2", "--select", "last"]
    level += ["--lr-policy", "constant"]
    first = run(*short, *level, "--start-from", str(plain), where="first")
    row = pd.read_csv(first / "levels.csv").iloc[0]
    own = json.loads((plain / "summary.json").read_text())
    assert (row["requested"], row["density"]) == (0.5, own["density"])
    best, last = weights(plain, "best.pt"), weights(first)
    assert equal(weights(first, "initial.pt"), best)  # plain has kept no initial state
    assert not equal(weights(first, "best.pt"), last)

    begun = []
    phases = Trainer.run_phases

    def look(trainer, *args):
        begun.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        phases(trainer, *args)

    monkeypatch.setattr(Trainer, "run_phases", look)
    second = run(*short, "--threshold-list", "0.3", "--start-from", str(first), where="second")
    assert equal(begun[0], last)
    assert equal(weights(second, "rewind.pt"), last)
    levels = pd.read_csv(second / "levels.csv")
    total = own["weights"]
    assert levels["requested"].tolist() == [0.4, 0.3]
    assert levels["kept"].tolist() == [round(0.4 * total), round(0.3 * total)]
    density = pd.read_csv(second / "density.csv")
    asked = [float(last[f"{layer}.weight_mask"].float().mean()) for layer in density["layer"][:-1]]
    assert density["requested"].tolist()[:-1] == pytest.approx(asked)
    # Signs have flipped since the first run began, not since it ended.
    for k, share in enumerate(levels["flipped"]):
        now, flips, kept = weights(second, f"levels/level-{k}.pt"), [0, 0], 0
        for name in (name.removesuffix("_mask") for name in now if name.endswith("_mask")):
            for i, before in enumerate((best, last)):
                flips[i] += int((now[name] * before[name] < 0).sum())
            kept += int(now[f"{name}_mask"].sum())
        assert share == pytest.approx(flips[0] / kept)
        assert flips[0] != flips[1]

    with pytest.raises(OptionError, match="--start-from: .*nowhere is no folder of a finished run"):
        run(*MLP, "--start-from", "nowhere")
    with pytest.raises(OptionError, match="--threshold-list: 0.45 should be above 0 and at most 0"):
        run(*MLP, "--start-from", str(first), "--threshold-list", "0.45")
    with pytest.raises(OptionError, match="--start-from: .*does not fit the network"):
        run(*TINY, "--start-from", str(first))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_what_is_kept_after_warm_up_comes_back_and_pruning_is_measured(run, monkeypatch):
    states, measured = {}, []
    save, prune_to = Trainer.save, iterative.prune_to

    def keep(trainer):
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        states[trainer.position.phase, trainer.position.epoch] = state
        save(trainer)

    def measure(trainer, **kwargs):
        measured.append([trainer.evaluate(trainer.data.valid)["accuracy"]])
        prune_to(trainer, **kwargs)
        measured[-1].append(trainer.evaluate(trainer.data.valid)["accuracy"])

    monkeypatch.setattr(Trainer, "save", keep)
    monkeypatch.setattr(iterative, "prune_to", measure)
    folder = run(*MLP, "--warmup-epochs", "1", "--rewind", "weights", "--final_prune_epoch", "3",
                 "--threshold-list", "0.1", "0.03", "--lr", "1",
                 "--prune-scheduler", "constant")  # fmt: skip

    warm = states[0, 1]
    assert not equal(weights(folder, "initial.pt"), warm)
    assert equal(weights(folder, "rewind.pt"), warm)
    for phase in (2, 3):
        begun = states[phase, 0]
        for name, value in begun.items():
            if name.endswith("weight") and f"{name}_mask" in begun:
                assert torch.equal(value, warm[name] * begun[f"{name}_mask"])
            elif not name.endswith("_mask"):
                assert torch.equal(value, warm[name])

    levels = pd.read_csv(folder / "levels.csv")
    pairs = levels[["valid_accuracy_unpruned", "valid_accuracy_pruned"]].to_numpy()
    assert pairs[:2] == pytest.approx(torch.tensor(measured).numpy())
    assert (pairs[:2, 0] > pairs[:2, 1]).all()
    assert pd.isna(pairs[2]).all()
    # What is pruned is not what is tested: the last epoch of a level, and its best.
    assert (levels["valid_accuracy"] > levels["valid_accuracy_unpruned"]).any()


def test_reset_weights_means_rewind_weights(run):
    levels = [*MLP, "--threshold-list", "0.1", "--final_prune_epoch", "1"]
    assert same(run(*levels, "--reset-weights"), run(*levels, "--rewind", "weights", where="b"))


@pytest.mark.parametrize(("rewind", "goes_on"), [("none", True), ("weights", False)])
def test_learning_rate_rewinding_keeps_the_momentum_inside_the_mask(
    run, monkeypatch, rewind, goes_on
):
    momenta, save = {}, Trainer.save

    def keep(trainer):
        place = trainer.position.phase, trainer.position.epoch
        for name, weight, mask in masked_weights(trainer.model):
            state = trainer.optimizer.state.get(weight, {}).get("momentum_buffer")
            momenta[(*place, name)] = mask.clone(), None if state is None else state.clone()
        save(trainer)

    monkeypatch.setattr(Trainer, "save", keep)
    run(*MLP, "--rewind", rewind, "--threshold-list", "0.1", "0.03", "--final_prune_epoch", "2")
    names = {name for _, _, name in momenta}
    assert len(names) > 1
    for phase in (1, 2):
        for name in names:
            _, before = momenta[phase - 1, 2, name]
            mask, after = momenta[phase, 0, name]
            if goes_on:
                assert torch.equal(after, before * mask)
                assert not torch.equal(after, before)
            else:
                assert after is None


def test_rates_of_the_warm_up_and_of_the_level_after_it(run):
    rates = pd.read_csv(run(*MLP, "--warmup-epochs", "2", "--lr", "0.6", "--threshold-list", "0.1",
                            "--final_prune_epoch", "2", "--prune-scheduler", "step",
                            "--warmup-length", "1") / "epochs.csv")["lr"]  # fmt: skip
    # Of the last of 6 steps of each epoch.
    assert rates.tolist()[:4] == pytest.approx([0.3, 0.6, 0.6, 0.6])


def test_levels_above_a_clipped_mask_train_and_prune_nothing(run, caplog):
    """By hand: a quarter of 0.2 for each layer; all but the first have less, 256, 256 and 160."""
    folder = run(*MLP, "--er-budget", "clip", "--er-sampling", "exact", "--final_prune_epoch", "1",
                 "--threshold-list", "0.2", "0.15", "0.05")  # fmt: skip
    clipped = round(0.2 * 49824 / 4) + 256 + 256 + 160
    levels = pd.read_csv(folder / "levels.csv")
    assert levels["kept"].tolist() == [clipped] * 3 + [round(0.05 * 49824)]
    assert levels["requested"].tolist() == [0.2, 0.2, 0.15, 0.05]
    phases = pd.read_csv(folder / "epochs.csv")["phase"]
    assert phases.tolist() == ["level 0", "level 1", "level 2", "final"]
    for level, asked in ((1, "0.2"), (2, "0.15")):
        line = f"level {level} asks for density {asked}, the clipped mask has {clipped / 49824:.6f}"
        assert [line in said for said in caplog.messages].count(True) == 1
    assert "level 3 asks" not in caplog.text
    # The masks of such a run are a reference as any other.
    levels = ["--threshold-list", "0.2", "0.15", "0.05", "--final_prune_epoch", "1"]
    own = ["--er-budget", "clip", "--er-sampling", "exact", "--pruner", "mask-ref"]
    other = run(*MLP, *levels, *own, "--target-expt-name", str(folder), where="b")
    one, two = (weights(f) for f in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one if name.endswith("_mask"))


def test_the_published_sweep_of_a_clipped_mask_passes_the_check():
    asked = STROptions(
        arch="mlp", width=16, er_sparse_init=0.3, er_budget="clip",
        threshold_list=tuple(geometric(0.3, 0.8, 0.01)),
    )  # fmt: skip
    model, _ = script.network(asked, SHAPES["digits"])
    iterative.check_levels(model, asked)
    with pytest.raises(OptionError, match=r"--threshold-list: 0.24 asks for 11958 weights, the "):
        iterative.check_levels(model, dataclasses.replace(asked, er_budget="exact"))


def test_exact_sampling_is_advised_only_where_it_helps(run):
    plain = run(*MLP)  # has fewer weights than 0.2 expects
    with pytest.raises(OptionError, match=r"has \d+; ask for less$"):
        run(*MLP, "--threshold-list", "0.2", "--start-from", str(plain))
    with pytest.raises(OptionError, match="; ask for less, or add --er-sampling exact$"):
        run(*MLP, "--threshold-list", "0.2")
