"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; a block that succeeds replaces ``path`` by it.

    The new file is synced to disk first. Creates a missing folder. Raises OSError where it cannot
    write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique: several processes may write the same file at the same time.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files of `replacing` that killed processes left in a folder.

    Only for who holds a lock that keeps others from writing there.

    Args:
        name: of the files that they should have replaced; * stands for any.
    """
    for path in folder.glob(f".{name}-????????"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)
