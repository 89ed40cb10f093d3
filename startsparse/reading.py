"""Reading what others wrote: nothing waits for ever, and nothing is guessed."""

import errno
import json
import stat
from pathlib import Path
from typing import Any, TypeGuard

LARGEST = 2 << 30
"""Bytes of the largest file that `read_bytes` reads; all that this project reads are smaller."""


def regular(path: Path) -> None:
    """Raise OSError for what is there but is neither a file nor a folder: a pipe has no end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a file; raises OSError where it cannot be read, is no file or is too large."""
    regular(path)
    if path.stat().st_size > largest:
        raise OSError(errno.EFBIG, f"has more than {largest:,} bytes", str(path))
    return path.read_bytes()


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON text is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def strict_json(text: str | bytes, nan: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        nan: whether numbers may be NaN or infinite.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or names a key twice; one line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"names {twice!r} twice")
        return found

    def number(digits: str) -> float:
        value = float(digits)
        if not (nan or abs(value) < float("inf")):
            raise ValueError(f"{digits} is no finite number")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
