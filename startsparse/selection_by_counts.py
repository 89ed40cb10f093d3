"""`selection` on GPUs: in few operations, and none of them waits for the device.

Floating point numbers >= 0 are in the order of their bit patterns, read as integers. So three bits
of the k-th largest are found by seven counts, and all bits by eleven rounds in float32. All tensors
lie in one vector, each from the start of a chunk of `CHUNK` entries. One operation counts in all
chunks, another adds up the chunks of a tensor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1024  # small against most layers, and large enough for one block of threads
_BITS = 3  # that a round finds; its counts take 2**3 - 1 bytes for each entry
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def by_counting(
    magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None], keep: Tensor
) -> list[Tensor]:
    """`selection.top_of_each` on any device, or `selection.top_masks` if ``keep`` is one number.

    Takes up to about four times the memory of the magnitudes besides them.
    """
    layout = Layout.of(magnitudes)
    kept = _kept(_bits(layout, magnitudes, allowed), keep, layout)
    return layout.split(kept.to(magnitudes[0].dtype))


class Layout(NamedTuple):
    """Where tensors lie in one vector, in their order in memory; beyond them, chunks are filled up.

    Attributes:
        shapes: of the tensors.
        last: for each, whether its channels are last in memory, unlike its positions.
    """

    shapes: tuple[torch.Size, ...]
    last: tuple[bool, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """The layout of ``tensors``."""
        last = [_channels_last(t) and not t.is_contiguous() for t in tensors]
        return cls(tuple(t.shape for t in tensors), tuple(last))

    @property
    def chunks(self) -> list[int]:
        """Number of chunks of each tensor."""
        return [-(-shape.numel() // CHUNK) for shape in self.shapes]

    @property
    def in_order(self) -> bool:
        """Whether the order in memory is that of positions."""
        return not any(self.last)

    def join(self, parts: Sequence[Tensor], fill: float) -> Tensor:
        """[chunks, `CHUNK`] of vectors, each as long as its tensor."""
        rest = parts[0].new_full((CHUNK,), fill)
        pieces = []
        for part in parts:
            pieces += [part, rest[: -len(part) % CHUNK]]
        return torch.cat(pieces).view(-1, CHUNK)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The inverse of `join`: views that have the shapes and memory formats of the tensors."""
        views = []
        pieces = joined.view(-1).split([count * CHUNK for count in self.chunks])
        for piece, shape, last in zip(pieces, self.shapes, self.last):
            vector = piece[: shape.numel()]
            if last:
                outputs, channels, *kernel = shape
                views.append(vector.view(outputs, *kernel, channels).permute(0, 3, 1, 2))
            else:
                views.append(vector.view(shape))
        return views

    def owner(self, device: torch.device) -> Tensor:
        """Number of the tensor that a chunk belongs to, [chunks]."""
        numbers = torch.arange(len(self.shapes), device=device)
        # torch.repeat_interleave would wait for a copy.
        return torch.cat([n.expand(count) for n, count in zip(numbers.unbind(), self.chunks)])

    def places(self, owner: Tensor, inverse: bool) -> Tensor:
        """For each entry in the order of positions its place in memory, or the inverse.

        A weight [outputs, channels, h, w] has the order outputs, h, w, channels in memory.
        """
        total = sum(self.chunks) * CHUNK
        dtype = torch.int32 if total < 2**31 else torch.int64
        numbers = torch.arange(total + 1, dtype=dtype, device=owner.device)
        facts, start = [], 0
        for shape, last, chunks in zip(self.shapes, self.last, self.chunks):
            channels, kernel = (shape[1], shape[2:].numel()) if last else (1, 1)
            matrix = (kernel, channels) if inverse else (channels, kernel)
            facts += [numbers[fact] for fact in (start, shape.numel(), *matrix)]
            start += chunks * CHUNK
        table = torch.stack(facts).view(-1, 4).index_select(0, owner)
        start, size, height, width = table.view(-1, 4, 1).unbind(1)
        # Each matrix [height, width] of the first ``size`` places is transposed.
        place = numbers[:total].view(-1, CHUNK).sub_(start)
        within = (place % (height * width)).mul_(place < size)
        place += start
        place -= within
        row = within // width
        column = within.addcmul_(row, width, value=-1)
        return place.addcmul_(column, height).add_(row).view(-1)


