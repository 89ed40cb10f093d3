"""Dynamic sparse training: a step that may move the masks, and the record of each update."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import nn

from ER_DST import at_once
from ER_DST.checks import warn_of_rare_updates
from ER_DST.options import DSTOptions
from ER_DST.record import describe
from ER_DST.topology import GROWTH, METHODS, PRUNE, Change, Growth, Schedule, drop_and_grow
from startsparse import flow
from startsparse.errors import UserError
from startsparse.masks import (
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
        change = Change(
            method=options.method,
            density=self.plan.density(step),
            fraction=fraction,
            prune=options.prune,
            growth=options.growth,
            within_initial=options.grow_within_init,
            preserve_flow=options.flow_preservation == "always",
            seed=options.seed,
            step=step,
        )
        try:
            done = move(model, optimizer, change)
        except ValueError as error:  # a score that is not a number
            raise UserError(f"--growth: at step {step + 1}: {error}") from None
        row = {"step": step, "epoch": step // self.plan.per_epoch + 1, "drop_fraction": fraction}
        self.report(row | done, step)


@torch.no_grad()
def move(model: nn.Module, optimizer: torch.optim.Optimizer, change: Change) -> dict[str, float]:
    """One update of all masks, of the weights, gradients and optimizer state under them.

    Needs the buffers of `remember` and dense gradients. Afterwards only weights of the old masks
    have gradients.

    Returns:
        A row of topology.csv; see `record.row`.

    Raises:
        ValueError: a score is NaN; names the layer.
    """
    if at_once.possible(model, change.method):
        row, more = at_once.move(model, optimizer, change)
        _warn_of_more(more)
        return row
    before = {name: mask.clone() for name, _, mask in masked_weights(model)}
    update(model, change)
    if change.preserve_flow:
        preserve_flow(model, change.seed, change.step)
    for name, _, mask in masked_weights(model):
        model.get_submodule(name).get_buffer("ever_active").logical_or_(mask)
    keep_inside(model, optimizer)
    mask_gradients([gradient(w) for _, w, _ in masked_weights(model)], list(before.values()))
    return describe(model, before)


@torch.no_grad()
def update(model: nn.Module, change: Change) -> None:
    """The masks of an update, layer by layer, without flow preservation.

    The caller zeroes weights and optimizer state outside the new masks (`masks.keep_inside`). New
    weights are zero, because they were outside before.
    """
    parts = METHODS[change.method]
    if parts.prune:
        parts.prune(model, change.density, change.prune)
    if not parts.grow or change.fraction == 0:
        return
    layers = sparse_layers(model)
    for name, weight, mask in masked_weights(model):
        layer = layers[name]
        draw = functools.partial(
            _draw, weight, generator(change.seed, f"grow/{name}", 0, change.step)
        )
        (score,) = GROWTH[change.growth].score([layer], draw)
        (importance,) = PRUNE[change.prune]([weight])
        allowed = layer.get_buffer("initial_mask") if change.within_initial else None
        try:
            drop_and_grow(mask, importance, score, change.fraction, allowed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _draw(weight: torch.Tensor, source: torch.Generator) -> list[torch.Tensor]:
    return [torch.rand(weight.shape, generator=source).to(weight.device)]


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
    _warn_of_more(flow.repair(model, seed, step, by_magnitude=False))


def _warn_of_more(more: dict[str, int]) -> None:
    if more:
        where = ", ".join(f"{name} {count}" for name, count in more.items())
        log.warning("warning: --flow-preservation: weights more than asked for: %s", where)
