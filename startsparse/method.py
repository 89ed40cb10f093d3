"""What a method of training does in a step besides descending, and what it needs for that.

The training loop (`training.train_epoch`) calls one object in each step. A loop of your own makes
the same calls at the same points.
"""

from typing import Literal

import torch
from torch import nn

When = Literal["never", "at updates", "always"]
"""In which steps something is needed; an update is a step that may move masks."""


class Method:
    """Plain descent; a subclass overrides what its method does.

    Steps are numbered from 0 through a phase of the training.

    Attributes:
        dense_gradients: in which steps the gradients outside the masks are needed. FLOPs
            (`flops.Ledger`) and the sparse form of a network (`Trainer`) follow from it.
    """

    dense_gradients: When = "never"

    def moves_masks(self, step: int) -> bool:  # noqa: ARG002
        """Whether ``step`` is an update: `after_backward` may change masks in it."""
        return False

    def needs_dense_gradients(self, step: int) -> bool:
        """Whether ``step`` needs the gradients outside the masks."""
        if self.dense_gradients == "at updates":
            return self.moves_masks(step)
        return self.dense_gradients == "always"

    def before_step(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called before the forward pass."""

    def after_backward(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called after the backward pass, before the gradients outside the masks are zeroed.

        A method that moves masks also zeroes weights and optimizer state outside them
        (`masks.keep_inside`).
        """

    def after_step(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called when the optimizer has moved the weights."""


PLAIN = Method()
"""Descent and nothing else."""
