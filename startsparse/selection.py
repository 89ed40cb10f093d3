"""The k largest of many scores: exactly k, ties by position, and no sort.

The k-th largest decides the rest, and there are two ways to find it. On the CPU a strided sample of
the scores gives a narrow band around it, and only the few scores in that band are partitioned
(Floyd and Rivest 1975, algorithm SELECT). On a GPU, where to read a number is to wait for the
device and every operation takes time to start, a fixed number of counts finds its bit pattern
(`selection_by_counts`), for all tensors at once. torch.compile can trace that.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from startsparse.selection_by_counts import by_counting, in_memory_order

_STRIDE = 61  # a prime, so that it does not fall into step with rows, channels or kernels


@torch.no_grad()
def top_masks(
    magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None], keep: Tensor
) -> list[Tensor]:
    """Masks of the ``keep`` largest entries of all ``magnitudes`` together.

    Ties go to earlier tensors and positions.

    Args:
        magnitudes: floating point tensors >= 0 of one dtype, of any shape and memory format; 0
            outside ``allowed``.
        allowed: for each of them a bool tensor of its shape, or None where every entry is allowed.
        keep: int64 [], on the same device. If fewer entries are allowed, all of them are kept.

    Returns:
        For each of them a tensor like it, 1.0 where kept and 0.0 elsewhere. On the CPU a product
        with such a mask is several times faster than with a bool one.
    """
    return top_of_groups(magnitudes, allowed, keep.view(1), [len(magnitudes)])


@torch.no_grad()
def top_of_groups(
    magnitudes: Sequence[Tensor],
    allowed: Sequence[Tensor | None],
    keep: Tensor,
    sizes: Sequence[int],
) -> list[Tensor]:
    """The same for groups of so many tensors: the ``keep[i]`` largest of group i; see `top_masks`.

    On a GPU the number of operations does not depend on the number of tensors, and nothing waits.

    Args:
        keep: int64 [groups].
        sizes: number of tensors in each group; they follow one another.
    """
    if not one_by_one(magnitudes[0].device):
        return by_counting(magnitudes, allowed, keep, sizes)
    masks: list[Tensor] = []
    for size, count in zip(sizes, keep.tolist()):
        part = slice(len(masks), len(masks) + size)
        masks += by_sampling(magnitudes[part], allowed[part], count)
    return masks


def one_by_one(device: torch.device) -> bool:
    """Whether tensors are better dealt with one by one: on CPUs, unless torch.compile traces."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def by_sampling(
    magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None], keep: int
) -> list[Tensor]:
    """`top_masks` on the CPU."""
    keep = min(keep, sum(m.numel() for m in magnitudes))
    if keep <= 0:
        return [torch.zeros_like(m) for m in magnitudes]
    threshold, at_least = _kth_by_sampling([_numpy(m) for m in magnitudes], keep)
    if at_least == keep and threshold > 0:
        return [m.clone().ge_(threshold) for m in magnitudes]  # in place: 1.0 and 0.0, not bool
    return _masks(magnitudes, allowed, threshold, keep)


def _masks(
    magnitudes: Sequence[Tensor],
    allowed: Sequence[Tensor | None],
    threshold: float,
    keep: int,
) -> list[Tensor]:
    """The entries above the ``keep``-th largest, and as many of its ties as are missing."""
    above = [m > threshold for m in magnitudes]
    missing = keep - sum(a.sum() for a in above)
    masks = []
    for magnitude, larger, inside in zip(magnitudes, above, allowed):
        tied = magnitude == threshold
        if inside is not None:
            tied = tied & inside
        rank = tied.flatten().cumsum(0)
        masks.append((larger | tied & (rank.view(tied.shape) <= missing)).to(magnitude.dtype))
        missing = missing - rank[-1]
    return masks


def _kth_by_sampling(parts: Sequence[np.ndarray], k: int) -> tuple[float, int]:
    """The k-th largest of all ``parts`` (flat, >= 0), and how many entries are at least that."""
    sample = np.sort(np.concatenate([part[::_STRIDE] for part in parts]))
    total = sum(part.size for part in parts)
    rank = len(sample) * k / total
    margin = 2 + 6 * math.sqrt(rank * max(1 - rank / len(sample), 0))  # six standard deviations
    first, last = int(rank - margin), math.ceil(rank + margin)
    high = sample[-first] if first >= 1 else sample.dtype.type(np.inf)
    low = sample[-last] if last <= len(sample) else sample.dtype.type(0)
    low = max(low, np.finfo(sample.dtype).tiny)  # the zeros are many, and outside the mask
    above = [part > high for part in parts]
    upper = [part >= low for part in parts]
    more, at_least = (sum(map(np.count_nonzero, masks)) for masks in (above, upper))
    if not more < k <= at_least:
        more, band = 0, np.concatenate(parts)
    elif low == high:
        return float(low), at_least
    else:
        positions = [np.flatnonzero(u ^ a) for u, a in zip(upper, above)]
        band = np.concatenate([part[where] for part, where in zip(parts, positions)])
    index = len(band) - (k - more)
    kth = np.partition(band, index)[index]
    return float(kth), more + int(np.count_nonzero(band >= kth))


def _numpy(tensor: Tensor) -> np.ndarray:
    vector = in_memory_order(tensor)
    return (vector.float() if vector.dtype == torch.bfloat16 else vector).numpy()
