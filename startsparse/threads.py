"""How the threads of PyTorch wait for one another, and how many there are.

OpenMP's threads spin while they wait: libgomp's for milliseconds, libomp's and libiomp's for 200.
Beside other work on the same cores, a spinning thread keeps the thread that it waits for off its
core, and training takes several times as long. Threads that sleep at once slow a small network even
alone. A thousand spins, some 20 microseconds, cost nothing alone and little beside other work
(`benchmarks.beside`). OpenMP reads this setting when PyTorch loads it. So this module is imported
before torch, and imports nothing that loads torch.
"""

import math
import os
import sys
from pathlib import Path

from startsparse import containers

# By these the user decides on waiting, and on the number of threads.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# libomp and libiomp know only the first, and sleep at once.
SHORTLY = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}


def wait_shortly() -> None:
    """Let waiting threads sleep soon, unless the user decides on it or torch is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ.update(SHORTLY)


def fit() -> None:
    """Limit PyTorch's threads to the `cores`, unless the user decides on their number.

    PyTorch itself counts the cores that the process may run on, but ignores a container's limit.
    """
    import torch

    if not number_is_given() and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())


def number_is_given() -> bool:
    """Whether the user, or torchrun, decides on the number of threads."""
    return any(name in os.environ for name in NUMBER)


def cores() -> int:
    """Cores that this process may use: by its affinity, and by the CPU limit of its container.

    A limit of 1.5 cores counts as 2: threads that sleep while they wait share the limit.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, _limit())))


def _limit() -> float:
    """Cores that cgroups allow: the least limit of this process's group and its parents."""
    return min((_quota(*group) for group in containers.groups("cpu")), default=math.inf)


def _quota(version: int, group: Path) -> float:
    """Microseconds of CPU time in a period by those of the period; version 1 has -1 for none."""
    files = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    found = containers.numbers(*(group / name for name in files))
    return math.inf if not found or found[0] < 0 else found[0] / found[1]
