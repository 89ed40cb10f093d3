"""Schedules: plain functions of progress, the share of the training done so far, in [0, 1]."""

import itertools
import math
from collections.abc import Callable


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine wave from ``start`` to ``end`` (Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def multistep(progress: float, start: float, end: float) -> float:
    """A tenth of ``start`` from 1/2 on, a hundredth from 3/4 on; never below ``end``."""
    return max(end, start * 0.1 ** ((progress >= 0.5) + (progress >= 0.75)))


def every30(progress: float, start: float, end: float) -> float:
    """A tenth at 30 %, again at 60 % and 90 %: every 30 epochs of 100; never below ``end``."""
    return max(end, start * 0.1 ** sum(progress >= step for step in (0.3, 0.6, 0.9)))


def constant(progress: float, start: float, end: float) -> float:  # noqa: ARG001
    """``start``, always."""
    return start


LEARNING_RATES: dict[str, Callable[[float, float, float], float]] = {
    "cosine": cosine,
    "multistep": multistep,
    "every30": every30,
    "constant": constant,
}
ALIASES = {
    "cosine_lr": "cosine",
    "multistep_lr": "multistep",
    "step": "multistep",
    "step_lr": "multistep",
    "constant_lr": "constant",
}


def learning_rate(
    policy: str, step: int, steps: int, *, start: float, end: float = 0.0, warmup: int = 0
) -> float:
    """The rate of step ``step`` of ``steps``, after ``warmup`` steps that rise linearly to it.

    The first warm-up step has start / warmup, the last has ``start``; the policy then runs over
    the steps that remain.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    return LEARNING_RATES[policy]((step - warmup) / max(1, steps - warmup), start, end)


def cubic(progress: float, start: float, end: float) -> float:
    """end + (start - end) (1 - progress)^3 (Zhu & Gupta 2017, arXiv:1710.01878, equation 1)."""
    return end + (start - end) * (1 - progress) ** 3


def geometric(start: float, keep: float, target: float) -> list[float]:
    """start * keep^k for k = 1, 2 ... while that is above ``target``, and then ``target``."""
    powers = itertools.takewhile(
        lambda density: density > target * (1 + 1e-9),
        (start * keep**k for k in itertools.count(1)),
    )
    return [*(float(f"{density:.6g}") for density in powers), target]
