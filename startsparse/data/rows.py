"""Batches of rows of numbers, without augmentation, and epochs of several passes."""

from collections.abc import Iterator, Sequence
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
            order = self.order(epoch).to(labels.device)
            features, labels = features[order], labels[order]
        for part in parts(self.examples, self.batch_size, self.seed is not None, start):
            yield features[part], labels[part]

    def order(self, epoch: int) -> Tensor:
        """The rows in the order of the epoch: int64 [N], on the CPU."""
        if self.seed is None:
            return torch.arange(self.examples)
        draws = seeding.generator(self.seed, "shuffle", epoch)
        return torch.randperm(self.examples, generator=draws)


class SideBySide:
    """The rows of several networks, whose batches come as one.

    Args:
        parts: with the same number of rows, features and rows per batch, on one device.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.features = torch.cat([part.features for part in parts])[:, :, None, None]
        self.labels = torch.cat([part.labels for part in parts])

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [networks, B, F, 1, 1] and labels [networks, B] of each step.

        The indices of all steps are copied to the device at once.
        """
        first, networks = self.parts[0], len(self.parts)
        order = torch.stack([part.order(epoch) for part in self.parts])
        order += first.examples * torch.arange(networks)[:, None]
        batches = order.split(first.batch_size, 1)[: len(first)]
        # Each step's in one piece: a slice of it needs no copy.
        indices = torch.cat([batch.flatten() for batch in batches]).to(self.labels.device)
        for rows in indices.split([batch.numel() for batch in batches]):
            features = self.features.index_select(0, rows)
            labels = self.labels.index_select(0, rows)
            yield features.unflatten(0, (networks, -1)), labels.view(networks, -1)


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
