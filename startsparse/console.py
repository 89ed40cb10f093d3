"""The project's log, and the console that prints it."""

import logging
import math
import os
import sys
from contextlib import suppress

from tqdm import tqdm

log = logging.getLogger("startsparse")


def number(value: float, digits: int = 4) -> str:
    """A value with ``digits`` digits after the point, or as many significant ones below 0.1."""
    if not math.isfinite(value):
        return ""
    if abs(value) >= 10**6:
        return f"{value:.{digits}g}"
    return f"{value:.{decimals(value, digits)}f}"


def decimals(value: float, digits: int = 4) -> int:
    """How many digits `number` writes after the point."""
    significant = max(digits, 1)
    exponent = int(f"{value:.{significant - 1}e}".partition("e")[2])  # 0.0099999 counts as 0.01
    return max(digits, significant - 1 - exponent)


class _Console(logging.Handler):
    """Lines to standard output, between the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
            sys.stdout.flush()  # so that a file of the output can be read while the run goes on
        except BrokenPipeError:  # the reader has seen enough
            raise
        except OSError as error:
            _leave(error)


def _leave(error: OSError) -> None:
    """Print nothing more: the terminal is gone, say, or a file on a full disk; log.txt goes on."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = f"standard output cannot be written ({error.strerror})"
        print(f"warning: {reason}; log.txt has what follows", file=sys.stderr, flush=True)


log.setLevel(logging.INFO)
log.propagate = False
if not log.handlers:
    log.addHandler(_Console())
