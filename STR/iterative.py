"""Iterative pruning: from one density to the next, with training in between."""

import logging
from functools import partial

from torch import nn

from startsparse.errors import OptionError
from startsparse.masks import density_table, keep_inside, masked_weights, sparse_layers
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


def weights_left(model: nn.Module, density: float) -> int:
    """How many masked weights stay at ``density``, so that round(density N) of all N are left.

    Layers without a mask are dense and count as kept.
    """
    masked = {name for name, _, _ in masked_weights(model)}
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    dense = sum(size for name, size in sizes.items() if name not in masked)
    return round(density * sum(sizes.values())) - dense


def check_levels(model: nn.Module, options: STROptions) -> None:
    """Raise `OptionError` where a level asks for weights that the random mask does not have."""
    drawn = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    for density in options.threshold_list:
        count = weights_left(model, density)
        if count > drawn:
            raise OptionError(
                f"--threshold-list: {density:g} asks for {count} weights, the random mask has "
                f"{drawn}; ask for less, or add --er-sampling exact"
            )
        if count < 0:
            raise OptionError(
                f"--threshold-list: {density:g} is below the share of the layers kept dense"
            )


def prune_to(model: nn.Module, density: float) -> None:
    """Keep the largest masked weights, as many as `weights_left` says."""
    keep_top(model, magnitude(model), weights_left(model, density))
    keep_inside(model)
    realised = density_table(model).iloc[-1]
    log.info("pruned to density %.6f, %d weights", realised["density"], realised["kept"])
