"""Initial masks and layer-wise ratios that a pruner finds in the dense network."""

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from startsparse import er, flops, parallel, training
from startsparse.data import Data, first_batch
from startsparse.masks import attach_masks, masked_weights, sparse_layers
from startsparse.pruning import prune, weights_left
from startsparse.schedules import geometric

if TYPE_CHECKING:
    from ER_DST.options import DSTOptions

log = logging.getLogger("startsparse")

KEEP = 0.8  # share of the weights that a pruning of ER_imp keeps; the last goes to the target


def find_snip(model: nn.Module, options: "DSTOptions", data: Data) -> float:
    """Attach the mask of --init-density that SNIP finds; weights outside it become zero.

    Returns:
        The FLOPs of its forward and backward passes, as `flops.training` counts them.
    """
    full_masks(model, options)
    return _prune(model, "snip", options, data)


def pruner_ratio(
    model: nn.Module, options: "DSTOptions", data: Data
) -> tuple[dict[str, float], float]:
    """Layer -> density in the mask of --init-density that the pruner of --sparse-init finds.

    The pruner works on a dense copy of ``model``, on the device of ``data``.

    Returns:
        The densities, and the FLOPs of the search, counted as in `find_snip`.
    """
    network = copy.deepcopy(model)
    full_masks(network, options)
    spent = PRUNER_RATIOS[options.er_sparse_method](network, options, data)
    return flops.densities(network), spent


def full_masks(model: nn.Module, options: "DSTOptions") -> None:
    """Attach masks of ones to all layers that are not kept dense."""
    dense = er.dense_layers(model, options)
    ones = {
        name: torch.ones_like(layer.weight, dtype=torch.bool)
        for name, layer in sparse_layers(model).items()
        if name not in dense
    }
    attach_masks(model, ones)


def _prune(model: nn.Module, pruner: str, options: "DSTOptions", data: Data) -> float:
    forward, spent = _forward_flops(model, data), 0.0

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal spent  # each forward pass has its backward pass
        examples = 1 if data.shape.nodes else len(inputs[0])
        spent += examples * flops.training(forward, flops.densities(model))

    hook = model.register_forward_pre_hook(count)
    try:
        prune(
            model,
            pruner,
            weights_left(model, options.er_sparse_init),
            seed=options.seed,
            level=0,
            batch=lambda: first_batch(data.train, 0),
            shape=data.shape.input,
        )
    finally:
        hook.remove()
    return spent


def _forward_flops(model: nn.Module, data: Data) -> dict[str, float]:
    device = next(model.parameters()).device
    return flops.forward_flops(model, torch.zeros(data.shape.input, device=device))


def _snip(model: nn.Module, options: "DSTOptions", data: Data) -> float:
    return _prune(model, "snip", options, data)


def _synflow(model: nn.Module, options: "DSTOptions", data: Data) -> float:
    return _prune(model, "synflow", options, data)


def _imp(model: nn.Module, options: "DSTOptions", data: Data) -> float:
    """Train for --imp-epochs at --lr, prune by a fifth, rewind to the start, and repeat."""
    device = next(model.parameters()).device
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    densities = geometric(1.0, KEEP, options.er_sparse_init)
    forward, spent = _forward_flops(model, data), 0.0
    examples = options.imp_epochs * (len(data.train) if data.shape.nodes else data.train.examples)
    for level, density in enumerate(densities):
        learner = training.Learner(
            model,
            options.make_optimizer(model),
            autocast=parallel.autocast(device, options.amp),
            label_smoothing=options.label_smoothing,
            clip_norm=options.clip_norm,
        )
        for epoch in range(level * options.imp_epochs, (level + 1) * options.imp_epochs):
            sums = training.new_sums(device)
            training.train_epoch(
                learner,
                data.train,
                lambda _: options.lr,
                sums,
                epoch=epoch,
                title=f"ER_imp {level + 1}/{len(densities)}",
            )
        spent += examples * flops.training(forward, flops.densities(model))
        accuracy = 100 * training.means(sums)["accuracy"]
        log.info("ER_imp: train %.2f %%, pruning to density %.4f", accuracy, density)
        prune(model, "mag", weights_left(model, density), seed=options.seed, level=level)
        masks = {name: mask.clone() for name, _, mask in masked_weights(model)}
        model.load_state_dict(first)
        attach_masks(model, masks)
    return spent


PRUNER_RATIOS: dict[str, Callable[[nn.Module, "DSTOptions", Data], float]] = {
    "ER_imp": _imp,
    "ER_synflow": _synflow,
    "ER_snip": _snip,
}
