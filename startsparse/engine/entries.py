"""Weights as the kernels want them: the entries of a mask, and where each finds its input."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from startsparse.engine.maps import LANES, Space

_TILE = 4  # positions that the kernels do at a time
_CACHE = 36_000  # bytes of input that one tile of positions should read at most
_PER_ROW = 14  # entries that a row should have, on average, in a block of input channels
_PER_GROUP = 128  # and in a group of tiles, before the next row comes


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
        (name, ctypes.c_int64) for name in ("count", "group", "row_stride")
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


class Entries:
    """The stored weights of one product, sorted by (block of input channels, row).

    Attributes:
        flat: int32 [entries], the place of each in the flattened ``mask``.
    """

    def __init__(self, mask: Tensor, channel_stride: int, tap: Tensor):
        """List the entries of ``mask``.

        Args:
            mask: bool [rows, channels, ky, kx].
            channel_stride: numbers from one input channel to the next.
            tap: int64 [ky, kx], numbers from the position to the input of each tap.
        """
        rows, channels, *kernel = mask.shape
        taps = math.prod(kernel)
        count = int(mask.count_nonzero())
        # A tile of positions reads a strip of the input that is as high as the kernel.
        strip = kernel[0] * (kernel[1] + _TILE - 1) * LANES * 4
        size = max(1, _CACHE // strip)  # input channels of a block
        size = max(size, math.ceil(_PER_ROW * rows * channels / max(count, 1)))
        self.blocks = math.ceil(channels / size)
        size = math.ceil(channels / self.blocks)
        padded = torch.nn.functional.pad(mask.flatten(2), (0, 0, 0, self.blocks * size - channels))
        sorted_ = padded.view(rows, self.blocks, size * taps).transpose(0, 1)
        block, row, rest = sorted_.nonzero().unbind(1)
        channel, k = block * size + rest // taps, rest % taps
        self.flat = ((row * channels + channel) * taps + k).int()
        self.offset = (channel * channel_stride + tap.flatten()[k]).int()
        ends = sorted_.sum(2).flatten().cumsum(0)
        self.first = torch.nn.functional.pad(ends, (1, 0)).int()
        self.rows = rows
        per_row = count / max(rows * self.blocks, 1)
        self.group = _TILE * min(32, max(1, round(_PER_GROUP / max(per_row, 1e-9))))

    def __len__(self) -> int:
        return len(self.flat)

    def view(self) -> CEntries:
        """For the kernels."""
        return CEntries(self.first.data_ptr(), self.offset.data_ptr(), self.blocks, self.rows)


class Positions:
    """Pixels of two maps, pair by pair: what is read for them, and where it goes."""

    def __init__(self, given: Tensor, made: Tensor, row_stride: int):
        """Take int64 places in the maps' memory, and the numbers from one row to the next."""
        self.given, self.made, self.row_stride = given, made, row_stride

    def view(self, group: int) -> CPositions:
        """For the kernels, ``group`` positions before the next row."""
        return CPositions(
            self.given.data_ptr(), self.made.data_ptr(), len(self.given), group, self.row_stride
        )


def _pixels(size: int, phase: int, stride: int, padding: int) -> tuple[int, int]:
    """First, and number, of the ``size`` pixels that taps = phase (modulo stride) reach."""
    first = (phase - padding) % stride
    return first, len(range(first, size, stride))


def forward_positions(window: Window, given: Space, made: Space, blocks: int) -> Positions:
    """Of y[position] = sum of w x[position * stride - padding + tap]."""
    (sy, sx), (py, px) = window.stride, window.padding
    y, x = torch.arange(made.height), torch.arange(made.width)
    return Positions(
        given.positions(blocks, y * sy - py, x * sx - px),
        made.positions(blocks, y, x),
        made.plane * LANES,
    )


def forward_entries(mask: Tensor, given: Space) -> Entries:
    """Entries of a weight's ``mask`` [out, in, ky, kx] that reads the map ``given``."""
    tap = torch.arange(mask.shape[2])[:, None] * given.row + torch.arange(mask.shape[3])
    return Entries(mask, given.plane * LANES, tap * LANES)


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
        made.positions(blocks, *starts), given.positions(blocks, *firsts), given.plane * LANES
    )


def backward_entries(mask: Tensor, made: Space, phase: tuple[slice, slice]) -> Entries:
    """Entries of a phase of the weight's ``mask``, by input channel; they read the map ``made``."""
    part = mask[:, :, phase[0], phase[1]].transpose(0, 1).contiguous()
    tap = -(torch.arange(part.shape[2])[:, None] * made.row + torch.arange(part.shape[3]))
    return Entries(part, made.plane * LANES, tap * LANES)
