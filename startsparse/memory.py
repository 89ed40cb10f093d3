"""How much memory this machine has."""

import os
from contextlib import suppress
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of this process's container


def installed() -> float:
    """Bytes of memory: of the machine, or of the container if that has less; inf: not known."""
    sizes = [float("inf")]
    with suppress(AttributeError, ValueError, OSError):  # not on every platform
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no container, or "max"
        sizes.append(float(_LIMIT.read_text(encoding="utf-8")))
    return min(sizes)
