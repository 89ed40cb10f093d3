"""Files that are written whole or not at all."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; a block that succeeds replaces ``path`` by it.

    File and folder are synced to disk, so that after a power loss the old content is there, or the
    new one. (On macOS the disk may still hold it in its own cache: F_FULLFSYNC is not asked for.)
    A file that is replaced keeps its mode and group; a new one has those that umask and folder
    give. Where ``path`` is a link, the file that it leads to is replaced.

    Args:
        make_folder: create a missing folder. A run does not: its folder was removed.

    Raises:
        OSError: it cannot be written; ``filename`` is ``path``.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = None
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_beside(path)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None or error.filename == str(temporary):
            error.filename = str(path)  # a write on a full disk names no file
        raise
    finally:
        if temporary:
            with suppress(OSError):  # the folder may be gone, or the disk
                temporary.unlink(missing_ok=True)


def _new_beside(path: Path) -> Path:
    """A new empty file in the folder of ``path``, with the mode and group that ``path`` has."""
    try:
        old = path.stat()
    except FileNotFoundError:
        old = None
    if old and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if old and not path.is_file():  # a device or pipe, which would be gone afterwards
        raise OSError(errno.EINVAL, "is no ordinary file", str(path))
    while True:
        # Unique: several processes may write the same file. Cut: a name has at most 255 bytes.
        temporary = path.with_name(f".{path.name[:50]}-{secrets.token_hex(4)}")
        try:
            # Unlike tempfile, whose files are private, this leaves the mode to umask and folder.
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            break
        except FileExistsError:
            continue
    if old:
        with suppress(OSError):  # only root may give files away; others keep what they can
            _take_group(temporary, old)
        with suppress(OSError):  # some file systems have one mode for all files
            temporary.chmod(old.st_mode & 0o7777)
    return temporary


def _take_group(path: Path, other: os.stat_result) -> None:
    new = path.stat()
    if hasattr(os, "chown") and (new.st_uid, new.st_gid) != (other.st_uid, other.st_gid):
        user = other.st_uid if os.geteuid() == 0 else -1
        os.chown(path, user, other.st_gid)


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to disk, where the system can: a rename is lasting after that."""
    with suppress(OSError):  # Windows opens no folders, and some file systems sync none
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files of `replacing` that killed processes left in a folder.

    Only for who holds a lock that keeps others from writing there.

    Args:
        name: of the files that they should have replaced; * stands for any.
    """
    for path in folder.glob(f".{name[:50]}-????????"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, make_folder: bool = True) -> None:
    """Write a text file in UTF-8, whole or not at all; see `replacing`."""
    with replacing(path, make_folder=make_folder) as temporary:
        temporary.write_text(text, encoding="utf-8")
