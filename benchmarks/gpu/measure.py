"""Counts of one program: what is launched, what waits for the device, and where."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile

from benchmarks.gpu.networks import Noting, Program, Sizes, synchronize
from startsparse import profiling

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / name) for name in ("startsparse", "STR", "ER_DST", "ER_SLT"))


def counts(seen: profile, device: torch.device) -> dict[str, float]:
    """What a profiler saw: launches, copies, waits, and milliseconds of kernels.

    On a CPU a launch is an operation.
    """
    found = profiling.operations(seen, device)
    parts = {"launches": "LaunchKernel", "copies": "Mem", "waits": "Synchronize"}
    if device.type == "cpu":
        parts = {"launches": "aten::"}
    calls = {n: sum(o.calls for o in found if word in o.name) for n, word in parts.items()}
    return {**calls, "kernel_ms": sum(o.milliseconds for o in found)}


def per_step(run: Callable[[int], object], sizes: Sizes) -> tuple[dict[str, float], list]:
    """The `counts` of one of the steps that ``run(steps)`` does, and the longest operations.

    It is the difference of two calls, so that their beginnings and ends do not count.
    """
    device, (few, many) = sizes.device, (2, 2 + sizes.steps // 3)
    run(few)
    sides = []
    for steps in (few, many):
        synchronize(device)
        with profiling.new_profile(device) as seen:
            run(steps)
            synchronize(device)
        sides.append(counts(seen, device))
    steps = many - few
    found = {name: (sides[1][name] - sides[0][name]) / steps for name in sides[0]}
    longest = [
        [o.name[:80], round(o.milliseconds / many, 4), round(o.calls / many, 1)]
        for o in profiling.operations(seen, device)[: profiling.LONGEST]
    ]
    return found, longest


def host_ms(program: Program) -> float:
    """Milliseconds that Python needs to issue a step while the GPU does not make it wait.

    The launches of two steps fit into CUDA's queue, so only their Python is timed.
    """
    taken = []
    for _ in range(program.sizes.repeats):
        program.epoch(3)
        first, _, last = program.learner.began
        taken.append((last - first) / 2)
    return 1e3 * sorted(taken)[len(taken) // 2]


def waits(program: Program, steps: int) -> dict[str, float]:
    """Lines of the project that make a step wait for the GPU -> how often in a step.

    Found by CUDA's own detector; what an epoch waits for at its beginning and end does not count.
    """
    with noted(program.learner) as places, detector(program.sizes.device):
        program.epoch(steps)
    return {place: count / steps for place, count in places.most_common()}


@contextmanager
def detector(device: torch.device) -> Iterator[None]:
    """Within it CUDA warns of each operation that waits."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def noted(learner: Noting) -> Iterator[Counter[str]]:
    """A table of the lines of the project that are warned of while the learner is in a step."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: object) -> None:
        if "synchroniz" in str(message) and learner.step is not None:
            places[_line_of_ours()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield places


def _line_of_ours() -> str:
    """The innermost line of the project that is being executed, as file:line."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
