"""Iterative pruning: train at one density, prune to the next, rewind, train on."""

import logging
from functools import partial
from pathlib import Path

from torch import nn

from startsparse import checkpoint, finding, processes, runs
from startsparse.data import first_batch
from startsparse.errors import OptionError, UserError
from startsparse.flops import densities
from startsparse.masks import density_table, keep_inside, masked_weights
from startsparse.phases import Phase
from startsparse.pruning import prune, weights_left
from startsparse.trainer import Trainer
from STR.options import STROptions
from STR.rewinds import REWINDS, State, flipped

log = logging.getLogger("startsparse")


def phases(options: STROptions) -> list[Phase]:
    """Warm-up, one phase before each pruning, and the final training.

    Learning-rate rewinding (--rewind none; Renda et al. 2020) restarts the schedule only, so
    momentum buffers stay. Any other rewind changes the weights, so their buffers restart too.
    """
    keeps_momentum = options.rewind == "none"
    rise = options.warmup_epochs
    warm_up = Phase(
        "warm-up", rise, "constant", warmup=rise, drifts=options.effective, then=save_rewind_point
    )
    levels = [
        Phase(
            f"level {level}",
            options.final_prune_epoch,
            options.prune_scheduler,
            options.lr_min,
            keeps_momentum=keeps_momentum,
            then=partial(next_level, level=level, density=density),
        )
        for level, density in enumerate(options.threshold_list)
    ]
    final = Phase(
        "final",
        options.epochs,
        options.lr_policy,
        options.lr_min,
        drifts=options.effective,
        keeps_momentum=keeps_momentum,
    )
    return [warm_up, *levels, final] if rise else [*levels, final]


def begin(trainer: Trainer[STROptions]) -> None:
    """Save the state in which a run with levels begins: initial.pt, and rewind.pt for now.

    With --start-from, initial.pt is that run's if it has one: flips count from initialisation.
    """
    if trainer.options.threshold_list and not trainer.history and not trainer.position.step:
        state = {"model": trainer.model.state_dict()}
        earlier = trainer.run.source("start_from") / "initial.pt"
        if trainer.options.start_from and processes.all_from_rank_0(earlier.exists):
            state = checkpoint.load_by_rank_0(earlier)
        checkpoint.save_by_rank_0(trainer.run.folder / "initial.pt", state)
        save_rewind_point(trainer)


def save_rewind_point(trainer: Trainer[STROptions]) -> None:
    """Save the state that --rewind goes back to: rewind.pt."""
    checkpoint.save_by_rank_0(
        trainer.run.folder / "rewind.pt", {"model": trainer.model.state_dict()}
    )


def check_levels(model: nn.Module, options: STROptions) -> None:
    """Raise `OptionError` where a level asks for more weights than the first mask has.

    With --er-budget clip, such a level keeps all weights of the mask instead.
    """
    drawn = mask_size(model)
    for level, density in enumerate(options.threshold_list, 1):
        count = weights_left(model, density)
        if options.er_budget == "clip":
            count = min(count, drawn)
        if count > drawn:
            # No level is above the requested density, and exact sampling meets that density.
            bad_luck = options.er_sampling == "bernoulli" and not options.start_from
            remedy = ", or add --er-sampling exact" if bad_luck else ""
            raise OptionError(
                f"--threshold-list: {density:g} asks for {count} weights, the first mask has "
                f"{drawn}; ask for less{remedy}"
            )
        if count < 0:
            raise OptionError(
                f"--threshold-list: {density:g} is below the share of the layers kept dense"
            )
        if options.pruner == "mask-ref":
            check_reference(model, options, level, count)


def mask_size(model: nn.Module) -> int:
    """How many weights are inside the masks."""
    return sum(int(mask.sum()) for _, _, mask in masked_weights(model))


def check_reference(model: nn.Module, options: STROptions, level: int, count: int) -> None:
    """Raise `OptionError` where the masks of --target-expt-name do not fit this run."""
    source = finding.source(options, "target_expt_name")
    masks, entries = reference_masks(source, level), list(masked_weights(model))
    for name, _, mask in entries:
        other = masks.get(f"{name}.weight_mask")
        if (
            other is None
            or (other.dtype, other.shape) != (mask.dtype, mask.shape)
            or bool((other & ~mask.cpu()).any())
        ):
            raise OptionError(
                f"--target-expt-name: the mask of '{name}' in {options.target_expt_name} does not "
                "lie inside this run's; both need the same network, --seed and --er-sparse-*"
            )
    nnz = sum(int(masks[f"{name}.weight_mask"].sum()) for name, _, _ in entries)
    if nnz != count:
        raise OptionError(
            f"--target-expt-name: level {level} of {options.target_expt_name} keeps {nnz} "
            f"weights, --threshold-list asks for {count}"
        )


