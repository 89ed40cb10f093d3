"""The training of ER_DST as one phase, whose updates move the masks and are written down."""

import logging
from functools import partial

import torch
from torch import nn

from ER_DST.options import DSTOptions
from ER_DST.topology import METHODS, Schedule, add_to_momentum, prune_uniformly, update
from startsparse import er, flops, flow
from startsparse.errors import UserError
from startsparse.masks import (
    density_table,
    keep_inside,
    mask_gradients,
    masked_weights,
    sparse_layers,
)
from startsparse.pruning import layer_counts, weights_left
from startsparse.trainer import Phase, Trainer

log = logging.getLogger("startsparse")


def schedule(options: DSTOptions, steps_per_epoch: int) -> Schedule:
    """When the masks move, in steps."""
    steps = options.epochs * steps_per_epoch
    return Schedule(
        steps=steps,
        every=options.update_frequency,
        start=options.init_prune_epoch * steps_per_epoch,
        # Pruning at the very end comes before the last step.
        end=min(round(options.prune_end * steps_per_epoch), steps - 1),
        stop=round(options.stop_updates * steps),
        initial=options.er_sparse_init,
        final=options.final_density,
        fraction=options.prune_rate,
        prunes=options.prunes,
    )


def phase(options: DSTOptions, steps_per_epoch: int) -> Phase:
    """The whole training; epochs before the final density are no candidates for the best."""
    if not options.moves:
        return Phase("train", options.epochs, options.lr_policy, options.lr_min)
    plan = schedule(options, steps_per_epoch)
    _warn_rare(plan, options)
    return Phase(
        "train",
        options.epochs,
        options.lr_policy,
        options.lr_min,
        each_step=partial(step_masks, plan=plan),
        select_from=plan.end // steps_per_epoch if options.prunes else 0,
        dense_until=plan.stop if options.grows and options.growth == "momentum" else 0,
        moves=plan.due,
    )


def _warn_rare(plan: Schedule, options: DSTOptions) -> None:
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


def step_masks(trainer: Trainer, step: int, *, plan: Schedule) -> None:
    """Between the backward pass and the weights' step: an update, where one is due.

    The gradient that chose a weight does not move it as well: in this step only weights that were
    in the mask before have one. What is new starts at 0, without momentum or moments, and the next
    step's gradient is the first to move it (RigL, Evci et al. 2020, algorithm 1, takes no step of
    the weights at an update; GraNet, Liu et al. 2021, takes it before the masks move).
    """
    options, model = trainer.options, trainer.model
    if options.grows and options.growth == "momentum" and step < plan.stop:
        add_to_momentum(model, options.momentum)
    if not plan.due(step):
        return
    steps = len(trainer.data.train)
    trainer.count_flops(step % steps)
    fraction = plan.drop_fraction(step) if options.grows else 0.0
    if fraction > 0 and options.growth == "gradient":
        density = flops.densities(model)
        trainer.flops["training"] += flops.dense_gradients(trainer.forward_flops, density)
    before = {name: mask.clone() for name, _, mask in masked_weights(model)}
    try:
        update(
            model,
            options.method,
            density=plan.density(step),
            fraction=fraction,
            prune=options.prune,
            growth=options.growth,
            within_initial=options.grow_within_init,
            seed=options.seed,
            step=step,
        )
    except ValueError as error:  # a score that is not a number
        raise UserError(f"--growth: at step {step + 1}: {error}") from None
    if options.flow_preservation == "always":
        preserve_flow(model, options.seed, step)
    for name, _, mask in masked_weights(model):
        model.get_submodule(name).ever_active |= mask
    keep_inside(model, trainer.optimizer)
    mask_gradients([w.grad for _, w, _ in masked_weights(model)], list(before.values()))
    row = {"step": step, "epoch": step // steps + 1}
    row |= {"drop_fraction": fraction} | describe(model, before)
    trainer.tables.setdefault("topology", []).append(row)
    trainer.run.show("topology", row, step)


def preserve_flow(model: nn.Module, seed: int, step: int) -> None:
    """`flow.repair`, which removes random edges, and a line on what it could not do.

    The smallest weights would be those that the same update has just grown, which are 0.
    """
    more = flow.repair(model, seed, step, by_magnitude=False)
    if more:
        where = ", ".join(f"{name} {count}" for name, count in more.items())
        log.warning("warning: --flow-preservation: weights more than asked for: %s", where)


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
    kept = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    if weights_left(model, options.final_density) > kept:
        log.warning(
            "warning: --final-density: %g is above the %.6f that the mask has; nothing is pruned",
            options.final_density,
            density_table(model).iloc[-1]["density"],
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


def describe(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """What an update did, and where the masks stand: a row of topology.csv.

    density: of all weights; dropped, grown: weights, in all and per layer; ever_active: share of
    all weights that were in the mask at some time (in-time over-parametrization, Liu et al. 2021);
    inside_initial: share of the mask that lies in the initial one; dead_units: without an incoming
    or an outgoing edge.
    """
    layers, counts = sparse_layers(model), []
    for name, _, mask in masked_weights(model):
        old, layer = before[name], layers[name]
        sets = (old & ~mask, mask & ~old, mask, mask & layer.initial_mask, layer.ever_active)
        counts.append(torch.stack([torch.count_nonzero(s) for s in sets]))
    counts = torch.stack(counts).tolist()  # one wait for the device
    dropped, grown, kept, inside, active = (sum(column) for column in zip(*counts))
    total = density_table(model).iloc[-1]
    dense = int(total["kept"]) - kept  # layers without a mask
    row = {
        "density": float(total["density"]),
        "dropped": dropped,
        "grown": grown,
        "ever_active": (active + dense) / int(total["weights"]),
        "inside_initial": inside / max(kept, 1),
        "dead_units": int(total["dead_outputs"] + total["dead_inputs"]),
    }
    for (name, _, _), (gone, new, *_) in zip(masked_weights(model), counts):
        row |= {f"dropped/{name}": gone, f"grown/{name}": new}
    return row
