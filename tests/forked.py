"""Scripts as processes, forked from one that has done the slow imports.

A process of pytest cannot be forked itself: autograd has run in it, and would not work in a fork.
The tests of a script's options start it as a new process.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("STR.run_imp", "STR.main", "ER_DST.main", "ER_SLT.main"),  # these come before torch
        *("torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot"),
        *("sklearn.datasets", "sklearn.model_selection"),
    ]
)


class Script:
    """A script in its own process.

    Args:
        folder: of the files stdout and stderr with its output; is created.
        forks: whether the runs of a sweep are `Forked` too.
        kill_at: number of the operation on files below ``folder`` before which it is killed.
    """

    def __init__(
        self,
        script: Path,
        argv: Sequence[object],
        folder: Path,
        forks: bool = False,
        kill_at: int = 0,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.said = folder / "stdout", folder / "stderr"
        words = [str(script), *map(str, argv)]
        more = (forks, str(folder), kill_at)
        self._process = _CONTEXT.Process(target=_child, args=(words, self.said, *more), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None until the process has ended; minus the signal's number if a signal killed it."""
        return self._process.exitcode

    def wait(self) -> tuple[str, str]:
        """Wait for the end of the process; its stdout and stderr."""
        self._process.join(300)
        assert self.exit_code is not None
        out, err = (path.read_text() if path.exists() else "" for path in self.said)
        return out, err


class Forked:
    """Replaces `subprocess.Popen`, for a command that starts a script with Python."""

    def __init__(self, command: Sequence[str], env: dict[str, str], stdout: IO[str], **_: object):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            os._exit(_exit_code(command[1:], stdout.fileno(), stdout.fileno()))

    def poll(self) -> int | None:
        """The exit code; None while the process runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self) -> None:
        """Wait for the end of the process."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def _child(
    words: list[str], said: tuple[Path, Path], forks: bool, folder: str, kill_at: int
) -> None:
    if forks:
        from startsparse import jobs

        jobs.subprocess = SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT)
    out, err = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in said)
    if kill_at:
        _kill_at(kill_at, folder)
    os._exit(_exit_code(words, out, err))


def _kill_at(operation: int, folder: str) -> None:
    """Kill this process before an operation that changes files below the folder, counted from 1."""
    done = 0

    def look(event: str, args: tuple) -> None:
        nonlocal done
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
        if changes and str(args[0]).startswith(folder):
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def _exit_code(words: Sequence[str], out: int, err: int) -> int:
    """Run a script to its end, as in a new process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = words[1] if words[0] == "-m" else ""
    sys.argv = list(words[1:] if module else words)
    code = 0
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
