"""SIGINT and SIGTERM in training: the step that is under way ends, and a checkpoint is saved."""

import signal
from types import FrameType

from startsparse import processes
from startsparse.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(UserError):
    """The run was asked to stop and has saved its checkpoint."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignal:
    """Within it, signals are noted instead of ending the process.

    Attributes:
        asked: the signal that this process got; 0: none.
        agreed: the signal by which this process stops, after the same step as all others; 0: none.
    """

    def __init__(self) -> None:
        self.asked, self.agreed = 0, 0
        self._before: dict = {}

    def __enter__(self) -> "StopSignal":
        self._before = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def agree(self, any_process: bool) -> None:
        """Take note of whether any process was asked to stop."""
        if any_process:
            self.agreed = self.asked or signal.SIGTERM

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.asked = signum
        if processes.world_size() == 1:
            self.agreed = signum
            # A second one stops at once. Under torchrun it may be the same one, passed on.
            signal.signal(signum, signal.SIG_DFL)
