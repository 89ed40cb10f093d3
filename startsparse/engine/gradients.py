"""Gradients of a tensor that is no scalar."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(y: Tensor, wanted: Sequence[Tensor], d_y: Tensor) -> tuple[Tensor, ...]:
    """The gradients by ``wanted`` where that by ``y`` is ``d_y``.

    `torch.autograd.grad` with its argument ``grad_outputs`` would do; but that imports sympy when
    it is first used, which takes a tenth of the time to a run's first step.
    """
    with torch.enable_grad():
        return torch.autograd.grad(_Into.apply(y, d_y), wanted)


class _Into(torch.autograd.Function):
    """A number whose gradient by y is d_y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, d_y: Tensor) -> Tensor:
        ctx.save_for_backward(d_y)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None
