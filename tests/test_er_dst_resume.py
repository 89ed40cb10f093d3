"""A run whose masks move, stopped anywhere and resumed, is to the bit the run that was not."""

import os
import signal

import pandas as pd
import pytest
from script_runs import Crash, same

from ER_DST import main as script
from startsparse import checkpoint
from startsparse.errors import OptionError
from startsparse.trainer import Interrupted, Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")

# 11 steps an epoch, an update every 4 of them, and at 15, where the pruning ends
ARGV = [
    *("--sparse", "--model", "mlp", "--width", "16", "--epochs", "2", "--batch-size", "128"),
    *("--update-frequency", "4", "--sparse-init", "ERK", "--init-density", "0.3"),
    *("--flow-preservation", "always"),
]
STEPS = [4, 8, 12, 15, 16, 20]

FINAL = ["--final-density", "0.1"]
RUNS = {
    "SGD, gradient": [*FINAL, "--growth", "gradient"],
    "Adam, momentum": [*FINAL, "--optimizer", "adam", "--lr", "0.01", "--growth", "momentum"],
    "DST, random, inside": ["--method", "DST", "--growth", "random", "--grow-within-init"],
    "stop, GraNet": [*FINAL, "--stop-updates", "0.4"],
    "stop, momentum": [*FINAL, "--stop-updates", "0.6", "--growth", "momentum"],
    "ER_snip, GMP_uniform": [*FINAL, "--sparse-init", "ER_snip", "--method", "GMP_uniform"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted runs, each made once."""
    made = {}

    def run(name):
        if name not in made:
            where = tmp_path_factory.mktemp("whole")
            script.main(
                [*ARGV, *RUNS[name], "--log-dir", f"{where}/runs", "--result-dir", f"{where}"]
            )
            made[name] = next((where / "runs").glob("*/*/seed-1"))
        return made[name]

    return run


def stopping(when, signum=None):
    """A `Trainer.after_step` that ends the process after step ``when`` of it, or signals it."""
    done, original = [], Trainer.after_step

    def after_step(trainer, method, step):
        done.append(step)
        if len(done) == when and signum:
            os.kill(os.getpid(), signum)
        original(trainer, method, step)
        if len(done) == when:
            raise Crash

    return after_step


# In the middle of the first interval, just after an update, in the middle of an interval of the
# second epoch, and between the end of the pruning and the update after it.
@pytest.mark.parametrize("when", [2, 5, 14, 16])
@pytest.mark.parametrize("name", list(RUNS)[:2])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    run_dst, monkeypatch, whole, name, when
):
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="--resume .* continues"):
        patch.setattr(Trainer, "after_step", stopping(when, signal.SIGTERM))
        run_dst(*ARGV, *RUNS[name])
    parts = run_dst(*ARGV, *RUNS[name], "--resume", "auto")
    assert len(list(parts.parent.iterdir())) == 1
    assert same(whole(name), parts)
    assert list(pd.read_csv(parts / "topology.csv")["step"]) == STEPS


@pytest.mark.parametrize("name", RUNS)
def test_gone_after_updates_that_no_checkpoint_has_and_resumed(run_dst, monkeypatch, whole, name):
    """The last checkpoint is of step 6; the update at step 8 happens, and is shown, twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of their names, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))
    argv = [*ARGV, *RUNS[name], "--save-every", "6"]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "after_step", stopping(10))
        run_dst(*argv)
    parts = run_dst(*argv, "--resume", "auto")
    assert same(whole(name), parts)
    topology = pd.read_csv(parts / "topology.csv")
    for kind, steps in (("topology", list(topology["step"])), ("", [1, 2])):
        board = EventAccumulator(str(parts / "tensorboard" / kind))
        board.Reload()
        assert [event.step for event in board.Scalars("density")] == steps
    # DST has no end of a pruning; after that and the stop there is nothing to do
    left_out = {"DST": {15}, "stop": {16, 20}}.get(name.split(",")[0], set())
    assert list(topology["step"]) == [step for step in STEPS if step not in left_out]


def rows(folder):
    """Of topology.csv, as the checkpoint has them."""
    return checkpoint.load(folder / "checkpoint.pt")["tables"]["topology"]


def test_resumed_twice_from_its_folder(run_dst, monkeypatch, whole, tmp_path):
    name = "SGD, gradient"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "after_step", stopping(5, signal.SIGINT))
        run_dst(*ARGV, *RUNS[name])
    folder = next((tmp_path / "a/runs").glob("*/*/seed-1"))
    assert [row["step"] for row in rows(folder)] == [4]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "after_step", stopping(8, signal.SIGTERM))
        script.main(["--resume", str(folder), "--result-dir", str(tmp_path / "a")])
    assert [row["step"] for row in rows(folder)] == [4, 8, 12]
    script.main(["--resume", str(folder), "--result-dir", str(tmp_path / "a")])
    assert same(whole(name), folder)


def test_a_run_is_continued_with_its_own_options_only(whole):
    folder = whole("SGD, gradient")
    for flags, message in (
        (["--init-density", "0.4"], "--init-density: 0.4, but the run in .* was started with 0.3"),
        (["--data", "mnist"], "--data: mnist, but the run in .* was started with digits"),
        (["--growth", "random"], "--growth: random, but"),
        (["--l2", "0.1"], "--l2: 0.1, but"),
        (["--model", "resnet20"], "--model: resnet20, but"),
    ):
        with pytest.raises(OptionError, match=f"^{message}"):
            script.main(["--resume", str(folder), *flags])
