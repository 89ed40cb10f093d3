"""Sums of losses and hits over the batches of an epoch."""

import math

import torch
from torch import Tensor

_KEPT = 1 << 14  # logits to keep before they are folded: a few steps of a small network


def new_sums(device: torch.device) -> Tensor:
    """float64 [4]: sum of losses, hits, examples, and first step with a bad loss (inf: none)."""
    return torch.tensor([0.0, 0.0, 0.0, torch.inf], dtype=torch.float64, device=device)


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (in [0, 1]) of `new_sums`. Waits for the device."""
    loss, hits, examples, _ = sums.tolist()
    return {"loss": loss / max(examples, 1), "accuracy": hits / max(examples, 1)}


def is_late(device: torch.device) -> bool:
    """Whether reading a value from ``device`` waits for the operations before."""
    return device.type != "cpu"


class Totals:
    """Adds batches to `new_sums`; those of the last steps only when `fold` is called.

    On the CPU many small batches are counted at once, as operations on one of them take longer than
    a tenth of a step of a small network. Elsewhere nothing waits for the device.

    Attributes:
        late: whether looking at the sums waits for their device.
        bad: where it does not, the first step whose loss was not finite (inf: none).
    """

    def __init__(self, sums: Tensor):
        self.sums, self.bad = sums, math.inf
        self.late = is_late(sums.device)
        self._kept: list[tuple[float, Tensor, Tensor]] = []
        self._size = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
        """Add a batch [B, classes]; a label below 0 is of a node that is not of this part."""
        if self.late:
            self._add_there(loss, logits, labels, step)
            return
        mean = loss.item()
        if not math.isfinite(mean):
            self.bad = min(self.bad, step)
        self._kept.append((mean, logits, labels))
        self._size += logits.numel()
        if self._size > _KEPT:
            self.fold()

    def fold(self) -> None:
        """Make ``sums`` those of all batches."""
        if not self._kept:
            return
        losses, logits, labels = zip(*self._kept)
        self._kept, self._size = [], 0
        wanted = torch.cat(labels)
        hits = torch.count_nonzero(torch.cat(logits).argmax(1) == wanted).item()
        examples = torch.count_nonzero(wanted >= 0).item()
        counts: list[float] = [len(part) for part in labels]
        if examples < len(wanted):
            counts = [torch.count_nonzero(part >= 0).item() for part in labels]
        total, old_hits, old_examples, first_bad = self.sums.tolist()
        for mean, count in zip(losses, counts):  # in the order and precision of single sums
            total += mean * count
        values = [total, old_hits + hits, old_examples + examples, min(first_bad, self.bad)]
        self.sums.copy_(torch.tensor(values, dtype=torch.float64))

    def _add_there(self, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
        losses, hits_and_examples, first_bad = self.sums.split([1, 2, 1])
        counts = torch.stack((logits.argmax(1) == labels, labels >= 0)).sum(1)
        mean = loss.double()
        losses.add_(mean * counts[1])
        hits_and_examples.add_(counts)
        bad = (mean - mean).add_(torch.inf).nan_to_num_(nan=step, posinf=torch.inf)
        torch.minimum(first_bad, bad, out=first_bad)
