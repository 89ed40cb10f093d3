"""How long training has taken, with the time before resumptions."""

import time
from collections.abc import Mapping


class Clock:
    """Wall-clock and CPU seconds since it was made, and before, if it was restored.

    CPU seconds are those of all threads of this process: they depend less than others on what else
    the machine does.
    """

    def __init__(self) -> None:
        self._start = {name: -now for name, now in self._now().items()}

    @staticmethod
    def _now() -> dict[str, float]:
        return {"cpu_seconds": time.process_time(), "seconds": time.monotonic()}

    def read(self) -> dict[str, float]:
        """``cpu_seconds`` and ``seconds`` until now; also what `restore` takes."""
        return {name: now + self._start[name] for name, now in self._now().items()}

    def restore(self, read: Mapping[str, float]) -> None:
        """Go on from what another clock read."""
        self._start = {name: read[name] - now for name, now in self._now().items()}
