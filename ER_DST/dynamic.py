"""Dynamic sparse training: a step that may move the masks, and the record of each update."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from ER_DST.checks import warn_of_rare_updates
from ER_DST.options import DSTOptions
from ER_DST.topology import GROWTH, METHODS, PRUNE, Growth, Schedule, drop_and_grow
from startsparse import flow
from startsparse.errors import UserError
from startsparse.masks import (
    density_table,
    gradient,
    keep_inside,
    mask_gradients,
    masked_weights,
    sparse_layers,
)
from startsparse.method import Method
from startsparse.phases import Phase
from startsparse.seeding import generator

log = logging.getLogger("startsparse")

Report = Callable[[dict, int], None]
"""Called after each update with its row of topology.csv and its step."""


def _no_report(_row: dict, _step: int) -> None:
    pass


def schedule(options: DSTOptions, steps_per_epoch: int) -> Schedule:
    """When the masks move, in steps."""
    steps = options.epochs * steps_per_epoch
    return Schedule(
        steps=steps,
        per_epoch=steps_per_epoch,
        every=options.update_frequency,
        start=options.init_prune_epoch * steps_per_epoch,
        # Pruning ends in the last step, at the latest.
        end=min(round(options.prune_end * steps_per_epoch), steps - 1),
        stop=round(options.stop_updates * steps),
        initial=options.er_sparse_init,
        final=options.final_density,
        fraction=options.prune_rate,
        prunes=options.prunes,
    )


def phase(options: DSTOptions, steps_per_epoch: int, report: Report = _no_report) -> Phase:
    """The whole training; the best epoch is selected among those at the final density."""
    if not options.moves:
        return Phase("train", options.epochs, options.lr_policy, options.lr_min)
    plan = schedule(options, steps_per_epoch)
    warn_of_rare_updates(plan, options)
    return Phase(
        "train",
        options.epochs,
        options.lr_policy,
        options.lr_min,
        method=DynamicSparse(options, plan, report),
        select_from=plan.end // steps_per_epoch if options.prunes else 0,
    )


class DynamicSparse(Method):
    """GraNet, DST (SET, RigL) and GMP: masks move between the backward pass and the weights' step.

    The gradient that grows a weight does not also move it: in an update only weights of the old
    mask have gradients. New weights start at 0, without momentum or moments, and the next step's
    gradient is the first to move them. (RigL, Evci et al. 2020, algorithm 1, takes no step of the
    weights in an update; GraNet, Liu et al. 2021, takes it before the masks move.)
    """

    def __init__(self, options: DSTOptions, plan: Schedule, report: Report = _no_report):
        self.options, self.plan, self.report = options, plan, report
        self.growth = options.growth_rule
        if self.growth:
            self.dense_gradients = self.growth.dense_gradients

    def moves_masks(self, step: int) -> bool:
        """Whether the schedule has an update in ``step``."""
        return self.plan.due(step)

    def needs_dense_gradients(self, step: int) -> bool:
        """Whether the growth rule needs them, as long as weights are grown."""
        return self.drop_fraction(step) > 0 and super().needs_dense_gradients(step)

    def drop_fraction(self, step: int) -> float:
        """Share of the weights that an update drops and grows."""
        return self.plan.drop_fraction(step) if self.growth else 0.0

    def after_backward(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Update the masks if an update is due."""
        options, fraction = self.options, self.drop_fraction(step)
        if fraction > 0 and self.growth and self.growth.accumulate:
            self.growth.accumulate(model, options.momentum)
        if not self.moves_masks(step):
            return
        before = {name: mask.clone() for name, _, mask in masked_weights(model)}
        try:
            update(
                model,
                options.method,
                density=self.plan.density(step),
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
            model.get_submodule(name).get_buffer("ever_active").logical_or_(mask)
        keep_inside(model, optimizer)
        mask_gradients([gradient(w) for _, w, _ in masked_weights(model)], list(before.values()))
        row = {"step": step, "epoch": step // self.plan.per_epoch + 1, "drop_fraction": fraction}
        self.report(row | describe(model, before), step)


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

    The caller zeroes weights and optimizer state outside the new masks (`masks.keep_inside`). New
    weights are zero, because they were outside before.
    """
    parts = METHODS[method]
    if parts.prune:
        parts.prune(model, density, prune)
    if parts.grow and fraction > 0:
        layers = sparse_layers(model)
        for name, weight, mask in masked_weights(model):
            layer = layers[name]
            score = GROWTH[growth].score(layer, generator(seed, f"grow/{name}", 0, step))
            allowed = layer.get_buffer("initial_mask") if within_initial else None
            try:
                drop_and_grow(mask, PRUNE[prune](weight), score, fraction, allowed)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def remember(model: nn.Module, growth: Growth | None) -> None:
    """Add buffers beside each mask for what updates need to know of the past.

    ``initial_mask`` and ``ever_active`` are bool. If ``growth`` accumulates, ``growth_state`` is
    where; it starts as zeros like the weight.
    """
    for name, weight, mask in list(masked_weights(model)):
        layer = model.get_submodule(name)
        layer.register_buffer("initial_mask", mask.clone())
        layer.register_buffer("ever_active", mask.clone())
        if growth and growth.accumulate:
            layer.register_buffer("growth_state", torch.zeros_like(weight))


def preserve_flow(model: nn.Module, seed: int, step: int) -> None:
    """Run `flow.repair`, which removes random edges, and warn of weights that it had to add.

    Removal by magnitude would take the weights that the same update has just grown: they are 0.
    """
    more = flow.repair(model, seed, step, by_magnitude=False)
    if more:
        where = ", ".join(f"{name} {count}" for name, count in more.items())
        log.warning("warning: --flow-preservation: weights more than asked for: %s", where)


def describe(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """What an update did, and the state of the masks after it: a row of topology.csv.

    density: of all weights; dropped, grown: weights, in total and per layer; ever_active: share of
    all weights that were in the mask at some time (in-time over-parametrization, Liu et al. 2021);
    inside_initial: share of the mask that lies in the initial one; dead_units: without an incoming
    or an outgoing edge.
    """
    sizes = []
    for name, _, mask in masked_weights(model):
        old, layer = before[name], model.get_submodule(name)
        first, ever = layer.get_buffer("initial_mask"), layer.get_buffer("ever_active")
        sets = (old & ~mask, mask & ~old, mask, mask & first, ever)
        sizes.append(torch.stack([torch.count_nonzero(s) for s in sets]))
    counts = torch.stack(sizes).tolist()  # one wait for the device
    dropped, grown, nnz, inside, active = (sum(column) for column in zip(*counts))
    total = density_table(model).iloc[-1]
    dense = int(total["kept"]) - nnz  # layers without a mask
    row = {
        "density": float(total["density"]),
        "dropped": dropped,
        "grown": grown,
        "ever_active": (active + dense) / int(total["weights"]),
        "inside_initial": inside / max(nnz, 1),
        "dead_units": int(total["dead_outputs"] + total["dead_inputs"]),
    }
    for (name, _, _), (gone, new, *_) in zip(masked_weights(model), counts):
        row |= {f"dropped/{name}": gone, f"grown/{name}": new}
    return row
