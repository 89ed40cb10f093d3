"""The clock of a training: what it counts, and how it goes on."""

import pytest

from startsparse import clock


@pytest.fixture
def now(monkeypatch):
    """The time, in seconds; the CPU works half of it."""
    time = {"seconds": 100.0}
    monkeypatch.setattr(clock.time, "monotonic", lambda: time["seconds"])
    monkeypatch.setattr(clock.time, "process_time", lambda: time["seconds"] / 2)
    return time


def test_only_blocks_count(now):
    """Preparation before, and the test after the training, are no training."""
    mine = clock.Clock()
    now["seconds"] += 10
    assert mine.read() == {"cpu_seconds": 0, "seconds": 0}
    with mine:
        now["seconds"] += 4
        assert mine.read() == {"cpu_seconds": 2, "seconds": 4}
    now["seconds"] += 50
    with mine:
        now["seconds"] += 2
    assert mine.read() == {"cpu_seconds": 3, "seconds": 6}


def test_it_goes_on_from_what_another_read(now):
    mine = clock.Clock()
    mine.restore({"cpu_seconds": 5.0, "seconds": 7.0})
    now["seconds"] += 10
    with mine:
        now["seconds"] += 4
        assert mine.read() == {"cpu_seconds": 7, "seconds": 11}


def test_an_interruption_stops_it(now):
    mine = clock.Clock()
    with pytest.raises(KeyboardInterrupt), mine:
        now["seconds"] += 4
        raise KeyboardInterrupt
    now["seconds"] += 4
    assert mine.read()["seconds"] == 4
