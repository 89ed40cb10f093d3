"""startsparse.tabular in several processes: who trains what, and that the tables are the same."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from forked import Script
from script_runs import ROOT
from tabular_processes import BAD, RUNS, SPLIT

from startsparse import plots, processes
from startsparse.tabular import TabularOptions, experiment, program, report
from startsparse.tabular.options import alone


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Exit codes of all runs of two processes, and their folder."""
    where = tmp_path_factory.mktemp("two")
    with alone(where / "held/out"):
        script = Script(ROOT / "tests/tabular_processes.py", [where], where)
        out, errors = script.wait()
    assert script.exit_code == 0, errors
    return json.loads(out), where


@pytest.fixture
def one(tmp_path, monkeypatch):
    """Runs the program here; returns the folder of its results."""

    def run(argv):
        program.main([*argv, "--result-dir", str(tmp_path)])
        return tmp_path

    monkeypatch.setattr(plots, "save", lambda *_: None)
    monkeypatch.setattr(report, "accuracy_plot", lambda *_: None)
    return run


def said(where, rank=None):
    """What the processes said on standard error."""
    ranks = (0, 1) if rank is None else (rank,)
    return "".join((where / f"stderr-{rank}").read_text() for rank in ranks)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_tables_to_the_byte(two, one, name, capsys):
    codes, where = two
    assert codes[name] == [0, 0], said(where / name)
    for path in one(RUNS[name]).glob("[!.]*"):
        assert (where / name / "out" / path.name).read_bytes() == path.read_bytes(), path
    printed = [(where / name / f"stdout-{rank}").read_text() for rank in (0, 1)]
    assert printed == [capsys.readouterr().out, ""]


def test_one_table_in_two_pieces(two, one):
    codes, where = two
    assert codes["split"] == [0, 0], said(where / "split")
    folders = one(SPLIT), where / "split/out"
    mine, theirs = (pd.read_csv(folder / "results.csv") for folder in folders)
    measured = ["valid_accuracy", "test_accuracy"]
    assert mine.drop(columns=measured).equals(theirs.drop(columns=measured))
    assert np.abs(mine[measured] - theirs[measured]).max().max() < 0.1


def test_they_go_on_after_a_stop(two):
    codes, where = two
    assert codes["stopped late"][1] == 128 + 15 and codes["resumed"] == [0, 0]
    log = (where / "resumed/stdout-0").read_text() + said(where / "resumed")
    assert "breast-cancer: going on after density number 3" in log  # of process 0, which had ended
    assert "digits: going on" not in log  # process 1 does not log
    mine, theirs = (sorted((where / n / "out").glob("*")) for n in ("two tables", "resumed"))
    assert [path.name for path in mine] == [path.name for path in theirs]
    for one, other in zip(mine, theirs):
        assert one.read_bytes() == other.read_bytes(), one


LINES = {
    "option": "error: --lr: -1.0 should be above 0",
    "device": "error: --device: there is no cuda:3 here; take cpu",
    "table": "error: none.csv: cannot be read as CSV (No such file",
    "held": "error: --result-dir: another run writes into",
    "stopped": "error: stopped by SIGTERM; the same command goes on",
    "diverged": "error: the loss of network 1 of 1 is not finite in epoch 1",
    "gone": "error: another process of this run is gone (",
}
CODES = {"option": 2, "held": 2, "stopped": 128 + 15}


@pytest.mark.parametrize("name", BAD)
def test_an_error_is_one_line_of_all_processes(two, name):
    codes, where = two
    lines = [line for line in said(where / name).splitlines() if line.startswith("error")]
    assert len(lines) == 1 and lines[0].startswith(LINES[name]), said(where / name)
    assert "Traceback" not in said(where / name)
    assert 0 not in codes[name] and CODES.get(name, 1) in codes[name]
    assert not (where / name / "out/results.csv").exists()


def dealt(count, **options):
    """Tables of each process, with the numbers of its networks."""
    options = TabularOptions(**options)
    number = {setting: n for n, setting in enumerate(experiment.settings(options))}
    return [
        {name: [number[s] for s in settings] for name, settings in own}
        for own in program.shares(options, count)
    ]


def test_who_trains_what():
    three = {"tables": ("a", "b", "c"), "starts": (1.0, 0.5), "reset": (False,), "seeds": (1, 2)}
    every = [0, 1, 2, 3]
    assert dealt(1, **three) == [{"a": every, "b": every, "c": every}]
    assert dealt(2, **three) == [{"a": every, "c": every}, {"b": every}]
    assert dealt(3, **three) == [{"a": every}, {"b": every}, {"c": every}]
    assert dealt(4, **three) == [{"a": [0, 2], "c": [0, 2]}, {"a": [1, 3], "c": [1, 3]},
                                 {"b": [0, 2]}, {"b": [1, 3]}]  # fmt: skip
    one = {**three, "tables": ("a",)}
    assert dealt(2, **one) == [{"a": [0, 2]}, {"a": [1, 3]}]
    assert dealt(5, **one) == [{"a": [0]}, {"a": [1]}, {"a": [2]}, {"a": [3]}, {}]
    assert dealt(2, **three, loop="loop") == [
        {"a": [0, 2], "b": [0, 2], "c": [0, 2]}, {"a": [1, 3], "b": [1, 3], "c": [1, 3]}
    ]  # fmt: skip


def test_networks_that_share_a_memory(monkeypatch):
    """Of two machines with four processes each; a process trains one table after the other."""

    def networks(device, **options):
        options = TabularOptions(device=device, seeds=(1, 2), **options)  # eight on a table
        return program.together(options, torch.device(device.replace("auto", "cuda:0")))

    assert networks("cpu") == networks("cpu", tables=("a", "b")) == 8
    monkeypatch.setattr(processes._world, "size", 8)
    monkeypatch.setattr(processes._world, "local_size", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert networks("cpu") == 4 * 1
    assert networks("cpu", tables=("a", "b")) == 4 * 2
    assert networks("cpu", tables=tuple("abcdefgh")) == 4 * 8
    assert networks("auto", tables=("a", "b")) == 2 * 2
    assert networks("cuda:0", tables=("a", "b")) == 4 * 2


@pytest.mark.parametrize("loop", ["batched", "loop"])
def test_every_network_is_trained_once(loop):
    for tables, seeds, count in itertools.product((1, 2, 3, 5), (1, 2, 3), range(1, 18)):
        names = tuple("abcde"[:tables])
        shares = dealt(count, tables=names, seeds=tuple(range(seeds)), loop=loop)
        assert len(shares) == count
        pairs = sorted((name, n) for own in shares for name, ns in own.items() for n in ns)
        assert pairs == [(name, n) for name in names for n in range(4 * seeds)]
