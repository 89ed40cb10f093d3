"""Options that are paths: ~ stands for a home, and relative ones count from the working folder."""

import dataclasses
import os
from pathlib import Path
from typing import TypeVar

from startsparse.errors import OptionError
from startsparse.fields import PATH, SOURCE, extras, flag, shown

T = TypeVar("T")  # a dataclass of options


def expanded(path: str, option: str) -> str:
    """The path with the home folder that a leading ~ or ~user stands for.

    Raises:
        OptionError: there is no such user, or no home folder is known.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        user = Path(path).parts[0][1:]
        why = f"there is no user '{user}'" if user else "no home folder is known; set HOME"
        raise OptionError(f"{option}: '{path}': {why}; ./~ begins a name with ~") from None


def settled(options: T) -> T:
    """The options with `expanded` paths; files of other runs become absolute.

    The latter show up in tables and tickets, which are the same after a resumption elsewhere.
    """
    flags = {name: flag(shown(type(options))[name]) for name in shown(type(options))}
    changes = {}
    for name, path in _paths(options).items():
        changes[name] = expanded(path, flags[name])
        if SOURCE in extras(type(options))[name] and path:
            changes[name] = absolute(changes[name])
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


def all_absolute(options: T) -> T:
    """The options with absolute paths, for a file that is read in another working folder."""
    paths = {name: absolute(path) for name, path in _paths(options).items() if path}
    paths.pop("resume", None)  # auto, or the folder of that file
    return dataclasses.replace(options, **paths)  # type: ignore[type-var]


def absolute(path: str) -> str:
    """The path from the root on; links stay."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve would follow links


def _paths(options: object) -> dict[str, str]:
    """The options that are paths."""
    kinds = extras(type(options))
    names = [name for name in kinds if PATH in kinds[name] or SOURCE in kinds[name]]
    return {name: getattr(options, name) for name in names}
