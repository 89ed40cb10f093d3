"""A stopped `startsparse.tabular` goes on from the last density, to the byte."""

import logging

import pytest
from script_runs import Crash

from startsparse import plots
from startsparse.console import log
from startsparse.tabular import TabularOptions, batched, program, report, tables, unfinished
from startsparse.tabular.unfinished import Unfinished

ARGV = [
    "--seeds", "1", "2", "--starts", "1", "0.5", "--densities", "0.5", "0.3", "0.1", "--reset",
    "no", "yes", "--flow-preservation", "yes", "--width", "8", "--epochs", "1", "--final-epochs",
    "2", "--batch-size", "128", "--sparse-compute", "off",
]  # fmt: skip
LEVELS = 4


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program, which dies in its nth training; the folder, and how many there were."""
    monkeypatch.setattr(plots, "save", lambda *_: None)
    monkeypatch.setattr(report, "accuracy_plot", lambda *_: None)
    loops = dict(batched.LOOPS)

    def run(name, *more, dies=0):
        folder, calls = tmp_path / name, []

        def train(*args):
            calls.append(1)
            if len(calls) == dies:
                raise Crash
            return loops["batched"](*args)

        monkeypatch.setitem(batched.LOOPS, "batched", train)
        try:
            program.main([*ARGV, "--result-dir", str(folder), *more], say=lambda _: None)
        except Crash:
            assert dies
        return folder, len(calls)

    return run


def contents(folder):
    """All files but the lock, name -> bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".lock")}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(log, "warning", lambda line, *values: said.append(line % values))
    return said


def test_it_goes_on_to_the_byte(run, caplog):
    """Stopped in the second table, and once more."""
    caplog.set_level(logging.INFO, "startsparse")
    two = ("--tables", "breast-cancer", "digits")
    whole, count = run("whole", *two)
    assert count == 2 * LEVELS
    folder, _ = run("stopped", *two, dies=LEVELS + 2)
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".pt", ".pt"]
    assert run("stopped", *two, dies=2)[1] == 2
    assert run("stopped", *two)[1] == 2
    assert contents(folder) == contents(whole)
    assert f"breast-cancer: going on after density number {LEVELS}" in caplog.messages
    assert "digits: going on after density number 2" in caplog.messages
    assert run("stopped", *two)[1] == 2 * LEVELS  # it was finished


def test_after_a_full_disk_only_the_tables_are_written_again(run, monkeypatch):
    write = program.write_text

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(program, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run("out")
    monkeypatch.setattr(program, "write_text", write)
    assert run("out")[1] == 0
    assert contents(run("out")[0]) == contents(run("whole")[0])


OTHER = {
    "an option": ["--lr", "0.02"],
    "networks": ["--seeds", "2", "1"],
    "a version": [],
    "threads": [],
}


@pytest.mark.parametrize("name", OTHER)
def test_networks_of_another_command_are_not_taken(run, monkeypatch, name):
    folder, _ = run("out", dies=3)
    if name == "a version":
        monkeypatch.setattr("startsparse.__version__", "0.0")
    if name == "threads":
        monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert run("out", *OTHER[name])[1] == LEVELS
    assert not list(folder.glob(".unfinished*"))


def test_networks_on_other_data_are_not_taken(tmp_path):
    options, every = TabularOptions(), [(1.0, False, False, 1)]
    table = tables.load("breast-cancer")
    path = Unfinished(tmp_path, table, options, every).path
    assert Unfinished(tmp_path, tables.load("breast-cancer"), options, every).path == path
    table.features[3, 4] += 1e-9
    assert Unfinished(tmp_path, table, options, every).path != path
    table = tables.load("breast-cancer")
    table.labels[0] = 1 - table.labels[0]
    assert Unfinished(tmp_path, table, options, every).path != path


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_damaged_file_costs_a_line_and_a_new_start(run, warnings, cut):
    folder, _ = run("out", dies=3)
    (path,) = folder.glob(".unfinished*")
    path.write_bytes(path.read_bytes()[:cut])
    assert run("out")[1] == LEVELS
    (line,) = warnings
    assert line.startswith(f"warning: {path}: not a complete checkpoint (")
    assert line.endswith("; its networks start again") and line.isprintable()
    assert contents(folder) == contents(run("whole")[0])


def test_where_nothing_can_be_kept_the_results_come_all_the_same(run, monkeypatch, warnings):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(unfinished.checkpoint, "save_by_rank_0", full)
    folder, count = run("out")
    assert count == LEVELS and len(warnings) == LEVELS
    assert warnings[0].endswith("free space; stopped now, these networks would start again")
    assert "results.csv" in contents(folder)
