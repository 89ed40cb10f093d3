"""Schedules: plain functions of progress, the fraction of the training that is done, in [0, 1].

Those of the learning rate also take the epoch, for drops at fixed epochs; a new one is a function
and a line in `LEARNING_RATES`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

Rate = Callable[[float, float, float, float], float]  # of progress, epoch, start, end


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine wave from ``start`` to ``end`` (Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def cosine_rate(progress: float, epoch: float, start: float, end: float) -> float:  # noqa: ARG001
    """`cosine`, as a rate."""
    return cosine(progress, start, end)


def multistep(progress: float, epoch: float, start: float, end: float) -> float:  # noqa: ARG001
    """A tenth of ``start`` from 1/2 on, a hundredth from 3/4 on; never below ``end``."""
    return max(end, start * 0.1 ** ((progress >= 0.5) + (progress >= 0.75)))


def every(epochs: int) -> Rate:
    """``start`` divided by 10 every ``epochs`` epochs of any training; ``end`` is ignored."""

    def rate(progress: float, epoch: float, start: float, end: float) -> float:  # noqa: ARG001
        return start * 0.1 ** (epoch // epochs)

    return rate


def constant(progress: float, epoch: float, start: float, end: float) -> float:  # noqa: ARG001
    """``start``, always."""
    return start


class Policy(NamedTuple):
    """A schedule of the learning rate.

    Attributes:
        rate: (progress, epoch, start, end) -> the rate.
        reads_end: whether it looks at ``end``, which is --lr-min.
    """

    rate: Rate
    reads_end: bool = False


LEARNING_RATES: dict[str, Policy] = {
    "cosine": Policy(cosine_rate, reads_end=True),
    "multistep": Policy(multistep, reads_end=True),
    "every30": Policy(every(30)),
    "every60": Policy(every(60)),
    "constant": Policy(constant),
}
ALIASES = {
    "cosine_lr": "cosine",
    "multistep_lr": "multistep",
    "step": "every60",
    "step_lr": "every60",
    "constant_lr": "constant",
}


def learning_rate(
    policy: str,
    step: int,
    steps: int,
    *,
    steps_per_epoch: int,
    start: float,
    end: float = 0.0,
    warmup: int = 0,
) -> float:
    """The rate of step ``step`` of ``steps``, of which the first ``warmup`` rise linearly.

    The first warm-up step has start / warmup, the last has ``start``. Progress runs over the steps
    after them. Epochs count from the first step, so a drop at epoch 30 does not depend on warm-up.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return LEARNING_RATES[policy].rate(progress, step / steps_per_epoch, start, end)


def cubic(progress: float, start: float, end: float) -> float:
    """end + (start - end) (1 - progress)^3 (Zhu & Gupta 2017, arXiv:1710.01878, equation 1)."""
    return end + (start - end) * (1 - progress) ** 3


def geometric(start: float, keep: float, target: float) -> list[float]:
    """Densities of pruning levels, falling: start * keep^k for k = 1 ... n - 1, then ``target``.

    n = round(log(target / start) / log(keep)), at least 1: the last level keeps between keep^1.5
    and keep^0.5 of the one before. Densities have six digits.

    Args:
        start: density before the first level.
        keep: fraction of the weights that a level keeps, in (0, 1).
        target: density of the last level.
    """
    count = round(math.log(target / start) / math.log(keep))
    levels = dict.fromkeys(float(f"{start * keep**k:.6g}") for k in range(1, count))
    return [*(level for level in levels if target < level < start), target]
