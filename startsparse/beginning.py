"""The folder of a new run appears with all that resuming needs, or not at all."""

import hashlib
import itertools
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from startsparse import paths
from startsparse.atomic import sync_folder, write_text
from startsparse.commandline import write_yaml
from startsparse.errors import UserError
from startsparse.fields import flag
from startsparse.locks import locked
from startsparse.machine import ENVIRONMENT
from startsparse.options import Options

SOURCES = "sources"  # folder in the run folder
DIGESTS = "sha256.json"  # in that

_BEGIN = "begin a run at the same moment"
_NEW = ".new-"  # begins the name of a run folder that has no options.yaml yet
_LOCK = ".lock"


def free_folder(base: Path) -> Path:
    """The folder that a new run gets, unless another process is faster; it may exist if empty."""
    return next(
        folder
        for folder in _folders(base)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    )


def create(base: Path, options: Options, environment: dict[str, Any]) -> Path:
    """Make the folder of a new run, wherever it is killed with options.yaml or not at all.

    Args:
        base: the folder, or that with -2, -3 ... if it is taken.
        environment: for environment.json.

    Raises:
        UserError: a file of another run cannot be copied.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    _remove_never_begun(base.parent)
    with _new_folder(base.parent) as new:
        write_text(new / ENVIRONMENT, json.dumps(environment, indent=1) + "\n")
        _copy_sources(new, options)
        write_text(new / "options.yaml", write_yaml(paths.all_absolute(options)))
        for folder in _folders(base):
            try:
                new.rename(folder)  # also replaces an empty folder, on Unix
                sync_folder(base.parent)
                return folder
            except OSError:
                if not folder.exists():
                    raise
    raise AssertionError


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_or_original(folder: Path | None, options: Options, name: str) -> Path:
    """Where option ``name`` leads: to its copy in the run folder, or to what the user named."""
    original = Path(getattr(options, name))
    copy = folder and folder / SOURCES / name
    if not copy or not copy.exists():
        return original
    file = copy / original.name  # the option named a file
    return file if file.is_file() else copy


def _folders(base: Path) -> Iterator[Path]:
    """``base``, and the same with -2, -3 ...: no run ever overwrites another."""
    yield base
    for count in itertools.count(2):
        yield base.with_name(f"{base.name}-{count}")


@contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed after the block unless renamed; a lock beside it says: at work."""
    new = parent / f"{_NEW}{secrets.token_hex(4)}"
    lock = new.with_name(f"{new.name}{_LOCK}")
    try:
        with locked(lock, _BEGIN):
            new.mkdir()
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        lock.unlink(missing_ok=True)


def _remove_never_begun(folder: Path) -> None:
    """Remove what `create` has left in ``folder`` where it was killed."""
    for lock in folder.glob(f"{_NEW}*{_LOCK}"):
        with suppress(Timeout, OSError):  # at work, or another user's
            with locked(lock, _BEGIN, 0):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)


def _copy_sources(folder: Path, options: Options) -> None:
    """Copy the files of other runs that this one uses, so that it no longer needs them."""
    digests = {}
    for name, files in options.sources().items():
        for inside, path in files.items():
            copy = folder / SOURCES / name / inside
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, copy)
            except OSError as error:
                reason = f"cannot copy {path} to {copy}: {error.strerror}"
                raise UserError(f"{flag(name)}: {reason}") from None
            digests[f"{name}/{inside}"] = digest(copy)
    if digests:
        write_text(folder / SOURCES / DIGESTS, json.dumps(digests, indent=1) + "\n")
