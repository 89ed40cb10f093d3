"""`selection` on GPUs: in few operations, and none of them waits for the device.

Floating point numbers >= 0 are in the order of their bit patterns, read as integers. So three bits
of the k-th largest are found by seven counts, and all bits by eleven rounds in float32. All tensors
lie in one vector, each from the start of a chunk of `CHUNK` entries. One operation counts in all
chunks, another adds up the chunks of a tensor.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1024  # small against most layers, and large enough for one block of threads
_BITS = 3  # that a round finds; its counts take 2**3 - 1 bytes for each entry
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def by_counting(
    magnitudes: Sequence[Tensor],
    allowed: Sequence[Tensor | None],
    keep: Tensor,
    sizes: Sequence[int],
) -> list[Tensor]:
    """`selection.top_of_groups` on any device.

    Takes up to about four times the memory of the magnitudes besides them.
    """
    layout = Layout.of(magnitudes)
    kept = _kept(_bits(layout, magnitudes, allowed), keep, layout, sizes)
    return layout.split(kept.to(magnitudes[0].dtype))


class Layout(NamedTuple):
    """Where tensors lie in one vector, in their order in memory; beyond them, chunks are filled up.

    Attributes:
        shapes: of the tensors.
        last: for each, whether it has the strides of channels_last.
    """

    shapes: tuple[torch.Size, ...]
    last: tuple[bool, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """The layout of ``tensors``."""
        last = [t.dim() == 4 and t.stride() == _strides_of_last(t.shape) for t in tensors]
        return cls(tuple(t.shape for t in tensors), tuple(last))

    @property
    def chunks(self) -> list[int]:
        """Number of chunks of each tensor."""
        return [-(-shape.numel() // CHUNK) for shape in self.shapes]

    @property
    def in_order(self) -> bool:
        """Whether the order in memory is that of positions."""
        pairs = zip(self.shapes, self.last)
        return not any(last and shape[1] > 1 and shape[2:].numel() > 1 for shape, last in pairs)

    def join(self, tensors: Sequence[Tensor], fill: float) -> Tensor:
        """[chunks, `CHUNK`] of tensors of these shapes, in any memory format."""
        rest = tensors[0].new_full((CHUNK,), fill)
        pieces = []
        for tensor, last in zip(tensors, self.last):
            vector = _vector(tensor, last)
            pieces += [vector, rest[: -len(vector) % CHUNK]]
        return torch.cat(pieces).view(-1, CHUNK)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The inverse of `join`: views that have the shapes and memory formats of the tensors."""
        pieces = joined.view(-1).split([count * CHUNK for count in self.chunks])
        triples = zip(pieces, self.shapes, self.last)
        return [_shaped(piece[: shape.numel()], shape, last) for piece, shape, last in triples]

    def alike(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensors`` of these shapes with the strides of `split`, copied if their order differs.

        On a GPU, `torch._foreach_mul` of tensors that differ in strides does one at a time.
        """
        triples = zip(tensors, self.shapes, self.last)
        return [_shaped(_vector(tensor, last), shape, last) for tensor, shape, last in triples]

    def owner(self, device: torch.device) -> Tensor:
        """Number of the tensor that a chunk belongs to, [chunks]."""
        return _repeated(self.chunks, device)

    def places(self, device: torch.device, inverse: bool) -> Tensor:
        """For each entry in the order of positions its place in memory, or the inverse.

        A weight [outputs, channels, h, w] has the order outputs, h, w, channels in memory.
        """
        total = sum(self.chunks) * CHUNK
        dtype = torch.int32 if total < 2**31 else torch.int64
        numbers = torch.arange(total + 1, dtype=dtype, device=device)
        facts, first = [], 0
        for shape, last, chunks in zip(self.shapes, self.last, self.chunks):
            channels, kernel = (shape[1], shape[2:].numel()) if last else (1, 1)
            matrix = (kernel, channels) if inverse else (channels, kernel)
            facts += [numbers[fact] for fact in (first, shape.numel(), *matrix)]
            first += chunks * CHUNK
        table = torch.stack(facts).view(-1, 4).index_select(0, self.owner(device))
        start, size, height, width = table.view(-1, 4, 1).unbind(1)
        # Each matrix [height, width] of the first ``size`` places is transposed.
        place = numbers[:total].view(-1, CHUNK).sub_(start)
        within = (place % (height * width)).mul_(place < size)
        place += start
        place -= within
        row = within // width
        column = within.addcmul_(row, width, value=-1)
        return place.addcmul_(column, height).add_(row).view(-1)


def _vector(tensor: Tensor, last: bool) -> Tensor:
    return (tensor.permute(0, 2, 3, 1) if last else tensor).flatten()


def _shaped(vector: Tensor, shape: torch.Size, last: bool) -> Tensor:
    if not last:
        return vector.view(shape)
    outputs, channels, *kernel = shape
    return vector.view(outputs, *kernel, channels).permute(0, 3, 1, 2)


def _repeated(times: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, 2 ..., each so many times. torch.repeat_interleave would wait for a copy."""
    numbers = torch.arange(len(times), device=device).unbind()
    return torch.cat([number.expand(count) for number, count in zip(numbers, times)])


def _bits(layout: Layout, magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None]) -> Tensor:
    """Bit patterns of the magnitudes, joined; negative where there is no entry, or none allowed."""
    joined = layout.join(magnitudes, -1)
    bits = joined.view(_INTEGERS[joined.element_size()])
    if any(inside is not None for inside in allowed):
        everywhere = torch.ones((), dtype=torch.bool, device=bits.device)
        parts = [
            everywhere.expand(shape) if inside is None else inside
            for inside, shape in zip(allowed, layout.shapes)
        ]
        bits.masked_fill_(layout.join(parts, False).logical_not_(), -1)
    return bits


