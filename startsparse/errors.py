"""Errors that a user can cause: always one line, never a traceback."""

import os
import sys
from collections.abc import Callable

from startsparse import stopping, threads


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
    """The text with control characters and line breaks, which a bad value can hold, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_script(main: Callable[[], int | None], say: Callable[[str], None] = say) -> None:
    """Run ``main`` and leave the process; a `UserError` becomes one line and its exit code.

    `threads.fit` sets the number of CPU threads first. What a program does about signals is in
    `stopping`; the line that it prints when one stops it comes from here, too.
    """
    threads.fit()
    try:
        with stopping.unwinding():
            code = _exit_code(main)
            sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, which Windows has not
    except UserError as error:
        say(f"error: {one_line(str(error))}")
        sys.exit(error.exit_code)
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
