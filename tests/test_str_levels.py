"""Pruning levels from end to end: counts, masks and starts from other runs."""

import itertools
import json

import pandas as pd
import pytest
import torch
from script_runs import MLP, TINY, same, weights

from startsparse.errors import OptionError
from startsparse.trainer import Trainer


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


def test_start_from_begins_with_weights_and_masks_of_another_run(run, monkeypatch):
    first = run(*MLP, "--er-sparse-method", "ERK", where="first")
    begun = []
    monkeypatch.setattr(Trainer, "run_phases", lambda trainer, _: begun.append(
        {k: v.clone() for k, v in trainer.model.state_dict().items()}) or 1 / 0)  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        run(*MLP, "--start-from", str(first))
    best = weights(first, "best.pt")
    assert all(torch.equal(begun[0][name], best[name]) for name in best)
    with pytest.raises(OptionError, match="--start-from: .*no such checkpoint"):
        run(*MLP, "--start-from", "nowhere")
    with pytest.raises(OptionError, match="--start-from: .*does not fit the network"):
        run(*TINY, "--start-from", str(first))


def test_reset_weights_means_rewind_weights(run):
    levels = [*MLP, "--threshold-list", "0.1", "--final_prune_epoch", "1"]
    assert same(run(*levels, "--reset-weights"), run(*levels, "--rewind", "weights", where="b"))
