"""The C++ compiler: ``CXX``, or g++, as separate processes that never outlive the build."""

import errno
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from startsparse import threads
from startsparse.errors import UserError, one_line

_ANSWER, _LIMIT = 30, 600  # seconds that the compiler has to tell its version, and to build
_FULL = 1 << 24  # bytes: if a build has failed where fewer are left, that may be why


class NoKernelsError(UserError):
    """The kernels are not there and cannot be built, or cannot be loaded."""

    def __init__(self, reason: str):
        super().__init__(one_line(reason))


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C++.

    Attributes:
        words: the command, without arguments of ours.
        key: of the command and of what it says about its version.
    """

    words: list[str]
    key: str

    def run(self, jobs: Sequence[Sequence[str]], folder: Path) -> None:
        """Run it with each list of arguments, as many at a time as there are cores.

        Args:
            folder: for its messages and temporary files; `OSError` if that is full.

        Raises:
            NoKernelsError: it fails, or takes too long; says in one line why.
        """
        # Messages in English, and nothing outside the folder, whatever the user's TMPDIR is.
        env = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}
        waiting = [([*self.words, *job], folder / f"{i}.txt") for i, job in enumerate(jobs)]
        running: list[tuple[subprocess.Popen, Path]] = []
        deadline = time.monotonic() + _LIMIT
        try:
            while waiting or running:
                while waiting and len(running) < threads.cores():
                    command, said = waiting.pop(0)
                    with said.open("wb") as file:
                        running.append((_start(command, file, env), said))
                for process, said in [pair for pair in running if pair[0].poll() is not None]:
                    running.remove((process, said))
                    if process.returncode:
                        full = shutil.disk_usage(folder).free < _FULL
                        reason = _reason(process.returncode, said.read_bytes(), full)
                        raise NoKernelsError(f"{self.words[0]} cannot build the kernels: {reason}")
                if time.monotonic() > deadline:
                    took = f"has not built the kernels within {_LIMIT} s"
                    raise NoKernelsError(f"{self.words[0]} {took} (set CXX to another compiler)")
                time.sleep(0.01)
        finally:
            for process, _ in running:
                _kill(process)


def find_compiler() -> Compiler:
    """The compiler that ``CXX`` names, which may be several words, or g++.

    Raises:
        NoKernelsError: there is none, or it does not answer.
    """
    words = split("CXX") or ["g++"]
    if not shutil.which(words[0]):
        reason = f"there is no C++ compiler {words[0]} (set CXX, or install g++)"
        raise NoKernelsError(reason)
    process = _start([*words, "--version"], subprocess.PIPE, os.environ | {"LC_ALL": "C"})
    try:
        version, _ = process.communicate(timeout=_ANSWER)
    except subprocess.TimeoutExpired:
        reason = f"{words[0]} --version does not answer within {_ANSWER} s (set CXX to another)"
        raise NoKernelsError(reason) from None
    finally:
        _kill(process)
    digest = hashlib.blake2b(repr((words, version)).encode(), digest_size=6)
    return Compiler(words, digest.hexdigest())


def split(variable: str) -> list[str]:
    """The words of an environment variable, as a shell splits them.

    Raises:
        NoKernelsError: a quote is not closed.
    """
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        reason = f"{variable}: {str(error).lower()} in {value!r}"
        raise NoKernelsError(reason) from None


def _start(command: list[str], said: IO[bytes] | int, env: dict[str, str]) -> subprocess.Popen:
    """In a session of its own, so that `_kill` reaches what the compiler has started."""
    try:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        reason = f"the C++ compiler {command[0]} cannot be started ({error.strerror})"
        raise NoKernelsError(reason) from None


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(code: int, said: bytes, full: bool) -> str:
    text = said.decode(errors="replace")
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in text or full:  # then it could not even say so
            raise OSError(number, os.strerror(number))
    lines = [line.strip() for line in text.splitlines() if "error" in line]
    if lines:
        return lines[0][:200]
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
