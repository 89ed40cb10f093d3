"""Warnings before training: options that ask for what cannot be, or that change nothing."""

import logging

from torch import nn

from ER_DST.options import DSTOptions
from ER_DST.topology import METHODS, Schedule, prune_uniformly
from startsparse import er, flow
from startsparse.masks import SparseLayer, density_table, masked_weights, nnz, sparse_layers
from startsparse.pruning import layer_counts, weights_left

log = logging.getLogger("startsparse")


def check_flow(model: nn.Module, requested: dict[str, float], options: DSTOptions) -> None:
    """Warn where flow preservation needs more weights than requested.

    Scores decide what global pruning leaves in a layer. So for GraNet and GMP the check at the
    final density covers the total only, and only if each update ends with a repair.

    Args:
        requested: each layer's requested density at the start; {}: not known yet.
    """
    if not requested or options.flow_preservation == "False":
        return
    layers, dense = sparse_layers(model), er.dense_layers(model, options)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    # A layer without a mask keeps all its weights.
    needs = {n: sizes[n] if n in dense else flow.needed(layers[n].weight.shape) for n in layers}
    start = {name: density * sizes[name] for name, density in requested.items()}
    _warn_thin("start", start, needs)
    if options.prunes and options.flow_preservation != "always":
        return  # what the repair adds at the start, pruning takes away
    final = options.requested * sum(sizes.values())
    if options.prunes and METHODS[options.method].prune is prune_uniformly:
        masked = {name: layer for name, layer in layers.items() if name not in dense}
        total = round(final) - sum(sizes[name] for name in dense)
        _warn_thin("end", _uniform_counts(masked, start, total), needs)
    _warn_total(final, sum(needs.values()), options.requested)


def _uniform_counts(
    layers: dict[str, SparseLayer], start: dict[str, float], total: int
) -> dict[str, float]:
    """Weights that uniform pruning to ``total`` leaves of the ``start`` weights of each layer."""
    shapes = [layer.weight.shape for layer in layers.values()]
    counts = layer_counts("uniform", shapes, [start[name] for name in layers], total)
    return dict(zip(layers, counts))


def _warn_total(final: float, needed: int, density: float) -> None:
    if final < needed:
        log.warning(
            "warning: --flow-preservation: it needs %d weights, density %g has %.0f: it will not "
            "be reached",
            needed,
            density,
            final,
        )


def warn_of_thin_start(model: nn.Module, options: DSTOptions) -> None:
    """Warn if the initial mask has fewer weights than --final-density asks for."""
    if not options.prunes:
        return
    counts = nnz(model)
    kept = sum(counts[name] for name, _, _ in masked_weights(model))
    if weights_left(model, options.final_density) > kept:
        log.warning(
            "warning: --final-density: %g is above the %.6f that the mask has; nothing is pruned",
            options.final_density,
            density_table(model).iloc[-1]["density"],
        )


def warn_of_rare_updates(plan: Schedule, options: DSTOptions) -> None:
    """Warn if masks hardly move, or never grow."""
    first = min(plan.every, plan.end) if plan.prunes else plan.every
    if plan.every >= plan.steps:
        log.warning(
            "warning: --update-frequency: %d steps, but the whole training has %d; the mask moves "
            "%s",
            plan.every,
            plan.steps,
            "once" if plan.prunes else "never",
        )
    elif options.grows and plan.stop <= first:
        log.warning(
            "warning: --stop-updates: drop and grow ends after %d steps, before the first update, "
            "after %d: nothing is grown",
            plan.stop,
            first,
        )


def _warn_thin(when: str, weights: dict[str, float], needs: dict[str, int]) -> None:
    short = [f"{n} {w:.0f} of {needs[n]}" for n, w in weights.items() if w < needs[n]]
    if short:
        log.warning(
            "warning: --flow-preservation: layers with fewer weights than units at the %s, which "
            "get more: %s",
            when,
            ", ".join(short),
        )
