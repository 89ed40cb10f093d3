"""The project's log, and the console that it speaks to."""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("startsparse")


class _Console(logging.Handler):
    """Lines to standard output, between the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()  # where it is a file, that can be read while the run goes on


log.setLevel(logging.INFO)
log.propagate = False
if not log.handlers:
    log.addHandler(_Console())
