"""Lock files, also on file systems without locks."""

import errno
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

try:
    import fcntl
except ImportError:  # Windows, where filelock has another way
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("startsparse")

_warned: set[Path] = set()


@contextmanager
def locked(path: Path, what: str, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file ``path`` inside the block.

    On a file system without locks, such as some network file systems, one line warns, and the
    block runs unlocked: a lock file of another kind would stay after a crash and stop the next run.

    Args:
        what: what two processes must not do at once, for the warning.
        timeout: seconds to wait for it; below 0: until it is free.

    Raises:
        filelock.Timeout: another process holds it.
        OSError: it cannot be made.
    """
    missing = without_locks(path.parent)
    if missing:
        if path not in _warned:
            _warned.add(path)
            log.warning(
                "warning: %s: the file system has no locks (%s); let no two processes %s",
                path.parent,
                missing,
                what,
            )
        yield
        return
    with FileLock(path, timeout=timeout):
        yield


def without_locks(folder: Path) -> str:
    """Why files in ``folder`` cannot be locked; "" if they can. Raises OSError as a lock would."""
    if fcntl is None:
        return ""
    with tempfile.TemporaryFile(dir=folder) as file:  # of this process alone, so never taken
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")
    return ""
