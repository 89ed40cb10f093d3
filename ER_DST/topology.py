"""How masks move in training: drop and grow, and gradual pruning.

Everything works in place on `masked_weights(model)`. A new growth rule is a function and a line in
`GROWTH`; a new way to prune is one in `PRUNE`; a method, one in `METHODS`, is when to use which.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from startsparse import scores
from startsparse.masks import masked_weights, sparse_layers
from startsparse.pruning import layer_counts, weights_left
from startsparse.schedules import cosine, cubic
from startsparse.seeding import generator

LAST_FRACTION = 0.005  # of a layer's weights that is dropped and grown at the end


def _magnitude(weight: Tensor) -> Tensor:
    return weight.detach().abs()


# --prune: weight -> score like the weight; the lowest go.
PRUNE: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": _magnitude}


def _random(layer: nn.Module, draw: torch.Generator) -> Tensor:
    """Chance (SET, Mocanu et al. 2018)."""
    return torch.rand(layer.weight.shape, generator=draw).to(layer.weight.device)


def _gradient(layer: nn.Module, _: torch.Generator) -> Tensor:
    """|dL/dw| of this step's batch, dense (RigL, Evci et al. 2020)."""
    return layer.weight.grad.abs()


def _momentum(layer: nn.Module, _: torch.Generator) -> Tensor:
    """|momentum| of the dense gradient (sparse momentum, Dettmers & Zettlemoyer 2019)."""
    return layer.weight_momentum.abs()


# --growth: (layer, generator) -> score like the weight; the highest outside the mask come.
GROWTH: dict[str, Callable[[nn.Module, torch.Generator], Tensor]] = {
    "random": _random,
    "gradient": _gradient,
    "momentum": _momentum,
}


def prune_globally(model: nn.Module, density: float, score: str) -> None:
    """Shrink the masks to the highest scores of the whole network, round(density N) of N weights.

    Where a random mask has fewer from the start, nothing is pruned.
    """
    left = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    values = {name: PRUNE[score](weight) for name, weight, _ in masked_weights(model)}
    scores.keep_top(model, values, min(left, weights_left(model, density)))


def prune_uniformly(model: nn.Module, density: float, score: str) -> None:
    """The same, but every layer is pruned to the same density.

    A layer that is sparser already keeps what it has, and the others have more.
    """
    entries = list(masked_weights(model))
    left = [int(mask.sum()) for _, _, mask in entries]
    total = min(sum(left), weights_left(model, density))
    counts = layer_counts("uniform", [mask.shape for _, _, mask in entries], left, total)
    for (name, weight, mask), count in zip(entries, counts):
        scores.shrink({name: mask}, {name: PRUNE[score](weight)}, int(count))


def drop_and_grow(
    mask: Tensor, importance: Tensor, growth: Tensor, fraction: float, allowed: Tensor | None = None
) -> None:
    """Drop the lowest ceil(fraction n) of a layer's n weights, then grow as many, in place.

    What was dropped may be grown again: it was never away, and keeps its value. Of equal scores,
    those of earlier positions stay, and come. The number of weights is conserved exactly.

    Args:
        mask: bool, like the weight.
        importance: of each weight; the lowest are dropped.
        growth: like ``mask``; the highest outside what is left are grown.
        fraction: in [0, 1].
        allowed: bool, where weights may grow besides where they were (default: anywhere).

    Raises:
        ValueError: a score is NaN.
    """
    before = mask.clone()
    count = int(before.sum())
    # A hair less: 0.15 * 20 in floating point is above 3, and its ceiling would be 4.
    dropped = math.ceil(fraction * count * (1 - 1e-12))
    scores.shrink({"importance": mask}, {"importance": importance}, count - dropped)
    candidates = ~mask if allowed is None else (allowed | before) & ~mask
    scores.shrink({"growth": candidates}, {"growth": growth}, dropped)
    mask |= candidates


class Method(NamedTuple):
    """What a method does in an update: prune (or not), then drop and grow (or not)."""

    prune: Callable[[nn.Module, float, str], None] | None
    grow: bool


METHODS: dict[str, Method] = {
    "GraNet": Method(prune_globally, grow=True),  # Liu et al. 2021
    "GraNet_uniform": Method(prune_uniformly, grow=True),
    "DST": Method(None, grow=True),  # SET, RigL: constant density
    "GMP": Method(prune_globally, grow=False),  # Zhu & Gupta 2017
    "GMP_uniform": Method(prune_uniformly, grow=False),
}


class Schedule(NamedTuple):
    """When masks move. Steps are counted from 0; an update comes before the step of the weights.

    Attributes:
        steps: of the whole training.
        every: steps between updates.
        start, end: of the pruning; at ``end`` the final density is reached.
        stop: the first step that drops and grows no more.
        initial, final: densities.
        fraction: of weights that is dropped and grown at the start.
        prunes: whether the density falls.
    """

    steps: int
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
        if step >= self.end:  # where a very short window also starts
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


def remember(model: nn.Module, momentum: bool) -> None:
    """Put beside each mask what an update needs to know of the past, in the state_dict as well.

    ``initial_mask`` and ``ever_active`` are bool; with ``momentum``, ``weight_momentum`` sums up
    the dense gradients.
    """
    for name, weight, mask in list(masked_weights(model)):
        layer = model.get_submodule(name)
        layer.register_buffer("initial_mask", mask.clone())
        layer.register_buffer("ever_active", mask.clone())
        if momentum:
            layer.register_buffer("weight_momentum", torch.zeros_like(weight))


@torch.no_grad()
def add_to_momentum(model: nn.Module, factor: float) -> None:
    """weight_momentum <- factor weight_momentum + gradient, in every masked layer."""
    layers = [model.get_submodule(name) for name, _, _ in masked_weights(model)]
    sums = [layer.weight_momentum for layer in layers]
    torch._foreach_mul_(sums, factor)
    torch._foreach_add_(sums, [layer.weight.grad for layer in layers])


@torch.no_grad()
def update(
    model: nn.Module,
    method: str,
    *,
    density: float,
    fraction: float,
    prune: str,
    growth: str,
    within_initial: bool,
    seed: int,
    step: int,
) -> None:
    """One update of all masks: prune to ``density``, then drop and grow ``fraction``.

    Weights and optimizer state outside the new masks are the caller's to zero
    (`masks.keep_inside`); what is new is zero because it was outside before.
    """
    chosen = METHODS[method]
    if chosen.prune:
        chosen.prune(model, density, prune)
    if chosen.grow and fraction > 0:
        layers = sparse_layers(model)
        for name, weight, mask in masked_weights(model):
            layer = layers[name]
            growing = GROWTH[growth](layer, generator(seed, f"grow/{name}", 0, step))
            allowed = layer.initial_mask if within_initial else None
            try:
                drop_and_grow(mask, PRUNE[prune](weight), growing, fraction, allowed)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
