"""The phases of a training, and the position of a run in them."""

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
    warmup: int | None = None  # epochs of linear rise at its start; None: --warmup-length
    then: Callable[["Trainer"], None] = lambda _trainer: None  # called once, after the last epoch
    method: Method = PLAIN  # what its steps do besides descending
    select_from: int = 0  # earlier epochs of the phase are no candidates for the best
    drifts: bool = False  # training itself changes the density; the best epoch has the final one
    keeps_momentum: bool = False  # starts with the momentum buffers of the phase before


@dataclasses.dataclass
class Position:
    """Where a run stands: the next step is step ``step`` of epoch ``epoch`` of phase ``phase``."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