def _kept(bits: Tensor, keep: Tensor, layout: Layout, sizes: Sequence[int]) -> Tensor:
    """Bool: what is among the ``keep[i]`` largest of group i, which has ``sizes[i]`` tensors."""
    chunks = iter(layout.chunks)
    group = _repeated([sum(itertools.islice(chunks, size)) for size in sizes], bits.device)
    kth = _kth(bits, keep, group).index_select(0, group)
    above, tied = bits > kth, bits == kth
    del bits

    def of_groups(counts: Tensor) -> Tensor:
        return torch.zeros_like(keep).index_add_(0, group, counts)

    missing = keep - of_groups(above.sum(1))
    if not layout.in_order:
        tied = _moved(tied, layout.places(group.device, inverse=False))
    rank = tied.cumsum(1, dtype=torch.int16)
    ties = rank[:, -1].long()
    before = of_groups(ties)
    before = before.cumsum(0) - before  # ties of earlier groups
    room = (missing + before).index_select(0, group) + ties - ties.cumsum(0)
    chosen = tied & (rank <= room[:, None])
    if not layout.in_order:
        chosen = _moved(chosen, layout.places(group.device, inverse=True))
    return above | chosen


def _moved(entries: Tensor, places: Tensor) -> Tensor:
    return entries.view(-1).index_select(0, places).view(entries.shape)


def _kth(bits: Tensor, keep: Tensor, group: Tensor) -> Tensor:
    """The bit pattern of the ``keep[i]``-th largest of each group i, [groups, 1].

    ``group`` is that of a chunk.
    """
    width = 8 * bits.element_size() - 1  # the sign bit is 0
    shifts = torch.arange(width - _BITS, -_BITS, -_BITS, dtype=bits.dtype, device=bits.device)
    digits = torch.arange(1, 2**_BITS, dtype=bits.dtype, device=bits.device)
    steps = digits << shifts.clamp_(min=0)[:, None]
    counts = torch.zeros(len(steps), len(keep), len(digits), dtype=keep.dtype, device=bits.device)
    kth = torch.zeros(len(keep), 1, dtype=bits.dtype, device=bits.device)
    for step, count in zip(steps.unbind(), counts.unbind()):
        tries = kth + step
        bounds = tries.index_select(0, group)[:, :, None]
        count.index_add_(0, group, (bits[:, None] >= bounds).sum(2))
        kth = torch.where(count >= keep[:, None], tries, kth).amax(1, keepdim=True)
    return kth


def in_memory_order(tensor: Tensor) -> Tensor:
    """All entries in one dimension, in their order in memory, which seldom takes a copy."""
    if _channels_last(tensor):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten()


def _strides_of_last(shape: torch.Size) -> tuple[int, ...]:
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