def reference_masks(source: Path, level: int) -> State:
    """The masks of the run --target-expt-name after its pruning number ``level``.

    Args:
        source: its folder, or this run's copy of it.
    """
    try:
        return checkpoint.load_by_rank_0(source / f"levels/level-{level}.pt")["model"]
    except UserError as error:
        raise OptionError(f"--target-expt-name: {error}") from None


def start_from(model: nn.Module, options: STROptions) -> dict[str, float]:
    """Load the tested weights and the masks of the run --start-from.

    Returns:
        Layer -> its density in that run.
    """
    try:
        source = finding.source(options, "start_from")
        path = processes.all_from_rank_0(lambda: runs.tested_weights(source))
        checkpoint.load_model(model, checkpoint.load_by_rank_0(path), path)
    except UserError as error:
        raise OptionError(f"--start-from: {error}") from None
    return densities(model)


def prune_to(trainer: Trainer[STROptions], *, level: int, density: float) -> None:
    """Shrink the masks to ``density`` by --pruner; pruning number ``level``, counted from 1."""
    model, options = trainer.model, trainer.options
    count = weights_left(model, density)
    if count > mask_size(model):  # only with --er-budget clip; see `check_levels`
        log.warning(
            "warning: --threshold-list: level %d asks for density %g, the clipped mask has %.6f; "
            "nothing is pruned",
            level,
            density,
            density_table(model).iloc[-1]["density"],
        )
        return
    if options.pruner == "mask-ref":
        source = trainer.run.source("target_expt_name")
        take_masks(model, reference_masks(source, level))
        return
    try:
        prune(
            model,
            options.pruner,
            count,
            seed=options.seed,
            level=level,
            batch=lambda: first_batch(trainer.data.train, len(trainer.history)),
            shape=trainer.data.shape.input,
            temperature=options.grasp_temperature,
        )
    except ValueError as error:  # for example, scores that are NaN
        raise UserError(f"--pruner: {options.pruner} at density {density:g}: {error}") from None


def take_masks(model: nn.Module, state: State) -> None:
    """Copy the masks from the state of another network; weights outside them become zero."""
    for name, _, mask in masked_weights(model):
        mask.copy_(state[f"{name}.weight_mask"])
    keep_inside(model)


def next_level(trainer: Trainer[STROptions], *, level: int, density: float) -> None:
    """Record the level just trained, prune to the next density, and rewind."""
    last = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    record_level(trainer, level=level)
    trainer.model.load_state_dict(last)
    prune_to(trainer, level=level + 1, density=density)
    pruned = trainer.evaluate(trainer.data.valid)["accuracy"]
    # These two are of the last epoch, whose weights are pruned; valid_accuracy is of the selected.
    trainer.tables["levels"][-1] |= {
        "valid_accuracy_unpruned": trainer.history[-1]["valid_accuracy"],
        "valid_accuracy_pruned": pruned,
    }
    trainer.write_tables()
    realised = density_table(trainer.model).iloc[-1]
    log.info(
        "pruned to density %.6f, %d weights; valid %.2f %% before training on",
        realised["density"],
        realised["kept"],
        100 * pruned,
    )
    path = trainer.run.folder / "rewind.pt"
    state = checkpoint.load_by_rank_0(path, trainer.device)
    REWINDS[trainer.options.rewind](trainer.model, state["model"])


def record_level(trainer: Trainer[STROptions], *, level: int) -> dict[str, float]:
    """Test the selected weights of a level; write a row of levels.csv, and details to levels/.

    The model keeps the selected weights. Returns the result of `Trainer.test`.
    """
    model, folder = trainer.model, trainer.run.folder
    result = trainer.test()
    table = density_table(model)
    initial = checkpoint.load_by_rank_0(folder / "initial.pt", trainer.device)["model"]
    flips = flipped(model, initial)
    table["flipped"] = table["layer"].map(flips)
    total = table.iloc[-1]
    row = {
        "level": level,
        "requested": (trainer.options.er_sparse_init, *trainer.options.threshold_list)[level],
        "density": float(total["density"]),
        "kept": int(total["kept"]),
        **result,
        "dead_units": int(total["dead_outputs"] + total["dead_inputs"]),
        "flipped": flips.get("total", 0.0),
    }
    trainer.tables.setdefault("levels", []).append(row)
    trainer.write_tables()
    trainer.run.write_table(f"levels/level-{level}.csv", table)
    checkpoint.save_by_rank_0(folder / f"levels/level-{level}.pt", {"model": model.state_dict()})
    log.info(
        "level %d at density %.6f: test %.2f %%, dead units %d, signs flipped %.2f %%",
        level,
        row["density"],
        100 * row["test_accuracy"],
        row["dead_units"],
        100 * row["flipped"],
    )
    return result
