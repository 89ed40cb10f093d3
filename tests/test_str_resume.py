"""A run that was stopped anywhere and resumed is the run that was not."""

import itertools
import json
import os
import signal
import time

import pandas as pd
import pytest
import torch
from forked import Script
from script_runs import MLP, ROOT, SOFT, TINY, Crash, crashing, newest, same, steps, weights

from startsparse import checkpoint
from startsparse.commandline import parse
from startsparse.errors import OptionError
from startsparse.trainer import Trainer
from STR import main as script
from STR.options import CONV_TYPES

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("conv_type", CONV_TYPES)
def test_resumed_equals_uninterrupted(run, monkeypatch, conv_type):
    """Gone within the first epoch; at its end, with best.pt newer than checkpoint.pt; later."""
    soft = SOFT if conv_type.startswith("STR") else []
    argv = ["--conv-type", conv_type, *TINY, *soft, "--save-every", "4"]
    with steps() as all_of_them:
        whole = run(*argv, where="whole")
    assert len(all_of_them) == 2 * 6
    # A checkpoint within an epoch, then one at its end.
    for when, count, left in (("after", 1, 2 + 6), ("before", 2, 2 + 6), ("after", 3, 2)):
        where = f"{when}{count}"
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Trainer, "save", crashing(when, count))
            run(*argv, where=where)
        with steps() as rest:
            parts = run(*argv, "--resume", "auto", where=where)
        assert len(rest) == left
        assert len(list(parts.parent.iterdir())) == 1
        assert same(whole, parts)


def test_resume_while_density_leaves_the_best_epochs(run, monkeypatch):
    """Of five epochs the first are the best, but too dense: which is tested, and its weights."""
    evaluate, accuracies = Trainer.evaluate, [0.9, 0.8, 0.6, 0.7, 0.5]

    def denser_is_better(trainer, batches):
        found = evaluate(trainer, batches)
        testing = batches is trainer.data.test
        return found if testing else found | {"accuracy": accuracies[len(trainer.history)]}

    monkeypatch.setattr(Trainer, "evaluate", denser_is_better)
    argv = [*MLP, "--conv-type", "STRConvER", *SOFT, "--st-decay", "0.2", "--epochs", "5"]
    argv += ["--lr-policy", "constant"]
    whole = run(*argv, where="whole")
    epochs = pd.read_csv(whole / "epochs.csv")
    final = epochs["density"].iloc[-1]
    near = epochs[(epochs["density"] - final).abs() <= 0.1 * final]
    best = near.loc[near["valid_accuracy"].idxmax()]
    assert 1 < best["epoch"] < 5
    result = json.loads((whole / "summary.json").read_text())
    assert (result["epoch"], result["density"]) == (best["epoch"], best["density"])
    plain = [x for x in weights(whole, "dense_weights.pt").values() if x.dim() > 1]
    kept = sum(int(torch.count_nonzero(tensor)) for tensor in plain)
    assert kept == result["kept"]
    assert not list(whole.glob("best-*"))
    for when, count in itertools.product(("before", "after"), range(1, 6)):
        where = f"{when}{count}"
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Trainer, "save", crashing(when, count))
            run(*argv, where=where)
        parts = run(*argv, "--resume", "auto", where=where)
        assert same(whole, parts)
        assert not list(parts.glob("best-*"))


def test_a_clock_that_is_set_back_changes_nothing(run, monkeypatch):
    argv = [*MLP, "--epochs", "3"]
    whole = run(*argv, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing("after", 2))
        run(*argv, where="parts")
    now, year = time.time, 365 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: now() - year)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() - year) * 1e9))
    assert same(whole, run(*argv, "--resume", "auto", where="parts"))


def test_resume_over_pruning_levels(run, monkeypatch):
    argv = [*MLP, "--threshold-list", "0.1", "0.05", "--final_prune_epoch", "1"]
    whole = run(*argv, where="whole")
    # The checkpoint of a pruning, and of an epoch after it; three epochs of 6 steps in all.
    for count, when, left in (
        (2, "before", 12),
        (2, "after", 12),
        (3, "before", 12),
        (3, "after", 6),
    ):
        where = f"{when}{count}"
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Trainer, "save", crashing(when, count))
            run(*argv, where=where)
        with steps() as rest:
            assert same(whole, run(*argv, "--resume", "auto", where=where))
        assert len(rest) == left


def test_a_signal_saves_and_says_how_to_go_on(run, tmp_path):
    argv = [*TINY, "--epochs", "3", "--save-every", "1", "--batch-size", "256"]
    whole = run(*argv, where="whole")
    for signum in (signal.SIGTERM, signal.SIGINT):
        where = tmp_path / str(int(signum))
        folders = ["--log-dir", str(where / "runs"), "--result-dir", str(where)]
        process = Script(ROOT / "STR/main.py", [*argv, *folders], where)
        while not list(where.rglob("checkpoint.pt")):
            assert process.exit_code is None
            time.sleep(0.02)
        os.kill(process.pid, signum)
        _, errors = process.wait()
        assert process.exit_code == 128 + signum
        assert errors.count("\n") == 1
        assert "continues" in errors
        folder = newest(where)
        place = checkpoint.load(folder / "checkpoint.pt")["position"]
        done = 6 * place["epoch"] + place["step"]
        assert 0 < done < 3 * 6
        with steps() as rest:
            script.main(["--resume", str(folder), "--result-dir", str(where)])
        assert len(rest) == 3 * 6 - done
        assert same(whole, folder)


def test_a_finished_run_is_not_trained_again(run, monkeypatch, tmp_path):
    folder = run(*MLP)
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(script.data, "load", lambda *_, **__: pytest.fail("trained again"))
    run(*MLP, "--resume", "auto")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert len(pd.read_csv(tmp_path / "a/results.csv")) == 1


def test_resume_with_other_options_is_refused(run):
    folder = run(*MLP)
    with pytest.raises(OptionError, match=r"--lr: 0.3, but the run in .* was started with 0.1"):
        run(*MLP, "--lr", "0.3", "--resume", str(folder))


def test_auto_takes_the_newest_run_that_began(run, tmp_path):
    first, second = run(*MLP), run(*MLP)
    third = second.with_name("seed-1-3")
    third.mkdir()  # gone before its options were written
    second.joinpath("summary.json").unlink()
    first.joinpath("checkpoint.pt").unlink()
    assert script.finding.find_run_by_rank_0(
        parse(script.STROptions, script.CONFIGS,
                     [*MLP, "--resume", "auto", "--log-dir", f"{tmp_path}/a/runs"])
    ) == second  # fmt: skip


def test_auto_reads_the_seed_from_options_yaml(run):
    """seed-1-2 is the second run of seed 1; seed-12 is another seed's."""
    begun = {}
    for seed in ("1", "12", "2", "1", "1", "12"):
        begun[seed] = run(*MLP, "--seed", seed)
    assert {folder.name for folder in begun.values()} == {"seed-1-3", "seed-12-2", "seed-2"}
    shown = begun["2"].rename(begun["2"].with_name("seed-1-9"))  # a name says nothing
    begun["2"] = shown
    for seed, folder in begun.items():
        options = parse(
            script.STROptions, script.CONFIGS,
            [*MLP, "--seed", seed, "--resume", "auto", "--log-dir", str(folder.parents[2])],
        )  # fmt: skip
        assert script.finding.find_run_by_rank_0(options) == folder
