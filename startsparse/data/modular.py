"""Addition modulo p: every pair of numbers once, some of them to learn from."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from startsparse import seeding
from startsparse.data.rows import Rows, halves
from startsparse.errors import OptionError


@dataclass
class Pairs:
    """All pairs of numbers below a modulus, and which share of them is trained on.

    Attributes:
        features: float32 [N, p], how often each number is in the pair.
        labels: int64 [N], the sum modulo p.
        train_fraction: share of the pairs to train on, in (0, 1).
        size: for a network, a pair is an image of one pixel with p channels.
    """

    features: Tensor
    labels: Tensor
    train_fraction: float
    size: int = 1

    @property
    def classes(self) -> int:
        """The modulus."""
        return self.features.shape[1]

    @property
    def channels(self) -> int:
        """The modulus."""
        return self.features.shape[1]

    def batches(
        self, *, batch_size: int, seed: int, device: torch.device, **_: object
    ) -> tuple[Rows, Rows, Rows]:
        """Training, validation and test part; the last two are half of what is not trained on.

        Which pairs are in which part depends on ``seed`` alone.
        """
        pairs = len(self.labels)
        order = torch.randperm(pairs, generator=seeding.generator(seed, "train-split"))
        count = trained_on(pairs, self.train_fraction)
        train = order[:count].sort().values
        valid, test = halves(order[count:].sort().values, seed)
        part = partial(Rows, batch_size=batch_size, device=device)
        return (
            part(self.features[train], self.labels[train], seed=seed),
            part(self.features[valid], self.labels[valid]),
            part(self.features[test], self.labels[test]),
        )


def load(
    root: Path,  # noqa: ARG001 -- the set needs no file
    mirror: str = "",  # noqa: ARG001
    *,
    modulus: int = 59,
    train_fraction: float = 0.7,
) -> Pairs:
    """a + b modulo ``modulus``, as in Liu et al. (2022, arXiv:2205.10343), section 3.

    A pair is given as onehot(a) + onehot(b): a linear layer without bias makes of it E_a + E_b, the
    sum of two embeddings, which is what the paper's decoder sees. As it sees nothing else, (a, b)
    and (b, a) are one example, of which there are p (p + 1) / 2; kept apart, half of a test set
    would be in the training set.
    """
    check(modulus, train_fraction)
    a, b = torch.triu_indices(modulus, modulus)
    features = F.one_hot(a, modulus) + F.one_hot(b, modulus)
    return Pairs(features.to(torch.float32), (a + b) % modulus, train_fraction)


def trained_on(pairs: int, train_fraction: float) -> int:
    """How many of the pairs are trained on."""
    return round(train_fraction * pairs)


def check(modulus: int, train_fraction: float) -> None:
    """Raise `OptionError` where the options leave a part empty, or training with one example."""
    if modulus < 2:
        raise OptionError(f"--modulus: {modulus} should be at least 2")
    if not 0 < train_fraction < 1:
        raise OptionError(f"--train-fraction: {train_fraction} should be above 0 and below 1")
    pairs = modulus * (modulus + 1) // 2
    count = trained_on(pairs, train_fraction)
    if count < 2 or pairs - count < 2:
        raise OptionError(
            f"--train-fraction: {train_fraction:g} of {pairs} pairs leaves {count} to train on and "
            f"{pairs - count} to validate and test on; two of each are needed at least"
        )
