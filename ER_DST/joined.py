"""The masked layers of a network as one tensor, so that a GPU works on all of them at once.

Joined, the entries of all layers lie in rows of one length, each layer from the start of a row, and
its last row is filled up. So what is true of a layer is one number for each of its rows, and the
number of operations does not depend on the number of layers. Entries are in the order of positions,
whatever the memory format of the weights, so that ties are broken as on a CPU.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from startsparse.selection_by_counts import CHUNK, Layout


class Joined:
    """Joins tensors that are like some weights, and splits them again.

    Attributes:
        layer: [rows] the number of the layer of each row.
    """

    def __init__(self, weights: Sequence[Tensor]):
        """``weights``: [out, in, *kernel] each."""
        self.device = weights[0].device
        self._layout = Layout.of(weights)
        self.layer = self._layout.owner(self.device)
        rows = torch.arange(len(self.layer), device=self.device)
        firsts = itertools.accumulate(self._layout.chunks[:-1], initial=0)
        # Numbers that the device has already: to send it any would be to wait.
        first = torch.stack([rows[first] for first in firsts])
        self._start = CHUNK * rows  # of each row, in all
        self._within = self._start - CHUNK * first.index_select(0, self.layer)  # in its layer
        self._column = torch.arange(CHUNK, device=self.device)
        self._group = 2 * self.layer.to(torch.int16)[:, None]
        self._places: Tensor | None = None  # in memory, by position; None: the same
        if not self._layout.in_order:
            self._places = self._layout.places(self.device, inverse=False)

    def join(self, *lists: Sequence[Tensor]) -> Tensor:
        """[lists, rows, length] of tensors like the weights, of one dtype; filled up with 0."""
        layout = Layout(self._layout.shapes * len(lists), self._layout.last * len(lists))
        tensors = [tensor.detach() for each in lists for tensor in each]
        joined = layout.join(tensors, 0).view(len(lists), -1)
        if self._places is not None:
            joined = joined.index_select(1, self._places)
        return joined.view(len(lists), -1, CHUNK)

    def everywhere(self) -> Tensor:
        """bool [rows, length]: true, but for what is filled up."""
        true = torch.ones((), dtype=torch.bool, device=self.device)
        return self._layout.join([true.expand(shape) for shape in self._layout.shapes], False)

    def split(self, joined: Tensor) -> list[Tensor]:
        """What was joined, list after list, as tensors that lie in memory as the weights do."""
        if self._places is not None:
            vectors = joined.view(len(joined), -1)
            joined = torch.empty_like(vectors).index_copy_(1, self._places.long(), vectors)
        return [tensor for one in joined for tensor in self._layout.split(one)]

    def parts(self, joined: Tensor) -> list[Tensor]:
        """Views of one list's [rows, length], contiguous and of the shapes of the weights."""
        plain = self._layout._replace(last=(False,) * len(self._layout.last))
        return plain.split(joined)

    def random(self, draw: torch.Generator) -> list[Tensor]:
        """Uniform in [0, 1), like the weights; ``draw`` is on their device."""
        numbers = torch.rand(len(self.layer), CHUNK, generator=draw, device=self.device)
        return self._layout.split(numbers)

    def count(self, joined: Tensor) -> Tensor:
        """int64 [..., layers]: how many entries of a bool tensor [..., rows, length] they have."""
        rows = joined.sum(-1)
        counts = rows.new_zeros(*rows.shape[:-1], len(self._layout.shapes))
        return counts.index_add_(-1, self.layer, rows)

    def highest(self, scores: Tensor, allowed: Tensor, keep: Tensor) -> Tensor:
        """bool [rows, length]: the highest scores, as many as asked for; ties go to the earlier.

        By two sorts that keep the order of equals: by score, then by layer, where what is allowed
        comes first. They take about 40 bytes for each entry, and few operations, of which none
        waits. Counts, as in `selection`, take less memory, and ten times the operations.

        Args:
            scores: [rows, length], floating point.
            allowed: bool like ``scores``; has at least as many entries as are kept.
            keep: int64 [layers]: of each layer; or int64 []: of all together.
        """
        order = scores.flatten().argsort(descending=True, stable=True)
        group = (~allowed).view(torch.uint8)
        if keep.dim():
            group = group + self._group
            room = keep.index_select(0, self.layer) - self._within
        else:
            room = keep - self._start
        order = order[group.flatten()[order].argsort(stable=True)]
        kept = self._column < room[:, None]
        return torch.empty_like(kept).view(-1).index_copy_(0, order, kept.view(-1)).view_as(kept)

    def dead_units(self, mask: Tensor) -> Tensor:
        """int64 []: outputs without an incoming edge, and inputs without an outgoing one."""
        facts: list[tuple[int, ...]] = []
        units = 0
        for shape in self._layout.shapes:
            kernel = shape[2:].numel()
            facts.append((shape[1] * kernel, kernel, units, units + shape[0]))
            units += shape[0] + shape[1]
        most = max(mask.numel(), units)
        numbers = torch.arange(most + 1, dtype=torch.int32, device=self.device)
        known = torch.stack([numbers[fact] for layer in facts for fact in layer]).view(-1, 4)
        known = known.index_select(0, self.layer).view(-1, 4, 1)
        fan_in, size, first_output, first_input = known.unbind(1)
        place = (self._within[:, None] + self._column).int()
        ends = place // fan_in + first_output, place % fan_in // size + first_input
        reached = torch.zeros(units + 1, dtype=torch.bool, device=self.device)
        for unit in ends:  # the last is no unit
            reached.index_fill_(0, torch.where(mask, unit, units).view(-1).long(), True)
        return units - reached[:-1].sum()
