"""The parts of a training, one after the other, and where a run stands in them."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from startsparse.method import PLAIN, Method

if TYPE_CHECKING:
    from startsparse.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some epochs under one learning-rate schedule."""

    name: str
    epochs: int
    lr_policy: str
    lr_min: float = 0.0
    warmup: int | None = None  # first epochs, of a linear rise; None: --warmup-length
    then: Callable[["Trainer"], None] = lambda _trainer: None  # done once, after the last epoch
    method: Method = PLAIN  # what its steps do besides descending
    select_from: int = 0  # epochs before this one, of this phase, are no candidates for the best
    drifts: bool = False  # density changes by training itself; the best epoch has that of the last
    keeps_momentum: bool = False  # of the phase before, where weights go on from there


@dataclasses.dataclass
class Position:
    """Where a run stands: the next step is step ``step`` of epoch ``epoch`` of phase ``phase``."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
