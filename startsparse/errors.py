"""Errors that a user can cause: always one line, never a traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from startsparse import stopping, threads

# What to do about an OSError, where that is known.
_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EROFS: "name another folder, or mount it so that it can be written",
    errno.EACCES: "ask for the permission, or name another place",
    errno.EPERM: "ask for the permission, or name another place",
    errno.ENAMETOOLONG: "a name has at most 255 bytes",
    errno.EMFILE: "allow more, as in: ulimit -n 4096",
    errno.ENOTDIR: "name a folder",
    errno.EIO: "the disk or the connection to it is faulty",
    errno.ESTALE: "the network file system has lost it",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the user can put right. The message names the option or file and what to do."""

    exit_code = 1


class OptionError(UserError):
    """A bad option or YAML value, found before data or CUDA is touched."""

    exit_code = 2


class Interrupted(UserError):
    """The run was asked to stop and has saved its checkpoint."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def say(line: str) -> None:
    """Print a line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """A text on one line: names of files may hold any character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: BaseException) -> str:
    """What an error of a library or the system says, as one line."""
    inner = getattr(error, "reason", None)  # of a URLError
    if isinstance(inner, Exception):
        error = inner
    text = getattr(error, "strerror", None) or str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    text = lines[0].strip() if lines else type(error).__name__
    return one_line(text)


def about(error: OSError) -> str:
    """An OSError as one line: the file, what was wrong, and what to do where that is known."""
    name = error.filename
    if isinstance(name, str | bytes | os.PathLike):
        name = os.fsdecode(name)
    what = f"{name}: {reason(error)}" if name else reason(error)
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{what}; {remedy}" if remedy else what


def about_memory(error: BaseException) -> str:
    """A line about an error that says that memory has run out; "" for another error."""
    # torch has an error of its own for GPUs, and for the CPU one that only its text tells apart.
    gpu = type(error).__name__ == "OutOfMemoryError"
    if not (gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)):
        return ""
    asked = re.search(r"(tried|[Uu]nable) to allocate [\d.]+ \w+", str(error))
    said = f" ({asked[0].lower()})" if asked else ""
    return f"out of memory{said}; try a smaller --batch-size or network"


def run_script(main: Callable[[], int | None], say: Callable[[str], None] = say) -> None:
    """Run ``main`` and leave the process; what a user can cause becomes one line and an exit code.

    That is a `UserError`, an OSError, or an end of memory. `threads.fit` sets the number of CPU
    threads first. What a program does about signals is in `stopping`; the line that it prints when
    one stops it comes from here, too.
    """
    threads.fit()
    _open_streams()
    try:
        with stopping.unwinding():
            code = _exit_code(main)
            sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        _close_stdout()
        sys.exit(141)  # 128 + SIGPIPE, which Windows has not
    except UserError as error:
        _fail(say, str(error), error.exit_code)
    except OSError as error:
        _fail(say, about(error), UserError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not about_memory(error):
            raise
        _fail(say, about_memory(error), UserError.exit_code)
    except stopping.Stopped:
        stopping.leave(say)
    except KeyboardInterrupt:
        say("error: interrupted")
        sys.exit(130)


def _exit_code(main: Callable[[], int | None]) -> str | int | None:
    try:
        return main() or 0
    except SystemExit as stop:  # --help
        return stop.code
    except (Interrupted, stopping.Stopped):
        raise
    except Exception:
        if stopping.requested():  # what was at work has failed because of that
            raise stopping.Stopped(stopping.requested()) from None
        raise


def _open_streams() -> None:
    """Let standard output and error take every line: they may be closed, or know only ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nothing = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - stays open
            setattr(sys, name, nothing)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(say: Callable[[str], None], message: str, code: int) -> None:
    say(f"error: {one_line(message)}")
    try:
        sys.stdout.flush()
    except OSError:  # standard output is a file on a full disk
        _close_stdout()
    sys.exit(code)


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
