"""Sweeps: what they run, that they go on after anything, and what they report."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from startsparse.errors import OptionError
from startsparse.schedules import geometric
from STR import run_imp

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "STR/configs/digits.yaml")
TINY = ["--", "--arch", "mlp", "--width", "16", "--epochs", "2", "--final_prune_epoch", "2",
        "-b", "256", "--warmup-length", "0", "--save-every", "2"]  # fmt: skip
TWO = ["--er-sparse-inits", "0.5", "--densities", "0.2", "0.05"]


def argv(where, *options):
    folders = ["--log-dir", str(where / "runs"), "--result-dir", str(where)]
    return ["--config", CONFIG, *folders, *options, *TINY]


def test_levels_are_geometric_and_end_on_the_target():
    published = geometric(0.3, 0.8, 0.01)
    assert published[:3] == pytest.approx([0.24, 0.192, 0.1536])
    assert published[-2:] == pytest.approx([0.3 * 0.8**15, 0.01], rel=1e-5)
    assert all(b == pytest.approx(0.8 * a, rel=1e-5) for a, b in itertools.pairwise(published[:-1]))
    assert geometric(1.0, 0.5, 0.25) == [0.5, 0.25]  # no level twice
    assert geometric(0.3, 0.8, 0.29) == [0.29]


def test_dry_run_of_the_published_sweep(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    assert run_imp.main(["--dry-run", "--seeds", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for words in (
        "--er-sparse-method balanced",
        "--er-sparse-init 0.3",
        "--rewind weights",
        "--pruner mag",
        "--threshold-list 0.24 0.192",
        "0.01 --name",
        "--seed 1",
    ):
        assert words in lines[0]
    assert lines[2] == f"2 runs, {2 * (16 * 150 + 160)} epochs"


def test_the_dense_start_is_not_repeated_for_every_ratio():
    options = run_imp.SweepOptions(
        er_sparse_methods=("balanced", "ERK"), er_sparse_inits=(1.0, 0.5), seeds=(1, 2)
    )
    names = [job.options.name for job in run_imp.plan(options, [])]
    assert len(names) == 2 + 4
    assert sorted(set(names)) == [
        "ERK-0.5-mag-weights", "balanced-0.5-mag-weights", "balanced-1-mag-weights"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "1"], "--keep: 1.0 should be above 0 and below 1"),
        (["--jobs", "0"], "--jobs: 0 should be at least 1"),
        (["--seeds"], "--seeds: needs at least one value"),
        (["--er-sparse-inits", "0.01"], "--er-sparse-inits: 0.01 has no level below it"),
        (["--densities", "0.5"], "--er-sparse-inits: 0.3 has no level below it"),
        (["--pruners", "magic"], "--pruner: 'magic' is none of mag, random-global"),
        (["--dry-run", "--", "--lrr", "3"], "--lrr: unknown option; did you mean --lr"),
    ],
)
def test_bad_options_stop_before_anything_runs(flags, message, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(OptionError, match=f"^{message}"):
        run_imp.main(flags)


def test_a_sweep_reports_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    sweep = argv(tmp_path, *TWO, "--seeds", "1", "2", "--jobs", "2")
    assert run_imp.main(sweep) == 0
    levels = pd.read_csv(tmp_path / "levels.csv")
    assert len(levels) == 2 * 3
    assert sorted(set(levels["requested"])) == [0.05, 0.2, 0.5]
    table = pd.read_csv(tmp_path / "table.csv")
    for row in table.itertuples():
        own = levels[levels["requested"] == row.density]["test_accuracy"]
        assert row.test_accuracy == pytest.approx(own.mean())
        # Student's t for two runs: 12.7062 standard deviations / sqrt(2)
        assert row.test_accuracy_ci95 == pytest.approx(12.7062 * own.std() / 2**0.5, rel=1e-4)
    markdown = (tmp_path / "table.md").read_text()
    assert markdown in capsys.readouterr().out
    head, _, line = markdown.splitlines()
    assert head == "| pruning | start | at density | 0.5 | 0.2 | 0.05 |"
    assert line.startswith("| mag, rewind weights | balanced | 0.5 | ")
    assert line.count(" ± ") == 3
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "final" in (tmp_path / "runs/balanced-0.5-mag-weights-seed-1.log").read_text()

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("run again"))
    assert run_imp.main(sweep) == 0


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    # A file where the first run's folder has to be.
    blocked = tmp_path / "runs/digits/balanced-0.5-mag-weights"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    sweep = argv(tmp_path, *TWO, "--er-sparse-methods", "balanced", "uniform")
    assert run_imp.main(sweep) == 1
    assert "error: balanced-0.5-mag-weights, seed 1 failed; see " in capsys.readouterr().err
    levels = pd.read_csv(tmp_path / "levels.csv")
    assert set(levels["er_sparse_method"]) == {"uniform"}


def begun(tmp_path, sweep):
    process = subprocess.Popen(
        [sys.executable, ROOT / "STR/run_imp.py", *sweep],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.rglob("checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_killed_at_random_moments_it_ends_with_the_same_levels(tmp_path):
    whole = tmp_path / "whole"
    assert run_imp.main(argv(whole, *TWO)) == 0
    parts, moments = tmp_path / "parts", random.Random(1)
    for _ in range(2):
        process = begun(parts, argv(parts, *TWO))
        time.sleep(moments.uniform(0, 1.5))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert run_imp.main(argv(parts, *TWO)) == 0
    assert (whole / "levels.csv").read_bytes() == (parts / "levels.csv").read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children_cleanly(tmp_path, signum):
    # Long enough that the signal comes while the first run trains.
    sweep = [*argv(tmp_path, *TWO), "--final_prune_epoch", "10000"]
    process = begun(tmp_path, sweep)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "the same command continues" in errors
    said = (tmp_path / "runs/balanced-0.5-mag-weights-seed-1.log").read_text()
    assert "stopped by SIGTERM" in said
