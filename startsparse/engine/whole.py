"""Layers whose masks leave most weights: all are computed, zeros too, and so faster each.

The values that are stored are those inside the mask; they are laid out for the kernel, four rows
side by side, at each use.
"""

import ctypes
import math

import torch
from torch import Tensor

from startsparse.engine import memory
from startsparse.engine.build import library
from startsparse.engine.entries import Positions, Window, backward_phases
from startsparse.engine.maps import LANES, Space, at

_bool, _int = ctypes.c_bool, ctypes.c_int64

_ENOUGH = 0.75  # share of weights inside the mask from which this is faster,
_PIXELS = 64  # on maps of at least as many pixels, which pay for the laying out
_ROWS = 4  # rows_at_once of products.cpp


def worth(made: Space) -> float:
    """Density from which a product that makes such a map is faster as a `Whole`; inf: never."""
    return _ENOUGH if made.height * made.width >= _PIXELS else math.inf


class Rows:
    """All weights of a layer as rows, whose entries read channels at ``taps``.

    Args:
        rows: number of rows.
        channels: that each row reads, for each of them every tap.
        taps: int64, numbers from a position to the input of each tap, without the channel.
        place: int64, of each stored value its number row * channels * taps + channel * taps + tap.
        chosen: int64, which stored values these are; None: all.
    """

    def __init__(
        self, rows: int, channels: int, taps: Tensor, place: Tensor, chosen: Tensor | None = None
    ):
        self.rows, self.channels, self.taps, self.chosen = rows, channels, taps, chosen
        self.count = channels * len(taps)
        row, entry = place // self.count, place % self.count
        packed = (row // _ROWS * self.count + entry) * _ROWS + row % _ROWS
        self.place = packed.int()
        self._size = -(-rows // _ROWS) * _ROWS * self.count
        self._stride, self._offset = 0, torch.empty(0)

    def offset(self, stride: int) -> Tensor:
        """int32 [count], where a channel begins ``stride`` numbers after the last one."""
        if stride != self._stride:
            starts = stride * torch.arange(self.channels)
            self._offset = (starts[:, None] + self.taps).flatten().int()
            self._stride = stride
        return self._offset

    def gather(self, x: Tensor, y: Tensor, values: Tensor, places: Positions, add: bool) -> None:
        """``y`` at every position, or what is added to it."""
        packed = values.new_zeros(self._size)
        packed[self.place] = values if self.chosen is None else values[self.chosen]
        library(x.dtype).whole_gather(
            *(at(x), at(y), at(packed), at(self.offset(places.given_stride)), _int(self.count)),
            *(_int(self.rows), places.view(0), _bool(add)),
        )

    def weights(self, x: Tensor, d_y: Tensor, places: Positions) -> Tensor:
        """The gradient of the values."""
        kernels, sizes = library(x.dtype), (_int(self.count), _int(self.rows))
        scratch = memory.empty([kernels.whole_scratch_size(*sizes)], x.dtype)
        packed = x.new_empty(self._size)
        offset = at(self.offset(places.given_stride))
        kernels.whole_weights(
            *(at(x), at(d_y), at(packed), at(scratch), offset, *sizes, places.view(0))
        )
        return packed[self.place]


class Whole:
    """The rows of a layer, forward and for each phase of the input's gradient.

    Attributes:
        flat: int32, the places of the stored values in the flattened mask.
    """

    def __init__(self, mask: Tensor, window: Window, given: Space, made: Space):
        """``mask``: bool [out, in, ky, kx], contiguous."""
        rows, channels, ky, kx = mask.shape
        row, channel, y, x = mask.nonzero().unbind(1)
        place = mask.flatten().nonzero().flatten()
        self.flat = place.int()
        taps = torch.arange(ky)[:, None] * given.row + torch.arange(kx)
        self.forward = Rows(rows, channels, LANES * taps.flatten(), place)
        self.backward = []
        for phase in backward_phases(window):
            ys, xs = torch.arange(ky)[phase[0]], torch.arange(kx)[phase[1]]
            taps = -(torch.arange(len(ys))[:, None] * made.row + torch.arange(len(xs)))
            here = (y % window.stride[0] == ys[0]) & (x % window.stride[1] == xs[0])
            chosen = here.nonzero().flatten()
            tap = (y // window.stride[0] * len(xs) + x // window.stride[1])[chosen]
            entry = row[chosen] * taps.numel() + tap
            place = channel[chosen] * (rows * taps.numel()) + entry
            self.backward.append(Rows(channels, rows, LANES * taps.flatten(), place, chosen))

    def lists(self) -> list[Tensor]:
        """Where the stored values go."""
        parts = [self.forward, *self.backward]
        chosen = [part.chosen for part in self.backward]
        return [*(part.place for part in parts), *chosen]
