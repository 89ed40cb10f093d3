"""SIGINT, SIGTERM and SIGHUP: a program ends soon, with one line, and loses nothing.

Importing, a program ends at once (`watch`). Then a signal raises `Stopped` wherever the program is,
so that temporary files go (`unwinding`). In an epoch of training it is noted, and the epoch saves a
checkpoint first (`StopSignal`). A second signal ends the program at once. Signals that are ignored
when the program starts, as nohup ignores SIGHUP, stay ignored.

SIGUSR1 and SIGUSR2 do the same, but never end a program at once, however often they come: Slurm
sends them before a time limit, and SIGTERM may follow while the checkpoint is being saved.

A program imports this module before all others: it imports nothing slow.
"""

import contextlib
import dataclasses
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
WARNINGS = [getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2") if hasattr(signal, n)]

_PATIENCE = 3.0  # seconds that unwinding may take: a library may keep an exception to itself
_AT_ONCE = 0.3  # seconds in which the handler ends a program that does not unwind
_LOOK = 1.0  # seconds between two looks whether torchrun is still there
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
        pipe: gets a byte for each signal, for `_listen`. None in a program of somebody else, whose
            handlers take over after the first signal, and on Windows.
        first: the signal that came first, and when; 0: none.
        unwinds: whether `Stopped` may be raised.
        notes: notes signals instead, if set.
        children: processes that end with this one.
        advice: how to go on, for a signal that comes now.
        parent: the process that started this one.
        handled: whether the handler has been called.
        reason: why the program stops, and how to go on.
        said: whether that was printed.
    """

    before: dict[int, Any] = dataclasses.field(default_factory=dict)
    pipe: tuple[int, int] | None = None
    first: tuple[int, float] = (0, 0.0)
    unwinds: bool = False
    notes: StopSignal | None = None
    children: set[subprocess.Popen] = dataclasses.field(default_factory=set)
    advice: str = ""
    handled: bool = False
    parent: int = 0
    reason: str = ""
    said: bool = False


_program = _Program()


def watch() -> None:
    """From now on, a signal ends this program with one line; to be called first of all."""
    _open_standard()
    if _program.before or not _install([*SIGNALS, *WARNINGS]):
        return
    _program.parent = os.getppid()
    if hasattr(os, "fork"):  # Windows wakes up no pipes
        _program.pipe = os.pipe()
        os.set_blocking(_program.pipe[1], False)
        signal.set_wakeup_fd(_program.pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(_program.pipe[0],), daemon=True).start()


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


def is_orphan() -> bool:
    """Whether torchrun has started this process and is gone, killed: it ends its processes."""
    return _started_by_torchrun() and _program.parent not in (0, os.getppid())


def leave(say: Callable[[str], None]) -> None:
    """Say why, and end the process; other threads and children of it may be at work."""
    _program.said = True
    say(f"error: {_program.reason}")
    end_children()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(128 + requested())


def end_children() -> None:
    """End what this program has started."""
    _end_adopted()
    if "multiprocessing" in sys.modules:
        for worker in sys.modules["multiprocessing"].active_children():
            worker.terminate()


def _open_standard() -> None:
    """Open the standard descriptors that are closed: else the next files would get their numbers,
    and the lines that are printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _install(signals: Sequence[int] = SIGNALS) -> bool:
    """Handle the signals; whether that is possible, as it is in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return False
    heeded = [s for s in signals if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    _program.before = {signum: signal.signal(signum, _handle) for signum in heeded}
    _program.first, _program.handled = (0, 0.0), False
    return True


def _uninstall() -> None:
    for signum, handler in _program.before.items():
        signal.signal(signum, handler)
    _program.before, _program.first = {}, (0, 0.0)


def _handle(signum: int, _frame: FrameType | None) -> None:
    """The handler, which Python calls between two instructions of the main thread."""
    program = _program
    if program.handled:
        if program.pipe is None:  # else `_listen` counts: of signals close together one comes here
            _end_now(signum)
        return
    program.handled = True
    _note_first(signum)
    if program.pipe is None:
        for number, handler in program.before.items():
            signal.signal(number, handler)
    if program.notes:
        program.notes.note(signum)
    elif program.unwinds:
        _end_adopted()
        raise Stopped(signum)
    else:
        leave(_say)


def _listen(pipe: int) -> None:
    """End the program at a second signal, or if it does not end itself: it may hang in a library.

    A thread, as the main thread handles no signal while it is in a library. It also stops a process
    of torchrun when torchrun is killed.
    """
    came, heard, deadline = 0, 0, math.inf
    while True:
        left = min(deadline - time.monotonic(), _LOOK if _started_by_torchrun() else math.inf)
        ready, _, _ = select.select([pipe], [], [], None if left == math.inf else max(left, 0))
        if time.monotonic() >= deadline:
            if not _program.said:
                _say(f"error: {_program.reason}")
            _end_now(requested())
        if not heard and is_orphan():
            os.kill(os.getpid(), signal.SIGTERM)
        for signum in os.read(pipe, 1024) if ready else b"":
            if signum not in _program.before:
                continue
            _note_first(signum)
            came, (_, since) = came + (signum not in WARNINGS), _program.first
            now = time.monotonic()
            if came > 1 and not (_started_by_torchrun() and now - since < _ECHO):
                _end_now(signum)
            heard += 1
            if heard == 1 and not _program.notes:
                deadline = now + (_PATIENCE if _program.unwinds else _AT_ONCE)


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _note_first(signum: int) -> None:
    if not _program.first[0]:
        advice = _program.advice and f"; {_program.advice}"
        _program.reason = f"stopped by {signal.Signals(signum).name}{advice}"
        _program.first = signum, time.monotonic()


def _end_now(signum: int) -> None:
    _end_adopted()
    os._exit(128 + signum)


def _end_adopted() -> None:
    for process in list(_program.children):
        process.terminate()


def _say(line: str) -> None:
    """Print a line, wherever the program is; only the first of several processes does."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


_forking = threading.local()


def _hold() -> None:
    """Before a fork: a signal for the child must not come while it has the handlers of this one."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _program.before)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget() -> None:
    """In a forked process: signals are its own affair."""
    if _program.before:
        if _program.pipe:
            signal.set_wakeup_fd(-1)
            for end in _program.pipe:
                os.close(end)
        _uninstall()
        _program.__init__()  # type: ignore[misc]
    _let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
