"""Iterative pruning: from one density to the next, with training in between."""

import logging
from functools import partial

from torch import nn

from startsparse.masks import density_table, keep_inside, kept, masked_weights, sparse_layers
from startsparse.scores import keep_top, magnitude
from startsparse.trainer import Phase
from STR.options import STROptions

log = logging.getLogger("startsparse")


def phases(model: nn.Module, options: STROptions) -> list[Phase]:
    """Warm-up, one phase before each pruning, and the final training."""
    warm_up = Phase("warm-up", options.warmup_epochs, "constant")
    levels = [
        Phase(
            f"level {number}",
            options.final_prune_epoch,
            options.prune_scheduler,
            options.lr_min,
            then=partial(prune_to, model, density),
        )
        for number, density in enumerate(options.threshold_list, 1)
    ]
    final = Phase("final", options.epochs, options.lr_policy, options.lr_min)
    return [warm_up, *levels, final] if options.warmup_epochs else [*levels, final]


def prune_to(model: nn.Module, density: float) -> None:
    """Keep the largest weights, so that round(density N) of all N weights of the network are left.

    Layers without a mask are dense and count as kept.
    """
    masked = {name for name, _, _ in masked_weights(model)}
    layers = sparse_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    dense = sum(kept(layer).numel() for name, layer in layers.items() if name not in masked)
    keep_top(model, magnitude(model), max(0, round(density * total) - dense))
    keep_inside(model)
    realised = density_table(model).iloc[-1]
    log.info("pruned to density %.6f, %d weights", realised["density"], realised["kept"])
