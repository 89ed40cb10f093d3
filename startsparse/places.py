"""What a command will write, checked before it does anything that takes long."""

import os
import shutil
import tempfile
from pathlib import Path

from startsparse.errors import OptionError
from startsparse.names import shortened

ROOM = 4096  # bytes that a small file needs


def check_file(option: str, path: Path) -> None:
    """Raise `OptionError` unless the file can be written, and its folders made. Leaves nothing.

    A link counts as what it leads to.
    """
    if problem := _problem_of_file(Path(os.path.realpath(path))):
        raise OptionError(f"{option}: cannot write {shortened(str(path), 400)}: {problem}")


def check_folder(option: str, path: Path) -> None:
    """Raise `OptionError` unless files can be written into a folder, made if necessary."""
    if problem := _problem_of_folder(path):
        raise OptionError(f"{option}: cannot write into {shortened(str(path), 400)}: {problem}")


def check_room(option: str, path: Path, size: int) -> None:
    """Raise `OptionError` unless the disk of a folder, or of its parents, has ``size`` bytes free.

    Raises nothing where the disk does not say how much is free.
    """
    existing = next((p for p in (path, *path.absolute().parents) if p.is_dir()), None)
    try:
        free = shutil.disk_usage(existing or ".").free
    except OSError:
        return
    if free < size:
        raise OptionError(
            f"{option}: the disk of {shortened(str(path), 400)} has "
            f"{free / 2**20:,.0f} MiB free, and "
            f"the run needs {size / 2**20:,.0f}; make room or name another folder"
        )


def _problem_of_file(path: Path) -> str:
    try:
        if path.is_dir():
            return "it is a folder"
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return "it is no regular file"
        if path.exists() and not os.access(path, os.W_OK):
            return "it is read-only"
        size = path.stat().st_size if path.exists() else 0
    except OSError as error:
        return str(error.strerror)
    return _problem_of_folder(path.parent, size) or _problem_of_length(path, path.parent)


def _problem_of_folder(path: Path, size: int = 0) -> str:
    try:
        path = Path.cwd() / path
        existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        if not existing.is_dir():
            return f"{existing} {'leads nowhere' if existing.is_symlink() else 'is no folder'}"
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * (size + ROOM))
        return _problem_of_length(path, existing)
    except OSError as error:
        return str(error.strerror)


def _problem_of_length(path: Path, existing: Path) -> str:
    """Whether the file system of the folder ``existing`` has no names as long as in ``path``."""
    while not existing.is_dir():
        existing = existing.parent
    longest, whole = (os.pathconf(existing, name) for name in ("PC_NAME_MAX", "PC_PATH_MAX"))
    for part in path.parts:
        if len(os.fsencode(part)) > longest:
            return f"'{shortened(part)}' is longer than {longest} bytes"
    return "the path is too long" if len(os.fsencode(path)) + 256 > whole else ""
