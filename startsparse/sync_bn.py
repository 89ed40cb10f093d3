"""BatchNorm over the examples of all processes: --sync-bn."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse import processes


@contextlib.contextmanager
def synced(model: nn.Module) -> Iterator[None]:
    """Inside it, BatchNorm of ``model`` normalises by the examples of all processes in training.

    Only the class of the layers changes: scores, checkpoints and exports see ordinary ones.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    kinds = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = _SyncBatchNorm
        yield
    finally:
        for layer, kind in zip(layers, kinds):
            layer.__class__ = kind


class _SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's, which is for GPUs, and the same on CPUs."""

    process_group = None  # all

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        if processes.world_size() == 1 or not self.training:
            return _BatchNorm.forward(self, images)
        if images.device.type != "cpu":
            return super().forward(images)
        dims = [dim for dim in range(images.dim()) if dim != 1]
        shape = [1, -1, *[1] * (images.dim() - 2)]
        values = images.float()
        ones = values.new_full((1,), values.numel() // values.shape[1])
        sums = _Sum.apply(torch.cat([values.sum(dims), ones]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        self._remember(mean, variance * (count / (count - 1)))
        normed = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normed = torch.addcmul(self.bias.view(shape), normed, self.weight.view(shape))
        return normed.to(images.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as BatchNorm does."""
        if self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(now, factor)  # type: ignore[union-attr]  # all three are there


class _Sum(torch.autograd.Function):
    """The sum over the processes."""

    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:
        """Of a shape that is the same in all processes."""
        return processes.all_reduce(part.clone())

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        """The losses of all processes depend on the sum."""
        return processes.all_reduce(gradient.clone())
