"""How masks move: which weights are dropped, which grow, and when. `dynamic` has the step.

Everything works in place on `masked_weights(model)`. A new growth rule is a function and a line in
`GROWTH`; a new pruning score, one in `PRUNE`; a new method, one in `METHODS`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from startsparse import scores
from startsparse.masks import SparseLayer, gradient, masked_weights
from startsparse.method import When
from startsparse.pruning import layer_counts, weights_left
from startsparse.schedules import cosine, cubic

LAST_FRACTION = 0.005  # of a layer's weights that are dropped and grown at the end


def _magnitude(weights: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_abs([weight.detach() for weight in weights]))


# --prune: weights of some layers -> scores like them; the lowest go.
PRUNE: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {"magnitude": _magnitude}

Draw = Callable[[], list[Tensor]]
"""Gives numbers in [0, 1) like the weights of some layers, new ones in each update."""


class Growth(NamedTuple):
    """A rule that chooses weights to grow; FLOPs and sparse compute follow from what it needs.

    Attributes:
        score: (layers, draw) -> scores like their weights; the highest outside the mask grow. On a
            CPU it is asked layer by layer, on a GPU once.
        dense_gradients: in which steps it needs the gradients outside the masks.
        accumulate: (model, --momentum), called after each backward pass as long as masks grow; it
            adds to the buffer ``growth_state`` of masked layers, which is like the weight.
    """

    score: Callable[[Sequence[SparseLayer], Draw], list[Tensor]]
    dense_gradients: When = "never"
    accumulate: Callable[[nn.Module, float], None] | None = None


def _random(_: Sequence[SparseLayer], draw: Draw) -> list[Tensor]:
    """At random (SET, Mocanu et al. 2018)."""
    return draw()


def _gradient(layers: Sequence[SparseLayer], _: Draw) -> list[Tensor]:
    """|dL/dw| of this step's batch, dense (RigL, Evci et al. 2020)."""
    return list(torch._foreach_abs([gradient(layer.weight) for layer in layers]))


def _momentum(layers: Sequence[SparseLayer], _: Draw) -> list[Tensor]:
    """|momentum| of the dense gradient (sparse momentum, Dettmers & Zettlemoyer 2019)."""
    return list(torch._foreach_abs([layer.get_buffer("growth_state") for layer in layers]))


@torch.no_grad()
def add_to_momentum(model: nn.Module, factor: float) -> None:
    """growth_state <- factor growth_state + gradient, in every masked layer."""
    masked = [(model.get_submodule(name), weight) for name, weight, _ in masked_weights(model)]
    sums = [layer.get_buffer("growth_state") for layer, _ in masked]
    torch._foreach_mul_(sums, factor)
    torch._foreach_add_(sums, [gradient(weight) for _, weight in masked])


# --growth
GROWTH: dict[str, Growth] = {
    "random": Growth(_random),
    "gradient": Growth(_gradient, "at updates"),
    "momentum": Growth(_momentum, "always", add_to_momentum),
}


def prune_globally(model: nn.Module, density: float, score: str) -> None:
    """Shrink the masks to the round(density N) highest scores of the network's N weights.

    Masks that have fewer already stay as they are.
    """
    names, weights, masks = zip(*masked_weights(model))
    nnz = sum(int(mask.sum()) for mask in masks)
    values = dict(zip(names, PRUNE[score](weights)))
    scores.keep_top(model, values, min(nnz, weights_left(model, density)))


def prune_uniformly(model: nn.Module, density: float, score: str) -> None:
    """The same, but every layer is pruned to the same density.

    A layer that is sparser already keeps all its weights, and the others keep more.
    """
    entries = list(masked_weights(model))
    nnz = [int(mask.sum()) for _, _, mask in entries]
    total = min(sum(nnz), weights_left(model, density))
    counts = layer_counts("uniform", [mask.shape for _, _, mask in entries], nnz, total)
    for (name, weight, mask), count in zip(entries, counts):
        (importance,) = PRUNE[score]([weight])
        scores.shrink({name: mask}, {name: importance}, int(count))


