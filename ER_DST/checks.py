"""What a run says before training where its options ask for what cannot be, or change nothing."""

import logging

from torch import nn

from ER_DST.options import DSTOptions
from ER_DST.topology import METHODS, Schedule, prune_uniformly
from startsparse import er, flow
from startsparse.masks import density_table, masked_weights, sparse_layers
from startsparse.pruning import layer_counts, weights_left

log = logging.getLogger("startsparse")


def check_flow(model: nn.Module, requested: dict[str, float], options: DSTOptions) -> None:
    """Say, before training, where flow preservation needs more weights than are asked for.

    What global pruning leaves in a layer is for its scores to say: of GraNet's and GMP's final
    density only the total is checked, and only where updates are followed by a repair.

    Args:
        requested: the density asked of each layer at the start; {}: not known yet.
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
        masked = [name for name in layers if name not in dense]
        shapes, left = [layers[n].weight.shape for n in masked], [start[n] for n in masked]
        counts = layer_counts("uniform", shapes, left, round(final) - sum(sizes[n] for n in dense))
        _warn_thin("end", dict(zip(masked, counts)), needs)
    if final < sum(needs.values()):
        log.warning(
            "warning: --flow-preservation: it needs %d weights, density %g has %.0f: it will not "
            "be reached",
            sum(needs.values()),
            options.requested,
            final,
        )


def warn_of_thin_start(model: nn.Module, options: DSTOptions) -> None:
    """Say where the mask has fewer weights from the start than --final-density asks for."""
    if not options.prunes:
        return
    nnz = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    if weights_left(model, options.final_density) > nnz:
        log.warning(
            "warning: --final-density: %g is above the %.6f that the mask has; nothing is pruned",
            options.final_density,
            density_table(model).iloc[-1]["density"],
        )


def warn_of_rare_updates(plan: Schedule, options: DSTOptions) -> None:
    """Say where masks hardly move, or never grow."""
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
