"""When a run writes a checkpoint after an epoch."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.02  # of the time, which checkpoints after epochs may take


class Saving:
    """The times between checkpoints, in seconds of the wall clock."""

    def __init__(self, seconds: float):
        """``seconds``: that pass before the next one (--save-seconds); 0: as `SHARE` says."""
        self.seconds = seconds
        self._took, self._ended = 0.0, -math.inf

    def is_due(self) -> bool:
        """Whether enough time has passed since the last one; true if there was none."""
        return time.monotonic() - self._ended >= (self.seconds or self._took / SHARE)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the writing of one."""
        began = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took = self._ended - began
