"""How long training has taken, with the time before resumptions."""

import time
from collections.abc import Mapping


def _now() -> dict[str, float]:
    return {"cpu_seconds": time.process_time(), "seconds": time.monotonic()}


class Clock:
    """CPU and wall-clock seconds spent inside its ``with`` blocks.

    CPU seconds are those of all threads of this process: they depend less than others on what else
    the machine does.
    """

    def __init__(self) -> None:
        self._before = dict.fromkeys(_now(), 0.0)
        self._entered: dict[str, float] | None = None

    def __enter__(self) -> None:
        self._entered = _now()

    def __exit__(self, *_: object) -> None:
        self._before, self._entered = self.read(), None

    def read(self) -> dict[str, float]:
        """``cpu_seconds`` and ``seconds`` so far; what `restore` takes."""
        now = _now()
        since = self._entered or now
        return {name: self._before[name] + now[name] - since[name] for name in now}

    def restore(self, read: Mapping[str, float]) -> None:
        """Go on from what another clock read; outside of ``with``."""
        self._before = dict(read)
