"""A run as a job of a cluster: what submitit pickles, and calls on the machine of the job.

Slurm warns a job before its time limit, and before another job takes its place. submitit handles
the warning: it calls `Remote.checkpoint`, which stops the run with a checkpoint, and puts the job
back into the queue, where it continues as the same run (--resume auto).

A job of the cluster imports this module. It imports nothing slow.
"""

import dataclasses
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

_LOOK = 0.1  # seconds between two looks whether the run has ended
_REQUEUED = 60.0  # seconds after SIGTERM in which Slurm or submitit puts the job back, or kills it


@dataclasses.dataclass
class Remote:
    """Runs a command, and stops it when the cluster asks.

    Attributes:
        command: as of `jobs.Job.command`.
        folder: where it runs.
        log: gets its output.
    """

    command: list[str]
    folder: str
    log: str
    _process: subprocess.Popen | None = None
    _codes: list[int] = dataclasses.field(default_factory=list)
    _asked: bool = False

    def __call__(self) -> None:
        """Run the command to its end.

        Raises:
            RuntimeError: it has failed, or was stopped for good.
        """
        os.chdir(self.folder)
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.log).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._begin(process)
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        code = self._end()
        if self._asked and stopped(code):  # the job is now put back, or killed
            time.sleep(_REQUEUED)
        if code:
            raise RuntimeError(f"the run ended with exit code {code}; see {self.log}")

    def checkpoint(self) -> Any:
        """Stop the run; submitit calls this, and puts back into the queue what it returns.

        Returns:
            The submission that continues the run; None: it has failed.

        Raises:
            SystemExit: the run has finished meanwhile.
        """
        from submitit.helpers import DelayedSubmission

        again = DelayedSubmission(Remote(self.command, self.folder, self.log))
        if self._process is None:
            return again
        self._stop()
        code = self._end()
        if code == 0:
            raise SystemExit(0)
        return again if stopped(code) else None

    def _begin(self, process: subprocess.Popen) -> None:
        """Follow a process. Its end is awaited by a thread: handlers of signals wait here, too, and
        would wait for ever for a lock of `subprocess` that the main thread held when they came.
        """
        self._process = process
        threading.Thread(target=lambda: self._codes.append(process.wait()), daemon=True).start()

    def _end(self) -> int:
        while not self._codes:
            time.sleep(_LOOK)
        return self._codes[0]

    def _stop(self) -> None:
        """Ask for a checkpoint. The cluster may have asked the run itself, which is no matter."""
        self._asked = True
        if self._process and not self._codes:
            self._process.send_signal(signal.SIGUSR2)


def stopped(code: int) -> bool:
    """Whether a process that ended with this code was stopped by a signal."""
    return code < 0 or code > 128
