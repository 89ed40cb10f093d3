"""TensorBoard, which shows what the tables of a run hold, and so never ends a run."""

import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from startsparse.errors import reason

log = logging.getLogger("startsparse")


class Boards:
    """The event files of a run; after the first failure nothing more is shown.

    TensorBoard is another project, which writes from a thread of its own: whatever it raises, the
    run says it in one line and goes on.
    """

    def __init__(self, folder: Path):
        """Write to ``folder``/<board>."""
        self.folder = folder
        self._writers: dict[str, Any] | None = {}  # None: it has failed
        self._hook = threading.excepthook
        threading.excepthook = self._of_a_thread

    def show(self, board: str, values: dict[str, Any], step: int) -> None:
        """Show the numbers among ``values``; each board counts steps of its own.

        After a resumption, what the run had shown from ``step`` on disappears.
        """
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and name != "epoch" and not math.isnan(value)
        }

        def write(writers: dict[str, Any]) -> None:
            if board not in writers:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self.folder.mkdir(exist_ok=True)  # alone: a run folder that is gone stays gone
                writers[board] = SummaryWriter(self.folder / board, purge_step=step)
            for name, value in numbers.items():
                writers[board].add_scalar(name, value, step)
            writers[board].flush()

        self._try(write)

    def close(self) -> None:
        """Write what is left."""
        threading.excepthook = self._hook

        def close(writers: dict[str, Any]) -> None:
            for writer in writers.values():
                writer.close()

        self._try(close)

    def _of_a_thread(self, raised: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread keeps what it raises, and the next call here raises it again."""
        if not type(raised.thread).__module__.startswith("tensorboard."):
            self._hook(raised)

    def _try(self, action: Callable[[dict[str, Any]], None]) -> None:
        if self._writers is None:
            return
        try:
            action(self._writers)
        except Exception as error:
            self._writers = None
            log.warning("warning: TensorBoard shows nothing more of this run (%s)", reason(error))
