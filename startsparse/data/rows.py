"""Batches of rows of numbers, without augmentation, and epochs of several passes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from startsparse import seeding
from startsparse.data.batches import parts, steps, whole_size


class Rows:
    """One part of a set of rows, resident on the device; the interface is that of `Batches`.

    Args:
        features: float32 [N, F].
        labels: int64 [N].
        batch_size: rows per batch; the last one of an epoch may be smaller (see `batches.steps`).
        device: holds the rows.
        seed: the order of an epoch depends on it and on the epoch. None: plain order.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
    ) -> None:
        self.features, self.labels = features.to(device), labels.to(device)
        self.examples = len(labels)
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        """Steps of one epoch."""
        return steps(self.examples, self.batch_size, train=self.seed is not None)

    def size(self, step: int) -> int:
        """Rows of the whole batch of a step, see `batches.whole_size`."""
        return whole_size(self.examples, self.batch_size, step)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [B, F, 1, 1] and labels [B] from step ``start`` on, as `Batches.epoch`."""
        features, labels = self.features[:, :, None, None], self.labels
        if self.seed is not None:
            draws = seeding.generator(self.seed, "shuffle", epoch)
            order = torch.randperm(self.examples, generator=draws).to(labels.device)
            features, labels = features[order], labels[order]
        for part in parts(self.examples, self.batch_size, self.seed is not None, start):
            yield features[part], labels[part]


class Repeated:
    """Batches of any kind whose epoch is ``passes`` epochs of ``batches``."""

    def __init__(self, batches: Any, passes: int) -> None:
        self.batches, self.passes = batches, passes
        self.examples = passes * batches.examples

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self.passes * len(self.batches)

    def size(self, step: int) -> int:
        """Examples of the whole batch of a step."""
        return self.batches.size(step % len(self.batches))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epochs of ``batches`` from number ``passes * epoch`` on, after ``start`` steps."""
        done, step = divmod(start, len(self.batches))
        for number in range(done, self.passes):
            yield from self.batches.epoch(self.passes * epoch + number, step)
            step = 0


def halves(examples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Validation and test part, both ascending, of ``examples`` [N]; the larger half is the test.

    Which examples are in which part depends on ``seed`` alone.
    """
    order = torch.randperm(len(examples), generator=seeding.generator(seed, "valid-test-split"))
    half = len(examples) // 2
    valid, test = (examples[part.sort().values] for part in (order[:half], order[half:]))
    return valid, test