def drop_and_grow(
    mask: Tensor, importance: Tensor, growth: Tensor, fraction: float, allowed: Tensor | None = None
) -> None:
    """Drop the lowest ceil(fraction n) of a layer's n weights, then grow as many, in place.

    A dropped weight may be grown again; it then keeps its value. Ties go to earlier positions, both
    in what stays and in what grows. The number of weights stays exactly the same.

    Args:
        mask: bool, like the weight.
        importance: of each weight; the lowest are dropped.
        growth: like ``mask``; the highest outside the weights left are grown.
        fraction: in [0, 1].
        allowed: bool, where weights may grow other than in ``mask`` itself (default: anywhere).

    Raises:
        ValueError: a score is NaN.
    """
    before = mask.clone()
    count = int(before.sum())
    # A hair less: 0.15 * 20 is above 3 in floating point, and its ceiling would be 4.
    dropped = math.ceil(fraction * count * (1 - 1e-12))
    scores.shrink({"importance": mask}, {"importance": importance}, count - dropped)
    candidates = ~mask if allowed is None else (allowed | before) & ~mask
    scores.shrink({"growth": candidates}, {"growth": growth}, dropped)
    mask |= candidates


class Update(NamedTuple):
    """What a method does in an update: prune (or not), then drop and grow (or not)."""

    prune: Callable[[nn.Module, float, str], None] | None
    grow: bool


METHODS: dict[str, Update] = {
    "GraNet": Update(prune_globally, grow=True),  # Liu et al. 2021
    "GraNet_uniform": Update(prune_uniformly, grow=True),
    "DST": Update(None, grow=True),  # SET, RigL: constant density
    "GMP": Update(prune_globally, grow=False),  # Zhu & Gupta 2017
    "GMP_uniform": Update(prune_uniformly, grow=False),
}


class Change(NamedTuple):
    """One update: prune to ``density``, then drop and grow ``fraction`` of each layer's weights.

    Attributes:
        method: a name of `METHODS`.
        prune, growth: names of `PRUNE` and `GROWTH`.
        within_initial: whether weights grow in the initial mask only.
        preserve_flow: whether units that it left dead get an edge; see `flow`.
    """

    method: str
    seed: int
    step: int
    density: float = 1.0
    fraction: float = 0.0
    prune: str = "magnitude"
    growth: str = "gradient"
    within_initial: bool = False
    preserve_flow: bool = False


class Schedule(NamedTuple):
    """When masks move. Steps are counted from 0; an update comes before the step of the weights.

    Attributes:
        steps: of the whole training.
        per_epoch: steps of an epoch.
        every: steps between updates.
        start, end: of the pruning; at ``end`` the final density is reached.
        stop: the first step without drop and grow.
        initial, final: densities.
        fraction: share of the weights that are dropped and grown, at the start.
        prunes: whether the density falls.
    """

    steps: int
    per_epoch: int
    every: int
    start: int
    end: int
    stop: int
    initial: float
    final: float
    fraction: float
    prunes: bool

    def due(self, step: int) -> bool:
        """Whether ``step`` has an update: a multiple of ``every``, and the end of the pruning.

        From ``stop`` on updates only prune, and after the pruning there are none.
        """
        if self.prunes and step == self.end:
            return True
        regular = step > 0 and step % self.every == 0
        return regular and (step < self.stop or (self.prunes and step < self.end))

    def density(self, step: int) -> float:
        """Cubic from initial to final (Zhu & Gupta 2017, equation 1)."""
        if step >= self.end:  # in a very short window, start is the end too
            return self.final
        progress = max(0, step - self.start) / max(1, self.end - self.start)
        return cubic(progress, self.initial, self.final)

    def drop_fraction(self, step: int) -> float:
        """Cosine from ``fraction`` to 0.005 at ``stop``, and 0 from there on.

        RigL anneals to the step at which its updates end, T_end (Evci et al. 2020, section 3).
        """
        if step >= self.stop:
            return 0.0
        return cosine(step / self.stop, self.fraction, min(self.fraction, LAST_FRACTION))
