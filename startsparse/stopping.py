"""SIGINT, SIGTERM and SIGHUP: a program ends soon, with one line, and loses nothing.

Importing, a program ends at once (`watch`). Then a signal raises `Stopped` wherever the program is,
so that temporary files go (`unwinding`). In an epoch of training it is noted, and the epoch saves a
checkpoint first (`StopSignal`). A second signal ends the program at once. Signals that are ignored
when the program starts, as nohup ignores SIGHUP, stay ignored.

A program imports this module before all others: it imports nothing slow.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

_PATIENCE = 3.0  # seconds that unwinding may take, where code keeps an exception to itself
_ECHO = 2.0  # seconds in which torchrun may send to its processes again what it was sent


class Stopped(KeyboardInterrupt):
    """The program was asked to stop."""


class StopSignal:
    """Inside it, signals are noted instead of ending the program.

    Attributes:
        received: the signal that this process got; 0: none.
        agreed: the signal by which this process stops, after the same step as all others; 0: none.
    """

    def __init__(self, alone: bool = True) -> None:
        """``alone``: whether no other process of the run has to agree."""
        self.alone = alone
        self.received, self.agreed = 0, 0
        self._own = False

    def __enter__(self) -> "StopSignal":
        self._own = not _program.before and _install()
        _program.notes = self
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        _program.notes = None
        if self._own:
            _uninstall()
        elif self.received and kind is None:  # it came after the block had looked for the last time
            raise Stopped(self.received)

    def agree(self, any_process: bool) -> None:
        """Note whether any process was asked to stop."""
        if any_process:
            self.agreed = self.received or signal.SIGTERM

    def note(self, signum: int) -> None:
        """Note a signal."""
        self.received = signum
        if self.alone:
            self.agreed = signum


@dataclasses.dataclass
class _Program:
    """What this process does about signals.

    Attributes:
        before: signal -> its handler before `_install`; empty: nothing is done.
        pipe: gets a byte for each signal; None in a program of somebody else, who may need it.
        calls, bytes: signals that were handled, and that came. Python handles signals between two
            instructions, and of several that came meanwhile only one.
        first: the signal that came first, and when; 0: none.
        unwinds: whether `Stopped` may be raised.
        notes: notes signals instead, if set.
        children: processes that end with this one.
        advice: how to go on, for a signal that comes now.
        reason: the line that is printed.
    """

    before: dict[int, Any] = dataclasses.field(default_factory=dict)
    pipe: tuple[int, int] | None = None
    calls: int = 0
    bytes: int = 0
    first: tuple[int, float] = (0, 0.0)
    unwinds: bool = False
    notes: StopSignal | None = None
    children: set[subprocess.Popen] = dataclasses.field(default_factory=set)
    advice: str = ""
    reason: str = ""


_program = _Program()


def watch() -> None:
    """From now on, a signal ends this program with one line; to be called first of all."""
    if _program.before or not _install():
        return
    if hasattr(os, "fork"):  # signals do not wake up files on Windows
        _program.pipe = os.pipe()
        for end in _program.pipe:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(_program.pipe[1], warn_on_full_buffer=False)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Inside it, signals raise `Stopped`; outside, where nothing can be lost, they end at once."""
    _program.unwinds = True
    try:
        yield
    finally:
        _program.unwinds = False


def adopt(process: subprocess.Popen) -> None:
    """A signal that ends the program ends ``process``, too."""
    _program.children.add(process)


@contextlib.contextmanager
def advice(text: str) -> Iterator[None]:
    """Inside it, a program that is stopped says ``text``: how to go on."""
    before, _program.advice = _program.advice, text
    try:
        yield
    finally:
        _program.advice = before


def requested() -> int:
    """The signal that asked this program to stop; 0: none."""
    return _program.first[0]


def reason() -> str:
    """Why the program stops, and how to go on, for a line of its own."""
    return _program.reason


def leave() -> None:
    """End the process, whose files are closed; other threads and children may be at work."""
    _end_children()
    if "multiprocessing" in sys.modules:
        for worker in sys.modules["multiprocessing"].active_children():
            worker.terminate()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(128 + requested())


def _install() -> bool:
    """Handle the signals; whether that is possible, as it is in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return False
    heeded = [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    _program.before = {signum: signal.signal(signum, _handle) for signum in heeded}
    _program.calls, _program.bytes, _program.first = 0, 0, (0, 0.0)
    return True


def _uninstall() -> None:
    for signum, handler in _program.before.items():
        signal.signal(signum, handler)
    _program.before = {}


def _handle(signum: int, _frame: FrameType | None) -> None:
    program, now = _program, time.monotonic()
    program.calls += 1
    program.bytes += _came()
    first, since = program.first
    echoes = "TORCHELASTIC_RUN_ID" in os.environ
    if max(program.calls, program.bytes) > 1 and not (echoes and now - (since or now) < _ECHO):
        _end_now(signum)
    if first:
        return
    program.first = signum, now
    advice = program.advice and f"; {program.advice}"
    program.reason = f"stopped by {signal.Signals(signum).name}{advice}"
    if not (echoes or program.children):  # else `_handle` ends them at the second signal
        for number, handler in program.before.items():
            signal.signal(number, signal.SIG_DFL if program.pipe else handler)
    if program.notes:
        program.notes.note(signum)
    elif not program.unwinds:
        _say()
        leave()
    else:
        _end_children()
        threading.Thread(target=_lose_patience, daemon=True).start()
        raise Stopped(signum)


def _came() -> int:
    """How many signals came since the last call."""
    if _program.pipe is None:
        return 0
    try:
        return sum(byte in _program.before for byte in os.read(_program.pipe[0], 1024))
    except BlockingIOError:
        return 0


def _end_now(signum: int) -> None:
    _end_children()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _end_children() -> None:
    for process in list(_program.children):
        process.terminate()


def _lose_patience() -> None:
    time.sleep(_PATIENCE)
    _say()
    leave()


def _say() -> None:
    """Print why the program ends, wherever it is: only the first of several processes does."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"error: {reason()}\n".encode())


def _forget() -> None:
    """In a forked process: signals are its own affair."""
    if _program.before:
        if _program.pipe:
            signal.set_wakeup_fd(-1)
            for end in _program.pipe:
                os.close(end)
        _uninstall()
        _program.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
