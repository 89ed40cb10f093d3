"""A run of ER_SLT that was stopped anywhere and resumed is, to the bit, the run that was not."""

import os
import signal
import time

import pytest
import torch
from forked import Script
from script_runs import ROOT, Crash, crashing, newest, same
from slt_runs import MLP, ticket

from ER_SLT import main as script
from startsparse.errors import OptionError
from startsparse.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = [*MLP, "--initBias", "kn-nonzero-bias", "--shuffle"]


def same_tickets(one, other):
    """Whether the tickets of all levels hold the same, and shuffles came out the same."""
    for level in (1, 2, None):
        a, b = ticket(one, level), ticket(other, level)
        assert (a.description, a.weights) == (b.description, b.weights)
        for part in ("er_masks", "found", "statistics"):
            x, y = getattr(a, part), getattr(b, part)
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x)
    assert (one / "shuffles.csv").read_bytes() == (other / "shuffles.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by their options."""
    made = {}

    def run(*argv):
        if argv not in made:
            where = tmp_path_factory.mktemp("whole")
            script.main([*argv, "--log-dir", f"{where}/runs", "--result-dir", str(where)])
            made[argv] = newest(where)
        return made[argv]

    return run


# Saves of a run of 2 levels of 2 epochs: each epoch, and the beginning of the second level.
@pytest.mark.parametrize(
    ("when", "count"),
    [("after", 1), ("before", 2), ("after", 2), ("before", 3), ("after", 3), ("after", 4),
     ("after", 5)],
)  # fmt: skip
def test_resumed_between_epochs_and_levels(run_slt, whole, monkeypatch, when, count):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing(when, count))
        run_slt(*TINY)
    parts = run_slt(*TINY, "--resume", "auto")
    assert same(whole(*TINY), parts)
    same_tickets(whole(*TINY), parts)


@pytest.mark.parametrize("ranking", ["--per-layer", "--global"])
@pytest.mark.parametrize("count", [2, 12])
def test_resumed_inside_a_level(run_slt, whole, monkeypatch, ranking, count):
    """A save within the first epoch, and one within the second level."""
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing("after", count))
        run_slt(*TINY, ranking, "--save-every", "2")
    parts = run_slt(*TINY, ranking, "--save-every", "2", "--resume", "auto")
    assert same(whole(*TINY, ranking), parts)
    same_tickets(whole(*TINY, ranking), parts)


def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path):
    argv = [*TINY, "--epochs", "5"]
    folders = ["--log-dir", f"{tmp_path}/runs", "--result-dir", str(tmp_path)]
    process = Script(ROOT / "ER_SLT/main.py", [*argv, *folders, "--save-every", "1"], tmp_path)
    while not list(tmp_path.rglob("checkpoint.pt")):
        assert process.exit_code is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.wait()
    assert process.exit_code == 128 + signal.SIGTERM
    assert errors.count("\n") == 1
    assert "continues" in errors
    folder = newest(tmp_path)
    assert not (folder / "summary.json").exists()
    script.main(["--resume", str(folder), "--result-dir", str(tmp_path)])
    assert same(whole(*argv), folder)
    same_tickets(whole(*argv), folder)


def test_a_finished_run_is_not_trained_again(run_slt, monkeypatch):
    folder = run_slt(*MLP, "--epochs", "1")
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(script.data, "load", lambda *_, **__: pytest.fail("trained again"))
    assert run_slt(*MLP, "--epochs", "1", "--resume", "auto") == folder
    assert (folder / "checkpoint.pt").read_bytes() == before
    with pytest.raises(OptionError, match=r"--sparsity: 0.1, but the run in .* was started with"):
        run_slt(*MLP, "--epochs", "1", "--sparsity", "0.1", "--resume", str(folder))
