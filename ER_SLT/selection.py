"""The k largest of many scores: exactly k, ties by position, and no sort.

The k-th largest decides the rest, and there are two ways to find it. On the CPU a strided sample of
the scores gives a narrow band around it, and only the few scores in that band are partitioned
(Floyd and Rivest 1975, algorithm SELECT). On a GPU, where to read a number is to wait for the
device, a fixed number of counts finds its bit pattern. Nothing there leaves the device, and
torch.compile can trace it.
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

_STRIDE = 61  # a prime, so that it does not fall into step with rows, channels or kernels
_BITS = 4  # that a pass over the scores finds on a GPU, by 15 counts


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
    if magnitudes[0].device.type == "cpu" and not torch.compiler.is_compiling():
        return by_sampling(magnitudes, allowed, int(keep))
    return by_counting(magnitudes, allowed, keep)


def by_sampling(
    magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None], keep: int
) -> list[Tensor]:
    """`top_masks` on the CPU."""
    keep = min(keep, sum(m.numel() for m in magnitudes))
    if keep <= 0:
        return [torch.zeros_like(m) for m in magnitudes]
    threshold, at_least = _kth_by_sampling([_flat(m).numpy() for m in magnitudes], keep)
    if at_least == keep and threshold > 0:
        return [m.clone().ge_(threshold) for m in magnitudes]  # in place: 1.0 and 0.0, not bool
    return _masks(magnitudes, allowed, threshold, keep)


def by_counting(
    magnitudes: Sequence[Tensor], allowed: Sequence[Tensor | None], keep: Tensor | int
) -> list[Tensor]:
    """`top_masks` on any device, in tensor operations whose number depends on the dtype only."""
    # Floating point numbers >= 0 are in the order of their bit patterns, read as integers.
    width = 8 * magnitudes[0].element_size()
    pattern = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    bits = [_flat(m).view(pattern) for m in magnitudes]
    kth = torch.zeros((), dtype=pattern, device=bits[0].device)
    for shift in range(width - _BITS, -1, -_BITS):
        digits = 2 ** (_BITS - 1) if shift == width - _BITS else 2**_BITS  # the sign bit is 0
        tries = kth + (torch.arange(1, digits, dtype=pattern, device=kth.device) << shift)
        counts = reduce(torch.add, ((b >= tries[:, None]).sum(1) for b in bits))
        kth = kth + ((counts >= keep).sum().to(pattern) << shift)
    return _masks(magnitudes, allowed, kth.view(magnitudes[0].dtype), keep)


def _masks(
    magnitudes: Sequence[Tensor],
    allowed: Sequence[Tensor | None],
    threshold: Tensor | float,
    keep: Tensor | int,
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


def _flat(tensor: Tensor) -> Tensor:
    """All entries in one dimension, in their order in memory, which seldom takes a copy."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten()
