"""The project's log, and the console that it speaks to."""

import logging

from tqdm import tqdm

log = logging.getLogger("startsparse")


class _Console(logging.Handler):
    """Lines to standard output, between the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


log.setLevel(logging.INFO)
log.propagate = False
if not log.handlers:
    log.addHandler(_Console())
