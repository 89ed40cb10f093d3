"""Addition modulo p: every pair of numbers once, some for training."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from startsparse import memory, seeding
from startsparse.data.rows import Rows, halves
from startsparse.errors import OptionError


@dataclass
class Pairs:
    """All pairs of numbers below a modulus, and the fraction of them for training.

    Attributes:
        features: float32 [N, p], how often each number is in the pair.
        labels: int64 [N], the sum modulo p.
        train_fraction: fraction of the pairs to train on, in (0, 1).
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
        """Training, validation and test part; the last two split the remaining pairs in halves.

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

    The input is onehot(a) + onehot(b). A linear layer without bias turns it into E_a + E_b, the sum
    of two embeddings, which is the input of the paper's decoder. So (a, b) and (b, a) are the same
    input, and one example; there are p (p + 1) / 2. As two examples they would put about half of
    the test set into the training set.
    """
    check(modulus, train_fraction)
    a, b = torch.triu_indices(modulus, modulus)
    features = F.one_hot(a, modulus) + F.one_hot(b, modulus)
    return Pairs(features.to(torch.float32), (a + b) % modulus, train_fraction)


def trained_on(pairs: int, train_fraction: float) -> int:
    """Number of pairs for training."""
    return round(train_fraction * pairs)


def check(modulus: int, train_fraction: float) -> None:
    """Raise `OptionError` where the options leave a part empty, or training with one example."""
    if modulus < 2:
        raise OptionError(f"--modulus: {modulus} should be at least 2")
    needed = 8 * 3 * modulus * modulus * (modulus + 1) // 2  # two one-hot tensors and their sum
    if needed > (installed := memory.installed()):
        raise OptionError(
            f"--modulus: the pairs of {modulus} need {needed / 2**30:.1f} GiB of memory, this "
            f"machine has {installed / 2**30:.1f} GiB"
        )
    if not 0 < train_fraction < 1:
        raise OptionError(f"--train-fraction: {train_fraction} should be above 0 and below 1")
    pairs = modulus * (modulus + 1) // 2
    count = trained_on(pairs, train_fraction)
    if count < 2 or pairs - count < 2:
        raise OptionError(
            f"--train-fraction: {train_fraction:g} of {pairs} pairs leaves {count} to train on and "
            f"{pairs - count} to validate and test on; two of each are needed at least"
        )
