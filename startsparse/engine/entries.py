"""Weights as the kernels want them: the entries of a mask, and where each finds its input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from startsparse.engine.kernels import kernels_for
from startsparse.engine.maps import Space, lanes

_CACHE = 40_000  # bytes of input that one tile of positions should read at most
_PER_ROW = 28  # entries that a row should have, on average, in a block of input channels
_PER_GROUP = 28  # and in a group of tiles, before the next row comes


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

    def border_in(self, input: Space, output: Space) -> int:
        """How wide a border of the input the convolution reads."""
        sizes = (input.height, output.height), (input.width, output.width)
        reach = [
            max(p, (outs - 1) * s + k - p - ins)
            for (ins, outs), k, s, p in zip(sizes, self.kernel, self.stride, self.padding)
        ]
        return max(0, *reach)

    def border_out(self, input: Space, output: Space) -> int:
        """How wide a border of the output's gradient the input's gradient reads."""
        sizes = (input.height, output.height), (input.width, output.width)
        reach = [0]
        for (ins, outs), k, s, p in zip(sizes, self.kernel, self.stride, self.padding):
            for phase in range(min(s, k)):
                first, count = _pixels(ins, phase, s, p)
                start = (first + p - phase) // s
                if count:
                    reach += [(k - phase - 1) // s - start, start + count - 1 - (outs - 1)]
        return max(reach)


class Positions:
    """Pixels of two maps, pair by pair: what is read for them, and where the result goes.

    Args:
        input, output: int64, indices into the maps' memory.
        input_stride, output_stride: numbers from one channel to the next.
        channels: of the map that is read, to be prefetched; 0: it is in the cache.
        reach: numbers from an index to the last that is read for it.
    """

    def __init__(
        self, input: Tensor, output: Tensor, input_stride: int, output_stride: int,
        channels: int = 0, reach: int = 0,
    ):  # fmt: skip
        self.input, self.output, self.count = input, output, len(input)
        self.input_stride, self.output_stride = input_stride, output_stride
        self.channels, self.reach = channels, reach
        self.handles: dict[int, Any] = {}  # group -> what the kernels made of it


class Listed:
    """Entries of one product, sorted by (block of input channels, row).

    Args:
        first: int32 [blocks * rows + 1], first entry of each (block, row).
        offset: int32 [entries], numbers from the row's position to the input of each.
        rows: number of rows.

    Attributes:
        group: positions that are done before the next row.
        handle: what the kernels made of it.
    """

    def __init__(self, first: Tensor, offset: Tensor, rows: int):
        self.first, self.offset, self.rows, self.count = first, offset, rows, len(offset)
        tiles = round(_PER_GROUP * (len(first) - 1) / max(self.count, 1))
        self.group = _tile() * min(32, max(1, tiles))
        self.handle: Any = None

    def for_stride(self, stride: int) -> "Listed":  # noqa: ARG002 - the one that offset is for
        """Itself, where an input channel begins ``stride`` numbers after the last one."""
        return self

    def gather(self, x: Tensor, y: Tensor, values: Tensor, positions: Positions, add: bool) -> None:
        """``y`` at every position, or what is added to it; ``values`` in the order of entries."""
        listed = self.for_stride(positions.input_stride)
        kernels_for(x.dtype).gather(x, y, values, listed, positions, add)

    def weight_gradient(self, x: Tensor, d_y: Tensor, positions: Positions) -> Tensor:
        """The gradient of the values, in the order of entries."""
        listed = self.for_stride(positions.input_stride)
        return kernels_for(x.dtype).weight_gradient(x, d_y, listed, positions)


class Entries(Listed):
    """The stored weights of one product.

    Args:
        first, rows: as of `Listed`.
        flat: int32, the indices of all the layer's entries in its flattened mask.
        order: int32 [entries], which of those each entry is; None: they are the same.
        taps: int64, numbers from the row's position to the input of each tap, without the channel.
        divisor, modulus: the input channel of index f is f // divisor % modulus.
    """

    def __init__(
        self, first: Tensor, rows: int, flat: Tensor, order: Tensor | None, taps: Tensor,
        divisor: int, modulus: int,
    ):  # fmt: skip
        super().__init__(first, torch.empty_like(flat if order is None else order), rows)
        self.flat, self.order = flat, order
        self._taps, self._divisor, self.modulus = taps, divisor, modulus
        self._stride = 0

    def own(self, values: Tensor) -> Tensor:
        """[entries], of those of the whole layer."""
        return values if self.order is None else values.index_select(0, self.order)

    def for_stride(self, stride: int) -> "Entries":
        """Itself, where an input channel begins ``stride`` numbers after the last one."""
        if stride != self._stride:
            how = self._divisor, self.modulus, stride, self._taps
            kernels_for(torch.float32).set_offsets(self.offset, self.flat, self.order, *how)
            self._stride = stride
        return self


def _tile() -> int:
    """Positions that the kernels do at a time, or a multiple of them."""
    return kernels_for(torch.float32).sums


def _block_size(kernel: Sequence[int], rows: int, channels: int, count: int) -> int:
    """Input channels of a block, for ``count`` entries in all."""
    # A tile of positions reads a strip of the input that is as high as the kernel.
    strip = kernel[0] * (kernel[1] + _tile() - 1) * lanes() * 4
    size = max(1, _CACHE // strip, math.ceil(_PER_ROW * rows * channels / max(count, 1)))
    return math.ceil(channels / math.ceil(channels / size))


def _pixels(size: int, phase: int, stride: int, padding: int) -> tuple[int, int]:
    """First, and number, of the ``size`` pixels that taps = phase (modulo stride) reach."""
    first = (phase - padding) % stride
    return first, len(range(first, size, stride))


def forward_positions(window: Window, input: Space, output: Space, blocks: int) -> Positions:
    """Of y[position] = sum of w x[position * stride - padding + tap]."""
    (sy, sx), (py, px) = window.stride, window.padding
    y, x = torch.arange(output.height), torch.arange(output.width)
    down, right = (k - 1 for k in window.kernel)
    return Positions(
        input.positions(blocks, y * sy - py, x * sx - px),
        output.positions(blocks, y, x),
        input.stride(blocks),
        output.stride(blocks),
        input.channels,
        lanes() * (down * input.row + right),
    )


def forward_entries(mask: Tensor, input: Space, blocked: bool = True) -> Entries:
    """Entries of a weight that reads the map ``input``.

    Args:
        mask: bool [out, in, ky, kx], contiguous.
        blocked: False: all input channels are one block, and entries are in the mask's own order.
    """
    rows, channels, *kernel = mask.shape
    count = int(mask.count_nonzero())
    size = _block_size(kernel, rows, channels, count) if blocked else channels
    tap = torch.arange(kernel[0])[:, None] * input.row + torch.arange(kernel[1])
    tap = (lanes() * tap).flatten()
    first, flat = kernels_for(torch.float32).list_entries(mask.flatten(2), size)
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
    window: Window, input: Space, output: Space, phase: tuple[slice, slice], blocks: int
) -> Positions:
    """Of dx[position] = sum of w dy[(position + padding - tap) / stride], for taps of a phase."""
    starts, firsts = [], []
    for taps, size, s, p in zip(phase, (input.height, input.width), window.stride, window.padding):
        first, count = _pixels(size, taps.start, s, p)
        pixels = first + s * torch.arange(count)
        firsts.append(pixels)
        starts.append((pixels + p - taps.start) // s)
    return Positions(
        output.positions(blocks, *starts),
        input.positions(blocks, *firsts),
        output.stride(blocks),
        input.stride(blocks),
        output.channels,
    )


def backward_entries(
    forward: Entries, mask: Tensor, output: Space, phase: tuple[slice, slice]
) -> Entries:
    """Entries of a phase, by input channel; they read the map ``output``.

    Args:
        forward: `forward_entries` of ``mask``.
    """
    rows, channels, *kernel = mask.shape
    kernels = kernels_for(torch.float32)
    tap = torch.full(kernel, kernels.no_tap)
    y, x = (torch.arange(len(range(k)[taps])) for k, taps in zip(kernel, phase))
    tap[phase] = -lanes() * (y[:, None] * output.row + x)
    tap = tap.flatten()
    size = _block_size((len(y), len(x)), channels, rows, forward.count)
    first, order = kernels.list_transposed(forward, forward.flat, channels, tap, size)
    return Entries(first, channels, forward.flat, order, tap, channels * len(tap), rows)
