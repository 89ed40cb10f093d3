"""Several processes train as one does: same numbers, masks and weights within rounding."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forked import Script
from processes_runs import BAD, INTERRUPTED, RUNS, STOP, STR, folders, forms
from script_runs import ROOT, TIMES, newest, same, weights

from startsparse import checkpoint, processes
from startsparse.data import Batches, Repeated, Rows, first_batch
from startsparse.data.batches import parts
from startsparse.errors import OptionError
from STR import run_imp

pytestmark = pytest.mark.usefixtures("no_pictures")

CPU = torch.device("cpu")


def of_two(kind, where):
    """What the program of `processes_runs` prints."""
    program = Script(ROOT / "tests/processes_runs.py", [kind, where], where)
    out, errors = program.wait()
    assert program.exit_code == 0, errors
    return json.loads(out)


def test_two_processes_train_as_one(tmp_path):
    codes = of_two("runs", tmp_path / "two")
    said = [(tmp_path / f"two/stderr-{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0, 0, 0], said
    for (script, argv), (_, others) in zip(forms(tmp_path / "one"), forms(tmp_path / "two")):
        script.main(argv)
        one, two = (newest(Path(args[-1])) for args in (argv, others))
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        assert len(list(one.rglob("*"))) == len(list(two.rglob("*")))
        for path in one.rglob("*.csv"):
            tables = [pd.read_csv(folder / path.relative_to(one)) for folder in (one, two)]
            assert_close(*(t.drop(columns=TIMES, errors="ignore") for t in tables))
        first, second = weights(one), weights(two)
        for name, tensor in first.items():
            if tensor.dtype.is_floating_point:
                assert torch.allclose(tensor, second[name], rtol=1e-4, atol=1e-5), (two, name)
            else:
                assert torch.equal(tensor, second[name]), (two, name)
    # To the bit, after each step.
    seen = [json.loads((tmp_path / f"two/seen-{rank}.json").read_text()) for rank in range(2)]
    assert len(seen[0]) > 200
    assert seen[0] == seen[1]
    assert not list((tmp_path / "two/other machine").iterdir())
    assert pd.read_csv(newest(tmp_path / "two/auto") / "density.csv")["computes"].count() == 1
    # One of them was asked to stop; both did, after the same step, and went on.
    stopped = newest(tmp_path / "two/stopped")
    place = checkpoint.load(stopped / "stopped.pt")["position"]
    assert place == {"phase": 0, "epoch": 0, "step": STOP + 1}
    assert len(list(stopped.parent.iterdir())) == 1
    assert same(newest(tmp_path / f"two/{INTERRUPTED}, on"), stopped)
    # One process goes on with what two began.
    whole = weights(stopped)
    stopped.joinpath("stopped.pt").replace(stopped / "checkpoint.pt")
    stopped.joinpath("summary.json").unlink()
    script, argv = RUNS[INTERRUPTED]
    script.main([*argv, "--resume", "auto", *folders(tmp_path / "two/stopped")])
    assert all(torch.allclose(weights(stopped)[n], whole[n], atol=1e-5) for n in whole)


def assert_close(one, other):
    numbers = one.select_dtypes("number").columns
    assert one.drop(columns=numbers).equals(other.drop(columns=numbers))
    assert np.allclose(one[numbers], other[numbers], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_what_is_wrong_is_said_once(tmp_path):
    codes = of_two("bad", tmp_path)
    for name in BAD:
        said = [(tmp_path / name / f"stderr-{rank}").read_text() for rank in range(2)]
        assert "".join(said).count("\n") == 1, said
        assert "".join(said).startswith(f"error: {SAID[name][0]}"), said
        assert codes[name] == SAID[name][1]
    assert set(BAD) == set(SAID)


def test_a_sweep_is_one_process(monkeypatch):
    monkeypatch.setattr(processes._world, "size", 2)
    with pytest.raises(OptionError, match="torchrun: is for main.py"):
        run_imp.main(["--dry-run"])


SAID = {
    "option": ("--lr: -1.0 should be above 0", [2, 2]),
    "gpus": ("--multigpu: torchrun gives each process a GPU of its own; leave", [2, 2]),
    "graph": ("--set: karate is one batch; start one process", [2, 2]),
    "batch": ("--batch-size: 3 should be at least 4, two for each process", [2, 2]),
    "found by the first": ("--evaluate: there is no run in ", [2, 1]),
    "not finite": ("the loss is not finite at step 1", [1, 1]),
    "different": (
        "the processes of this run have come to different weights in epoch 1, deco",
        [1, 1],
    ),
    "killed": ("another process of this run is gone (", [1, -signal.SIGKILL]),
}


def test_torchrun_is_asked_to_stop(tmp_path):
    argv = [*STR, "--epochs", "5000", "--sparse-compute", "off", *folders(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "main.py", *argv],
        cwd=ROOT / "STR",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list(tmp_path.rglob("checkpoint.pt")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    folder = newest(tmp_path)
    assert said.count("\nembedding") == said.count("epoch   1  final") == 1
    assert errors.count(f"--resume {folder} continues\n") == 1
    assert checkpoint.load(folder / "checkpoint.pt")["position"]["epoch"] > 0
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2


def of(count, make):
    """What ``make`` gives in each of ``count`` processes."""
    made = []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes._world, "rank", rank)
            patch.setattr(processes._world, "size", count)
            made.append(make())
    return made


def images(seed, examples=45):
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (examples, 8, 8, 3), dtype=torch.uint8, generator=draw)
    return Batches(pixels, torch.arange(examples), mean=(0.5,) * 3, std=(0.3,) * 3, batch_size=14,
                   device=CPU, seed=seed, pad=2, flip=True)  # fmt: skip


def rows(seed):
    features = torch.randn(45, 5, generator=torch.Generator().manual_seed(1))
    return Rows(features, torch.arange(45), batch_size=14, device=CPU, seed=seed)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("batches", [images(1), rows(1), Repeated(images(1), 2)])
def test_shares_make_up_the_batch(batches, count):
    shares = of(count, lambda: list(batches.epoch(3, 1)))
    for step, whole in enumerate(batches.epoch(3, 1)):
        size = batches.size(step + 1)
        assert size == len(whole[1])
        small = size < 2 * count
        for i in range(2):
            for share in shares if small else ():
                assert torch.equal(share[step][i], whole[i])
            if not small:
                assert torch.equal(torch.cat([share[step][i] for share in shares]), whole[i])
        sizes = [len(share[step][1]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    firsts = of(count, lambda: first_batch(batches, 3))
    assert all(torch.equal(labels, next(batches.epoch(3))[1]) for _, labels in firsts)


@pytest.mark.parametrize("batches", [images(None), rows(None)])
def test_evaluation_deals_out_the_batches(batches):
    shares = of(3, lambda: [labels for _, labels in batches.epoch(0)])
    whole = [labels for _, labels in batches.epoch(0)]
    assert [[s.tolist() for s in share] for share in shares] == [
        [labels.tolist() for labels in whole[rank::3]] for rank in range(3)
    ]


def test_no_share_is_of_one_row_and_all_make_up_the_mean():
    for examples in range(2, 40):
        for count in range(1, 9):
            sizes = [min(16, examples - first) for first in range(0, examples, 16)]
            if sizes[-1] == 1:
                sizes.pop()

            def shares(n=examples, sizes=sizes):
                rows = [part.stop - part.start for part in parts(n, 16, train=True)]
                return [
                    (rows, processes.weight(rows / size), processes.counts(rows / size))
                    for rows, size in zip(rows, sizes, strict=True)
                ]

            for size, *step in zip(sizes, *of(count, shares), strict=True):
                rows, weights, counted = zip(*step)
                assert 1 not in rows
                assert sum(n for n, counts in zip(rows, counted) if counts) == size
                # The mean over the processes of weight * mean of the rows is the mean of all.
                if set(rows) == {size}:
                    assert set(weights) == {1}
                else:
                    assert weights == pytest.approx([n / size * count for n in rows])


def test_collectives_say_so_in_their_names():
    """A function that rank 0 does for all says it, or is a method of a class that says it."""
    root, found = Path(processes.__file__).parents[1], []
    for folder in ("startsparse", "STR", "ER_DST", "ER_SLT"):
        for path in (root / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
            told = {
                f for c in classes if "collectives" in (ast.get_docstring(c) or "") for f in c.body
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node not in told:
                    marks = [ast.unparse(mark) for mark in node.decorator_list]
                    if "by_rank_0" in marks or "processes.by_rank_0" in marks:
                        found.append(node.name)
    assert len(found) > 5
    assert all(name.endswith("_by_rank_0") for name in found), found
