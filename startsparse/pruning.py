"""Pruners by name: which weights of a masked network stay.

A new pruner is a function (model, count, inputs) that shrinks masks, and a line in `PRUNERS`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from startsparse import scores
from startsparse.masks import keep_inside, masked_weights, nnz, round_to_total, sparse_layers
from startsparse.ratios import layer_densities

Batch = Callable[[], tuple[Tensor, Tensor]]

ROUNDS = 100  # of synflow


class Inputs(NamedTuple):
    """What pruners may use besides the model; see `prune`."""

    seed: int
    level: int
    batch: Batch | None
    shape: Sequence[int] | None
    temperature: float


def prune(
    model: nn.Module,
    pruner: str,
    count: int,
    *,
    seed: int,
    level: int,
    batch: Batch | None = None,
    shape: Sequence[int] | None = None,
    temperature: float = scores.TEMPERATURE,
) -> None:
    """Shrink the masks, in place, to exactly ``count`` weights and zero the weights outside.

    No pruned weight comes back. Of tied scores those of earlier layers and positions stay. The
    caller zeroes the optimizer's state outside the masks (`masks.keep_inside`).

    Args:
        model: the bare network; layers without a mask are left alone and not counted.
        pruner: a name of `PRUNERS`.
        count: weights of the masked layers that stay.
        seed: the run's.
        level: number of the pruning in the run; random pruners draw anew at each.
        batch: gives (examples, labels) for snip and grasp, on the model's device. Called once.
        shape: of an input, see `scores.synflow`.
        temperature: of the logits, see `scores.grasp`.

    Raises:
        ValueError: an unknown pruner, more weights than are left, a missing ``batch`` or
            ``shape``, or a score that is NaN. Masks and weights are then unchanged, unless the
            score became NaN in a later round of synflow.
    """
    if pruner not in PRUNERS:
        raise ValueError(f"no pruner is called {pruner!r}; choose from {', '.join(PRUNERS)}")
    left = sum(_left(model))
    if not 0 <= count <= left:
        raise ValueError(f"{count} weights cannot be kept: {left} are left")
    PRUNERS[pruner](model, count, Inputs(seed, level, batch, shape, temperature))
    keep_inside(model)


def _left(model: nn.Module) -> list[int]:
    counts = nnz(model)
    return [counts[name] for name, _, _ in masked_weights(model)]


def _magnitude(model: nn.Module, count: int, _: Inputs) -> None:
    scores.keep_top(model, scores.magnitude(model), count)


def _snip(model: nn.Module, count: int, inputs: Inputs) -> None:
    scores.keep_top(model, scores.snip(model, *_batch("snip", inputs)), count)


def _grasp(model: nn.Module, count: int, inputs: Inputs) -> None:
    examples, labels = _batch("grasp", inputs)
    scores.keep_top(model, scores.grasp(model, examples, labels, inputs.temperature), count)


def _batch(pruner: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.batch is None:
        raise ValueError(f"the pruner {pruner} needs a batch")
    return inputs.batch()


def _synflow(model: nn.Module, count: int, inputs: Inputs) -> None:
    """`ROUNDS` rounds, the density falling exponentially (Tanaka et al. 2020, algorithm 1)."""
    if inputs.shape is None:
        raise ValueError("the pruner synflow needs the shape of an input")
    start = left = sum(_left(model))
    for number in range(1, ROUNDS + 1):
        target = round(start * (count / start) ** (number / ROUNDS)) if start else 0
        if target < left:  # rounds that remove nothing need no scores
            scores.keep_top(model, scores.synflow(model, inputs.shape), target)
            keep_inside(model)
            left = target


def _random(model: nn.Module, count: int, inputs: Inputs) -> None:
    scores.keep_top(model, scores.random(model, inputs.seed, inputs.level), count)


def _random_by(ratio: str) -> Callable[[nn.Module, int, Inputs], None]:
    def shrink_layers(model: nn.Module, count: int, inputs: Inputs) -> None:
        masks = {name: mask for name, _, mask in masked_weights(model)}
        draws = scores.random(model, inputs.seed, inputs.level)
        shapes = [mask.shape for mask in masks.values()]
        for (name, mask), part in zip(
            masks.items(), layer_counts(ratio, shapes, _left(model), count)
        ):
            scores.shrink({name: mask}, draws, int(part))

    return shrink_layers


def layer_counts(
    ratio: str, shapes: Sequence[Sequence[int]], left: Sequence[float], count: int
) -> np.ndarray:
    """How many of the ``left`` weights of each layer stay, ``count`` in all.

    Densities are relative to the full size of the layers. A layer with fewer weights left than its
    ratio asks for keeps them all; the others are then solved again.

    Args:
        ratio: a profile of `ratios.PROFILES`.
        shapes: weight shapes (outputs, inputs, *kernel).
        left: weights that each layer has; at least ``count`` in all.
    """
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=float)
    has = np.asarray(left, dtype=float)
    counts, free = has.copy(), np.ones(len(sizes), dtype=bool)
    while free.any():
        rest = count - has[~free].sum()
        if rest <= 0:
            counts[free] = 0
            break
        free_shapes = [shape for shape, is_free in zip(shapes, free) if is_free]
        density = min(1.0, rest / sizes[free].sum())
        counts[free] = layer_densities(ratio, free_shapes, density) * sizes[free]
        short = free & (counts > has)
        counts[short] = has[short]
        free &= ~short
        if not short.any():
            break
    return round_to_total(counts)


def weights_left(model: nn.Module, density: float) -> int:
    """How many masked weights stay at ``density``, so that round(density N) of all N are left.

    Layers without a mask are dense and count as kept.
    """
    masked = {name for name, _, _ in masked_weights(model)}
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    dense = sum(size for name, size in sizes.items() if name not in masked)
    return round(density * sum(sizes.values())) - dense


PRUNERS: dict[str, Callable[[nn.Module, int, Inputs], None]] = {
    "mag": _magnitude,
    "random-global": _random,
    "random-uniform": _random_by("uniform"),
    "random-balanced": _random_by("balanced"),
    "random-erk": _random_by("ERK"),
    "snip": _snip,
    "grasp": _grasp,
    "synflow": _synflow,
}
