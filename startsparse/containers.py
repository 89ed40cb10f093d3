"""What a container allows this process: the limits of its cgroup and of the groups around it."""

from collections.abc import Iterator
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def groups(kind: str) -> Iterator[tuple[int, Path]]:
    """The groups that this process is in, from its own outwards: (version of cgroups, folder).

    Args:
        kind: of resource, "cpu" or "memory". Under version 1 each has groups of its own.
    """
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            version, root = 2, _CGROUPS
        elif kind in kinds.split(","):
            version, root = 1, _CGROUPS / kind
        else:
            continue
        own = root / path.strip("/")
        # A container may see its own group mounted as the root, whatever the group's path is.
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                yield version, group


def numbers(*files: Path) -> list[float] | None:
    """The numbers in ``files``; None where they cannot be read, or hold "max"."""
    try:
        words = [word for file in files for word in file.read_text(encoding="utf-8").split()]
        return [float(word) for word in words]
    except (OSError, ValueError):  # no such group here, or no limit can be set; "max"
        return None
