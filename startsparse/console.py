"""The project's log, and the console that it speaks to."""

import logging
import math
import sys

from tqdm import tqdm

log = logging.getLogger("startsparse")


def number(value: float, digits: int = 4) -> str:
    """With ``digits`` after the point, or as many significant ones where a value is below 0.1."""
    if not math.isfinite(value):
        return ""
    if abs(value) >= 10**6:
        return f"{value:.{digits}g}"
    return f"{value:.{decimals(value, digits)}f}"


def decimals(value: float, digits: int = 4) -> int:
    """How many digits after the point `number` gives a value."""
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # 0.0099999 counts as 0.01
    return max(digits, digits - 1 - exponent)


class _Console(logging.Handler):
    """Lines to standard output, between the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()  # where it is a file, that can be read while the run goes on


log.setLevel(logging.INFO)
log.propagate = False
if not log.handlers:
    log.addHandler(_Console())