def _bits(layout: Layout, magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None]) -> Tensor:
    """Bit patterns of the magnitudes, joined; negative where there is no entry, or none allowed."""
    joined = layout.join([in_memory_order(m) for m in magnitudes], -1)
    bits = joined.view(_INTEGERS[joined.element_size()])
    if any(inside is not None for inside in allowed):
        inside = layout.join([_like(i, m) for i, m in zip(allowed, magnitudes)], False)
        bits.masked_fill_(inside.logical_not_(), -1)
    return bits


def _kept(bits: Tensor, keep: Tensor, layout: Layout) -> Tensor:
    """Bool: what is among the ``keep[i]`` largest of tensor i, or the ``keep`` largest of all."""
    owner = layout.owner(bits.device)
    group = owner if keep.dim() else torch.zeros_like(owner)
    keep = keep.view(-1)
    kth = _kth(bits, keep, group).index_select(0, group)
    above, tied = bits > kth, bits == kth
    del bits

    def of_groups(counts: Tensor) -> Tensor:
        return torch.zeros_like(keep).index_add_(0, group, counts)

    missing = keep - of_groups(above.sum(1))
    if not layout.in_order:
        tied = _moved(tied, layout.places(owner, inverse=False))
    rank = tied.cumsum(1, dtype=torch.int16)
    ties = rank[:, -1].long()
    before = of_groups(ties)
    before = before.cumsum(0) - before  # ties of earlier groups
    room = (missing + before).index_select(0, group) + ties - ties.cumsum(0)
    chosen = tied & (rank <= room[:, None])
    if not layout.in_order:
        chosen = _moved(chosen, layout.places(owner, inverse=True))
    return above | chosen


def _moved(entries: Tensor, places: Tensor) -> Tensor:
    return entries.view(-1).index_select(0, places).view(entries.shape)


def _kth(bits: Tensor, keep: Tensor, group: Tensor) -> Tensor:
    """The bit pattern of the ``keep[i]``-th largest of each group i, [groups, 1].

    ``group`` is that of a chunk.
    """
    width = 8 * bits.element_size() - 1  # the sign bit is 0
    like = {"dtype": bits.dtype, "device": bits.device}
    shifts = torch.arange(width - _BITS, -_BITS, -_BITS, **like).clamp_(min=0)
    digits = torch.arange(1, 2**_BITS, **like)
    steps = digits << shifts[:, None]
    counts = torch.zeros(len(steps), len(keep), len(digits), dtype=keep.dtype, device=bits.device)
    kth = torch.zeros(len(keep), 1, dtype=bits.dtype, device=bits.device)
    for step, count in zip(steps.unbind(), counts.unbind()):
        tries = kth + step
        bounds = tries.index_select(0, group)[:, :, None]
        count.index_add_(0, group, (bits[:, None] >= bounds).sum(2))
        kth = torch.where(count >= keep[:, None], tries, kth).amax(1, keepdim=True)
    return kth


def _like(inside: Tensor | None, magnitude: Tensor) -> Tensor:
    """``inside`` as a vector in the order of ``magnitude`` in memory; None is everywhere."""
    if inside is None:
        return torch.ones((), dtype=torch.bool, device=magnitude.device).expand(magnitude.numel())
    if _channels_last(magnitude):
        inside = inside.permute(0, 2, 3, 1)
    return inside.flatten()


def in_memory_order(tensor: Tensor) -> Tensor:
    """All entries in one dimension, in their order in memory, which seldom takes a copy."""
    if _channels_last(tensor):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten()


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
