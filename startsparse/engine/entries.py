"""Weights as the kernels want them: the entries of a mask, and where each finds its input."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from startsparse.engine import memory
from startsparse.engine.build import library
from startsparse.engine.maps import LANES, Space, at

_bool, _int = ctypes.c_bool, ctypes.c_int64

_TILE = 8  # positions that the kernels do at a time, or twice as many as they do
_CACHE = 40_000  # bytes of input that one tile of positions should read at most
_PER_ROW = 28  # entries that a row should have, on average, in a block of input channels
_PER_GROUP = 28  # and in a group of tiles, before the next row comes


class CEntries(ctypes.Structure):
    """`Entries` of products.cpp."""

    _fields_ = [
        ("first", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("rows", ctypes.c_int64),
    ]


class CPositions(ctypes.Structure):
    """`Positions` of products.cpp."""

    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p)] + [
        (name, ctypes.c_int64)
        for name in ("count", "group", "row_stride", "channels", "channel_stride", "reach")
    ]


@dataclass(frozen=True)
class Window:
    """A convolution's kernel height and width, stride and padding; dilation and groups are 1."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def output(self, space: Space, channels: int) -> Space:
        """The space of the convolution's output."""
        size = space.height, space.width
        over = [n + 2 * p - k for n, p, k in zip(size, self.padding, self.kernel)]
        return Space(channels, *(o // s + 1 for o, s in zip(over, self.stride)))

    def border_in(self, given: Space, made: Space) -> int:
        """How wide a border of the input the convolution reads."""
        sizes = (given.height, made.height), (given.width, made.width)
        reach = [
            max(p, (outs - 1) * s + k - p - ins)
            for (ins, outs), k, s, p in zip(sizes, self.kernel, self.stride, self.padding)
        ]
        return max(0, *reach)

    def border_out(self, given: Space, made: Space) -> int:
        """How wide a border of the output's gradient the input's gradient reads."""
        sizes = (given.height, made.height), (given.width, made.width)
        reach = [0]
        for (ins, outs), k, s, p in zip(sizes, self.kernel, self.stride, self.padding):
            for phase in range(min(s, k)):
                first, count = _pixels(ins, phase, s, p)
                start = (first + p - phase) // s
                if count:
                    reach += [(k - phase - 1) // s - start, start + count - 1 - (outs - 1)]
        return max(reach)


class Positions:
    """Pixels of two maps, pair by pair: what is read for them, and where it goes.

    Args:
        given, made: int64, places in the maps' memory.
        given_stride, made_stride: numbers from one channel to the next.
        channels: of the map that is read, to be fetched ahead; 0: it is in the cache.
        reach: numbers from a place to the last that is read for it.
    """

    def __init__(
        self, given: Tensor, made: Tensor, given_stride: int, made_stride: int,
        channels: int = 0, reach: int = 0,
    ):  # fmt: skip
        self.given, self.made, self.count = given, made, len(given)
        self.given_stride, self.made_stride = given_stride, made_stride
        self._ahead = channels, given_stride, reach
        self._views: dict[int, CPositions] = {}

    def view(self, group: int) -> CPositions:
        """For the kernels, ``group`` positions before the next row."""
        if group not in self._views:
            pointers = self.given.data_ptr(), self.made.data_ptr()
            self._views[group] = CPositions(
                *pointers, self.count, group, self.made_stride, *self._ahead
            )
        return self._views[group]


class Listed:
    """Entries of one product, sorted by (block of input channels, row).

    Args:
        first: int32 [blocks * rows + 1], first entry of each (block, row).
        offset: int32 [entries], numbers from the row's position to the input of each.
        rows: number of rows.
    """

    def __init__(self, first: Tensor, offset: Tensor, rows: int):
        self.first, self.offset, self.rows, self.count = first, offset, rows, len(offset)
        lists = len(first) - 1
        self.group = _TILE * min(32, max(1, round(_PER_GROUP * lists / max(self.count, 1))))
        self._view = CEntries(first.data_ptr(), offset.data_ptr(), lists // rows, rows)

    def view(self, stride: int) -> CEntries:  # noqa: ARG002 - the one that offset is for
        """For the kernels, where an input channel begins ``stride`` numbers after the last one."""
        return self._view

    def gather(self, x: Tensor, y: Tensor, values: Tensor, places: Positions, add: bool) -> None:
        """``y`` at every position, or what is added to it; ``values`` in the order of entries."""
        listed, where = self.view(places.given_stride), places.view(self.group)
        library(x.dtype).gather(at(x), at(y), at(values), listed, where, _bool(add))

    def weights(self, x: Tensor, d_y: Tensor, places: Positions) -> Tensor:
        """The gradient of the values, in the order of entries."""
        kernels, where = library(x.dtype), places.view(self.group)
        listed, gradient = self.view(places.given_stride), x.new_empty(self.count)
        size = kernels.scratch_size(_int(self.count), _int(places.count))
        scratch = memory.empty([size], x.dtype)
        kernels.weights(at(x), at(d_y), at(gradient), at(scratch), listed, where)
        return gradient


class Entries(Listed):
    """The stored weights of one product.

    Args:
        first, rows: as of `Listed`.
        flat: int32, the places of all the layer's entries in its flattened mask.
        order: int32 [entries], which of those each entry is; None: they are the same.
        taps: int64, numbers from the row's position to the input of each tap, without the channel.
        divisor, modulus: the input channel of place f is f // divisor % modulus.
    """

    def __init__(
        self, first: Tensor, rows: int, flat: Tensor, order: Tensor | None, taps: Tensor,
        divisor: int, modulus: int,
    ):  # fmt: skip
        super().__init__(first, torch.empty_like(flat if order is None else order), rows)
        self.flat, self.order = flat, order
        self._taps, self._divisor, self.modulus = taps, divisor, modulus
        self._stride = 0

    def view(self, stride: int) -> CEntries:
        """For the kernels, where an input channel begins ``stride`` numbers after the last one."""
        if stride != self._stride:
            order = None if self.order is None else at(self.order)
            sizes = (_int(n) for n in (self.count, self._divisor, self.modulus, stride))
            library(torch.float32).set_offsets(
                *(at(self.flat), order, *sizes), at(self._taps), _int(len(self._taps)),
                at(self.offset),
            )  # fmt: skip
            self._stride = stride
        return super().view(stride)


def _block_size(kernel: tuple[int, int], rows: int, channels: int, count: int) -> int:
    """Input channels of a block, for ``count`` entries in all."""
    # A tile of positions reads a strip of the input that is as high as the kernel.
    strip = kernel[0] * (kernel[1] + _TILE - 1) * LANES * 4
    size = max(1, _CACHE // strip, math.ceil(_PER_ROW * rows * channels / max(count, 1)))
    return math.ceil(channels / math.ceil(channels / size))


def _pixels(size: int, phase: int, stride: int, padding: int) -> tuple[int, int]:
    """First, and number, of the ``size`` pixels that taps = phase (modulo stride) reach."""
    first = (phase - padding) % stride
    return first, len(range(first, size, stride))


def forward_positions(window: Window, given: Space, made: Space, blocks: int) -> Positions:
    """Of y[position] = sum of w x[position * stride - padding + tap]."""
    (sy, sx), (py, px) = window.stride, window.padding
    y, x = torch.arange(made.height), torch.arange(made.width)
    down, right = (k - 1 for k in window.kernel)
    return Positions(
        given.positions(blocks, y * sy - py, x * sx - px),
        made.positions(blocks, y, x),
        given.stride(blocks),
        made.stride(blocks),
        given.channels,
        LANES * (down * given.row + right),
    )


def forward_entries(mask: Tensor, given: Space, blocked: bool = True) -> Entries:
    """Entries of a weight that reads the map ``given``.

    Args:
        mask: bool [out, in, ky, kx], contiguous.
        blocked: False: all input channels are one block, and entries are in the mask's own order.
    """
    rows, channels, *kernel = mask.shape
    count = int(mask.count_nonzero())
    size = _block_size(kernel, rows, channels, count) if blocked else channels
    tap = torch.arange(kernel[0])[:, None] * given.row + torch.arange(kernel[1])
    tap = (LANES * tap).flatten()
    sizes = [_int(n) for n in (rows, channels, len(tap), size)]
    kernels = library(torch.float32)
    counts = torch.zeros(math.ceil(channels / size) * rows + 1, dtype=torch.int32)
    kernels.count_entries(at(mask), *sizes, at(counts[1:]))
    first, flat = counts.cumsum(0, dtype=torch.int32), torch.empty(count, dtype=torch.int32)
    kernels.list_entries(at(mask), *sizes, at(first), at(flat))
    return Entries(first, rows, flat, None, tap, len(tap), channels)


def backward_phases(window: Window) -> list[tuple[slice, slice]]:
    """Taps that reach the same input pixels: as many groups as the stride has phases."""
    phases = [range(min(s, k)) for s, k in zip(window.stride, window.kernel)]
    return [
        (slice(a, None, window.stride[0]), slice(b, None, window.stride[1]))
        for a in phases[0]
        for b in phases[1]
    ]


def backward_positions(
    window: Window, given: Space, made: Space, phase: tuple[slice, slice], blocks: int
) -> Positions:
    """Of dx[position] = sum of w dy[(position + padding - tap) / stride], for taps of a phase."""
    starts, firsts = [], []
    for taps, size, s, p in zip(phase, (given.height, given.width), window.stride, window.padding):
        first, count = _pixels(size, taps.start, s, p)
        pixels = first + s * torch.arange(count)
        firsts.append(pixels)
        starts.append((pixels + p - taps.start) // s)
    return Positions(
        made.positions(blocks, *starts),
        given.positions(blocks, *firsts),
        made.stride(blocks),
        given.stride(blocks),
        made.channels,
    )


def backward_entries(
    forward: Entries, mask: Tensor, made: Space, phase: tuple[slice, slice]
) -> Entries:
    """Entries of a phase, by input channel; they read the map ``made``.

    Args:
        forward: `forward_entries` of ``mask``.
    """
    rows, channels, *kernel = mask.shape
    tap = torch.full(kernel, torch.iinfo(torch.int64).min)
    y, x = (torch.arange(len(range(k)[taps])) for k, taps in zip(kernel, phase))
    tap[phase] = -LANES * (y[:, None] * made.row + x)
    tap = tap.flatten()
    size = _block_size((len(y), len(x)), channels, rows, forward.count)
    counts = torch.zeros(math.ceil(rows / size) * channels + 1, dtype=torch.int32)
    what = forward.view(0), at(forward.flat), _int(channels), _int(len(tap)), at(tap), _int(size)
    kernels = library(torch.float32)
    kernels.count_transposed(*what, at(counts[1:]))
    first = counts.cumsum(0, dtype=torch.int32)
    order, following = torch.empty(int(first[-1]), dtype=torch.int32), first.clone()
    kernels.list_transposed(*what, at(following), at(order))
    return Entries(first, channels, forward.flat, order, tap, channels * len(tap), rows)
