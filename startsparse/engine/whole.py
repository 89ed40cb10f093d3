"""Layers whose masks leave most weights: all are computed, zeros too, and so faster each.

The values that are stored are those inside the mask; each use packs them for the kernel, four rows
side by side.
"""

import math

import torch
from torch import Tensor

from startsparse.engine.entries import Positions, Window, backward_phases
from startsparse.engine.kernels import kernels_for
from startsparse.engine.maps import Space, lanes

_BREAK_EVEN = 0.75  # density from which this is faster,
_PIXELS = 64  # on maps of at least as many pixels, which pay for packing the weights


def break_even(output: Space) -> float:
    """Density from which a product with such an output is faster as a `Whole`; inf: never."""
    return _BREAK_EVEN if output.height * output.width >= _PIXELS else math.inf


class Rows:
    """All weights of a layer as rows, whose entries read channels at ``taps``.

    Args:
        rows: number of rows.
        channels: that each row reads, for each of them every tap.
        taps: int64, numbers from a position to the input of each tap, without the channel.
        flat: int64, of each stored value row * channels * taps + channel * taps + tap.
        chosen: int64, which stored values these are; None: all.
    """

    def __init__(
        self, rows: int, channels: int, taps: Tensor, flat: Tensor, chosen: Tensor | None = None
    ):
        self.rows, self.channels, self.taps, self.chosen = rows, channels, taps, chosen
        self.count = channels * len(taps)
        row, entry = flat // self.count, flat % self.count
        together = kernels_for(torch.float32).rows_at_once
        packed = (row // together * self.count + entry) * together + row % together
        self.packed = packed.int()  # where the kernel wants them
        self._size = -(-rows // together) * together * self.count
        self._stride, self._offset = 0, torch.empty(0)

    def offset(self, stride: int) -> Tensor:
        """int32 [count], where a channel begins ``stride`` numbers after the last one."""
        if stride != self._stride:
            starts = stride * torch.arange(self.channels)
            self._offset = (starts[:, None] + self.taps).flatten().int()
            self._stride = stride
        return self._offset

    def gather(self, x: Tensor, y: Tensor, values: Tensor, positions: Positions, add: bool) -> None:
        """``y`` at every position, or what is added to it."""
        packed = values.new_zeros(self._size)
        packed[self.packed] = values if self.chosen is None else values[self.chosen]
        offset = self.offset(positions.input_stride)
        kernels_for(x.dtype).whole_gather(x, y, packed, offset, self.rows, positions, add)

    def weight_gradient(self, x: Tensor, d_y: Tensor, positions: Positions) -> Tensor:
        """The gradient of the values."""
        how = self.offset(positions.input_stride), self.rows, positions
        return kernels_for(x.dtype).whole_weight_gradient(x, d_y, *how)[self.packed]


class Whole:
    """The rows of a layer, forward and for each phase of the input's gradient.

    Attributes:
        flat: int32, the indices of the stored values in the flattened mask.
    """

    def __init__(self, mask: Tensor, window: Window, input: Space, output: Space):
        """``mask``: bool [out, in, ky, kx], contiguous."""
        rows, channels, ky, kx = mask.shape
        row, channel, y, x = mask.nonzero().unbind(1)
        flat = mask.flatten().nonzero().flatten()
        self.flat = flat.int()
        taps = torch.arange(ky)[:, None] * input.row + torch.arange(kx)
        self.forward = Rows(rows, channels, lanes() * taps.flatten(), flat)
        self.backward = []
        for phase in backward_phases(window):
            ys, xs = torch.arange(ky)[phase[0]], torch.arange(kx)[phase[1]]
            taps = -(torch.arange(len(ys))[:, None] * output.row + torch.arange(len(xs)))
            here = (y % window.stride[0] == ys[0]) & (x % window.stride[1] == xs[0])
            chosen = here.nonzero().flatten()
            tap = (y // window.stride[0] * len(xs) + x // window.stride[1])[chosen]
            entry = row[chosen] * taps.numel() + tap
            flat = channel[chosen] * (rows * taps.numel()) + entry
            self.backward.append(Rows(channels, rows, lanes() * taps.flatten(), flat, chosen))

    def lists(self) -> list[Tensor]:
        """Where the stored values go."""
        parts = [self.forward, *self.backward]
        chosen = [part.chosen for part in self.backward if part.chosen is not None]
        return [*(part.packed for part in parts), *chosen]
