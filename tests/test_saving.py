"""Checkpoints after some epochs only: when they are written, and what a kill leaves of the rest."""

import itertools
import os
import random
import signal

import pandas as pd
import pytest
from script_runs import Crash, newest, same, weights

from startsparse import checkpoint, saving
from startsparse.errors import Interrupted
from startsparse.saving import Saving
from startsparse.trainer import Trainer

few = pytest.mark.usefixtures("few_images", "no_pictures")

ARGV = [
    *("--config", "", "--arch", "mlp", "--width", "8", "--batch-size", "32", "--epochs", "6"),
    *("--warmup-length", "0", "--sparse-compute", "off", "--save-seconds", "1e6"),
]
LEVELS = ["--threshold-list", "0.1", "--final_prune_epoch", "4"]
SOFT = ["--conv-type", "STRConvER", "--sInit-value", "-3", "--st-decay", "0.2"]


class Time:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(saving.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize("epoch", [0.05, 1.0, 40.0])
def test_saving_takes_two_percent_of_the_time_or_every_epoch_has_a_checkpoint(monkeypatch, epoch):
    monkeypatch.setattr(saving, "SHARE", 0.02)
    time, times, spent = Time(monkeypatch), Saving(0), 0.0
    saved = []
    for number in range(1000):
        time.now += epoch
        if times.is_due():
            with times.timed():
                time.now += 0.1
            spent, saved = spent + 0.1, [*saved, number]
    assert spent < 0.021 * (time.now - 100)
    gaps = {after - before for before, after in itertools.pairwise(saved)}
    assert max(gaps) * epoch < 5 + 2 * epoch  # 50 times the tenth of a second


def test_save_seconds_are_those_between_two(monkeypatch):
    time, times = Time(monkeypatch), Saving(30)
    assert times.is_due()
    with times.timed():
        time.now += 9
    time.now += 29
    assert not times.is_due()
    time.now += 1.5
    assert times.is_due()


def dying(when, how):
    """A `Trainer._epoch` that calls ``how`` at the end of its call number ``when``."""
    done, original = [], Trainer._epoch

    def epoch(trainer, phase):
        done.append(1)
        original(trainer, phase)
        if len(done) == when:
            how()

    return epoch


def crash():
    raise Crash


@few
@pytest.mark.parametrize(
    "more", [[], SOFT, ["--threshold-list", "0.1", "--final_prune_epoch", "4"]]
)
def test_gone_between_two_checkpoints_and_resumed_equals_uninterrupted(run, monkeypatch, more):
    """The first epoch has one, and the last of each training."""
    whole = run(*ARGV, *more, "--save-seconds", "1e-9", where="whole")
    for count in (2, 3, 5):
        where = f"after{count}"
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Trainer, "_epoch", dying(count, crash))
            run(*ARGV, *more, where=where)
        left = newest(whole.parents[4] / where)
        history = checkpoint.load(left / "checkpoint.pt")["history"]
        assert len(history) == (4 if more == LEVELS and count == 5 else 1)
        assert list(pd.read_csv(left / "epochs.csv")["epoch"]) == [row["epoch"] for row in history]
        assert (left / "best.pt").exists()
        assert same(whole, run(*ARGV, *more, "--resume", "auto", where=where))


@few
def test_killed_again_and_again_with_any_checkpoints_it_is_the_same_run(run, monkeypatch):
    """And TensorBoard shows each epoch once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of their names, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))
    whole, draw = run(*ARGV, *SOFT, where="whole"), random.Random(1)
    for _ in range(6):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Saving, "is_due", lambda _: draw.random() < 0.4)
            patch.setattr(Trainer, "_epoch", dying(draw.choice([1, 1, 2]), crash))
            run(*ARGV, *SOFT, "--resume", "auto", where="parts")
    parts = run(*ARGV, *SOFT, "--resume", "auto", where="parts")
    assert same(whole, parts)
    board = EventAccumulator(str(parts / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("density")] == [1, 2, 3, 4, 5, 6]


@few
@pytest.mark.parametrize("every", [[], ["--save-every", "4"]])
def test_a_signal_saves_what_no_checkpoint_has(run, monkeypatch, every):
    whole = run(*ARGV, *SOFT, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="before epoch 4, step 1"):
        patch.setattr(Trainer, "costs", signalled(Trainer.costs, 3))
        run(*ARGV, *SOFT, *every)
    folder = newest(whole.parents[4] / "a")
    assert len(checkpoint.load(folder / "checkpoint.pt")["history"]) == 3
    assert same(whole, run(*ARGV, *SOFT, *every, "--resume", "auto"))


def signalled(costs, when):
    """A `Trainer.costs`, called once an epoch, that sends SIGTERM in its call number ``when``."""
    calls = []

    def send(trainer):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return costs(trainer)

    return send


@few
def test_the_weights_of_a_run_are_in_place_whatever_was_saved(run):
    one, other = run(*ARGV, where="one"), run(*ARGV, "--save-seconds", "1e-9", where="other")
    assert same(one, other)
    assert weights(one, "best.pt").keys() == weights(other, "best.pt").keys()
