"""How much memory this machine has."""

import os
from contextlib import suppress

from startsparse import containers

_LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}  # version of cgroups -> file


def installed() -> float:
    """Bytes of memory: of the machine, or of the container if that has less; inf: not known."""
    sizes = [float("inf")]
    with suppress(AttributeError, ValueError, OSError):  # not on every platform
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for version, group in containers.groups("memory"):
        sizes += containers.numbers(group / _LIMITS[version]) or []
    return min(sizes)
