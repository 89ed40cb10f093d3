"""SIGINT and SIGTERM in training: the current step ends, and a checkpoint is saved."""

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
    """Inside it, signals are noted instead of ending the process.

    Attributes:
        received: the signal that this process got; 0: none.
        agreed: the signal by which this process stops, after the same step as all others; 0: none.
    """

    def __init__(self) -> None:
        self.received, self.agreed = 0, 0
        self._before: dict = {}

    def __enter__(self) -> "StopSignal":
        self._before = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def agree(self, any_process: bool) -> None:
        """Note whether any process was asked to stop."""
        if any_process:
            self.agreed = self.received or signal.SIGTERM

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signum
        if processes.world_size() == 1:
            self.agreed = signum
            # A second signal ends it at once. Under torchrun it may be the first one, repeated.
            signal.signal(signum, signal.SIG_DFL)
