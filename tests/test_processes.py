"""Several processes train as one does: same numbers, masks and weights within rounding."""

import ast
import json
import os
import signal
import socket
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

from startsparse import checkpoint, parallel, processes
from startsparse.data import Batches, Repeated, Rows, first_batch
from startsparse.data.batches import parts
from startsparse.errors import OptionError
from STR import run_imp
from STR.options import STROptions

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


def test_torchrun_on_two_machines_is_asked_to_stop(tmp_path):
    """Two agents, with one process and with two, in working folders of their own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = []
    try:
        for count in (1, 2):
            folder = tmp_path / f"machine-{count}"
            folder.mkdir()
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--nproc-per-node", str(count), "--rdzv-id", "test", "--rdzv-backend", "c10d"),
                *("--rdzv-endpoint", f"127.0.0.1:{port}", ROOT / "STR/main.py"),
                *(*STR, "--config", ROOT / "STR/configs/modular-addition.yaml"),
                *("--epochs", "5000", "--sparse-compute", "off", "--result-dir", "."),
            ]
            agents.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        while not (saved := list(tmp_path.rglob("checkpoint.pt"))):
            for agent in agents:
                assert agent.poll() is None, agent.communicate()
            time.sleep(0.02)
        agents[1].send_signal(signal.SIGTERM)
        said = [agent.communicate(timeout=60) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    (path,) = saved
    folder, lines, errors = path.parent, *map("".join, zip(*said))
    assert lines.count("\nembedding") == lines.count("epoch   1  final") == 1
    there = Path(*folder.relative_to(tmp_path).parts[1:])  # on its machine
    assert errors.count(f"--resume {there} continues\n") == 1
    assert list(tmp_path.rglob("checkpoint.pt")) == [path]
    assert checkpoint.load(path)["position"]["epoch"] > 0
    assert json.loads((folder / "environment.json").read_text())["processes"] == 3
    others = [file for file in tmp_path.rglob("*") if file.is_file() and folder not in file.parents]
    assert others == []


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


def test_no_share_is_of_one_row():
    for examples in range(2, 40):
        for count in range(1, 9):
            shares = of(count, lambda n=examples: list(parts(n, 16, train=True)))
            assert all(part.stop - part.start != 1 for share in shares for part in share)


@pytest.mark.parametrize(
    ("rank", "local_rank", "before"), [(0, 0, 0), (2, 0, 1), (1, 1, 2), (3, 1, 2)]
)
def test_one_process_of_each_machine_does_the_work(monkeypatch, rank, local_rank, before):
    events = []
    monkeypatch.setattr(processes, "all_agree", lambda _: events.append("all wait"))
    monkeypatch.setattr(
        processes, "_world", processes.World(rank=rank, size=4, local_rank=local_rank)
    )
    with pytest.raises(OSError), processes.all_in_turn():  # an error changes nothing
        events.append("work")
        raise OSError
    assert events == [*["all wait"] * before, "work", *["all wait"] * (2 - before)]


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(processes, "_world", processes.World(3, 4, local_rank=1, local_size=2))
    assert parallel.choose_devices("") == [torch.device("cuda", 1)]
    assert used == [1]
    assert torch.backends.cudnn.deterministic
    monkeypatch.setattr(processes, "_world", processes.World(3, 6, local_rank=1, local_size=3))
    with pytest.raises(OptionError, match="torchrun: --nproc-per-node 3 .* this machine has 2;"):
        parallel.choose_devices("")


def test_sync_bn_is_for_processes():
    with pytest.raises(OptionError, match="--sync-bn: is for torchrun; leave it out, or --multi"):
        STROptions(sync_bn=True, multigpu="0,1").check()


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
