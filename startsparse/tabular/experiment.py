"""Sparse to sparse on tables: random masks, trained, pruned by magnitude and trained again.

``python -m startsparse.tabular`` writes results.csv, table.md, plot.png and options.yaml;
tabular.ipynb shows the same step by step. The setting is that of Gadhikar et al. (2023,
arXiv:2210.02412): an MLP of four layers and width 256, BatchNorm after ReLU, Adam 0.01, batch 64,
10 epochs at each density and 20 at the last. All networks that exist at a density train there
together (`batched`).
"""

import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from startsparse import flow, parallel, plots, pruning, training
from startsparse.atomic import write_text
from startsparse.commandline import from_flags
from startsparse.data import data_root
from startsparse.data.arrays import device_memory
from startsparse.data.rows import Rows
from startsparse.errors import UserError
from startsparse.masks import (
    attach_masks,
    density_table,
    draw_masks,
    keep_inside,
    masked_weights,
    sparse_layers,
)
from startsparse.models import build, init_weights
from startsparse.ratios import layer_densities
from startsparse.tabular import batched, compute, report, tables
from startsparse.tabular.options import TabularOptions, alone, check_folder, result_options
from startsparse.tabular.tables import Table

_COPIES = 5  # of float32 for each weight: at the start, now, gradient, two moments of Adam


@dataclasses.dataclass
class Member:
    """One network, its data and its setting.

    Attributes:
        initial: parameters and buffers at the start, without the masks, on the CPU.
        first_masks: density -> bool [outputs, inputs], the first layer's mask at that density, on
            the CPU.
    """

    start: float
    reset: bool
    flow: bool
    seed: int
    model: nn.Module
    train: Rows
    valid: Rows
    test: Rows
    initial: dict[str, Tensor]
    first_masks: dict[float, Tensor]


def make_member(
    table: Table, options: TabularOptions, start: float, reset: bool, flow: bool, seed: int
) -> Member:
    """A network with a random mask of density ``start``, and its split of the table.

    Both are on the device of ``options``. Networks of one seed begin with the same weights and
    split, whatever their mask.
    """
    parts = tables.split(table, seed)
    model = _network(table, options)
    init_weights(model, options.init, seed)
    initial = copy.deepcopy(model.state_dict())
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparse_layers(model).items()}
    densities = layer_densities(options.er_sparse_method, list(shapes.values()), start)
    attach_masks(model, draw_masks(shapes, densities, seed, "exact"))
    device = options.torch_device()
    model.to(device)  # what is drawn is the same on all
    return Member(
        start=start,
        reset=reset,
        flow=flow,
        seed=seed,
        model=model,
        train=Rows(*parts.train, batch_size=options.batch_size, device=device, seed=seed),
        valid=Rows(*parts.valid, batch_size=1024, device=device),
        test=Rows(*parts.test, batch_size=1024, device=device),
        initial=initial,
        first_masks={},
    )


def _network(table: Table, options: TabularOptions) -> nn.Module:
    return build(
        "mlp",
        classes=len(table.class_names),
        channels=len(table.feature_names),
        size=1,
        width=options.width,
    )


def check(table: Table, options: TabularOptions) -> None:
    """Raise `UserError` unless all networks of ``options`` can train on ``table``."""
    for seed in options.seeds:
        parts = tables.split(table, seed)
        if len(parts.train[1]) < 2:  # BatchNorm
            raise UserError(f"{table.source}: has one row to train on, and two are needed")
    with torch.device("meta"):
        layers = sparse_layers(_network(table, options))
    weights = sum(layer.weight.numel() for layer in layers.values())
    networks = math.prod(
        map(len, (options.starts, options.reset, options.flow_preservation, options.seeds))
    )
    needed, there = 4 * _COPIES * networks * weights, device_memory(options.torch_device())
    if needed > there:
        raise UserError(
            f"--width: {networks} networks of {weights:,} weights need {needed / 2**30:,.0f} GiB "
            f"of memory, and {there / 2**30:,.0f} are there; take a smaller width or fewer seeds"
        )
    for option in ("starts", "densities"):
        for density in getattr(options, option):
            if not round(density * weights):
                raise UserError(
                    f"--{option}: {density:g} leaves no weight of {weights:,}; ask for more"
                )


def make_members(table: Table, options: TabularOptions) -> list[Member]:
    """All networks of ``options``."""
    return [
        make_member(table, options, *setting)
        for setting in itertools.product(
            options.starts, options.reset, options.flow_preservation, options.seeds
        )
    ]


def change_masks(member: Member, density: float, level: int) -> None:
    """Prune to ``density`` by magnitude, preserve flow and reset, as the member's setting says."""
    model = member.model
    if density < member.start:
        count = pruning.weights_left(model, density)
        pruning.prune(model, "mag", count, seed=member.seed, level=level)
    if member.flow:
        flow.repair(model, member.seed, level, by_magnitude=True)
    if member.reset and density < member.start:
        model.load_state_dict(member.initial, strict=False)  # it has no masks
    keep_inside(model)


def run(members: Sequence[Member], options: TabularOptions) -> pd.DataFrame:
    """Train and prune ``members`` down to the lowest density; changes them in place.

    Tested weights are those of the last epoch at each density: validation selects nothing, and the
    test set is used once at each density.

    Returns:
        One row per network and density. Columns: start, reset, flow, seed, requested and (realised)
        density, valid_accuracy and test_accuracy in [0, 1], majority (share of the most frequent
        class in the test set), dead_outputs and dead_inputs (units without an incoming, outgoing
        edge), empty_layers (names of layers without a weight) and cut (no path of edges leads from
        any input to any output).

    Raises:
        NonFiniteLoss, NonFiniteNetwork: training diverged.
    """
    recipe = batched.Recipe(options.optimizer, options.lr, options.weight_decay)
    rows, first_epoch, levels = [], 0, options.levels()
    for level, density in enumerate(tqdm(levels, desc="densities", disable=None)):
        present = [member for member in members if member.start >= density]
        for member in present:
            change_masks(member, density, level)
        epochs = options.final_epochs if density == levels[-1] else options.epochs
        models, parts = [m.model for m in present], [m.train for m in present]
        forms = compute.sparse_forms(
            models, parts, recipe, mode=options.sparse_compute, loop=options.loop
        )
        if forms:
            batched.train_loop(models, parts, recipe, epochs, first_epoch, forms)
        else:
            batched.LOOPS[options.loop](models, parts, recipe, epochs, first_epoch)
        first_epoch += epochs
        for model in models:
            training.require_finite(model, when=f" at density {density:g}")
        rows += [measure(member, density) for member in present]
    return pd.DataFrame(rows)


def measure(member: Member, density: float) -> dict:
    """The row of a network at a density; see `run`."""
    layers = density_table(member.model)
    total, layers = layers.iloc[-1], layers.iloc[:-1]
    counts = member.test.labels.bincount()
    masks = [mask for _, _, mask in masked_weights(member.model)]
    member.first_masks[density] = masks[0].clone().cpu()
    return {
        "start": member.start,
        "reset": member.reset,
        "flow": member.flow,
        "seed": member.seed,
        "requested": density,
        "density": float(total["density"]),
        "valid_accuracy": accuracy(member.model, member.valid),
        "test_accuracy": accuracy(member.model, member.test),
        "majority": int(counts.max()) / int(counts.sum()),
        "dead_outputs": int(total["dead_outputs"]),
        "dead_inputs": int(total["dead_inputs"]),
        "empty_layers": " ".join(layers.loc[layers["kept"] == 0, "layer"]),
        "cut": not connected(masks),
    }


def accuracy(model: nn.Module, rows: Rows) -> float:
    """Share of rows that the network classifies correctly.

    Raises:
        NonFiniteLoss: an output is not finite, so that it says nothing.
    """
    device = rows.labels.device
    autocast = parallel.autocast(device, "off")
    found = training.evaluate(model, model, rows, autocast, device)
    if not math.isfinite(found["loss"]):
        raise training.NonFiniteLoss(
            "the loss on rows that were not trained on is not finite; some are far from the others"
        )
    return found["accuracy"]


def connected(masks: Sequence[Tensor]) -> bool:
    """Whether a path of edges leads from an input to an output.

    Args:
        masks: bool [outputs, inputs] of fully connected layers, in forward order, on one device.
    """
    reached = torch.ones_like(masks[0][0])
    for mask in masks:
        reached = (mask & reached).any(1)
    return bool(reached.any())


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Run the experiment on each table; write results, a table of them and a picture."""
    options = from_flags(
        TabularOptions, list(sys.argv[1:] if argv is None else argv), TabularOptions()
    )
    options.check()
    folder, parts = Path(options.result_dir), []
    check_folder(folder, options)
    root = data_root(options.data)
    loaded = {
        name: tables.load(
            name, root=root, state=options.state, year=options.year, label=options.label
        )
        for name in options.tables
    }
    for table in loaded.values():
        check(table, options)
    with alone(folder):
        check_folder(folder, options)  # another run may have written meanwhile
        for name, table in loaded.items():
            rows = run(make_members(table, options), options)
            rows.insert(0, "table", name)
            parts.append(rows)
        _write(pd.concat(parts, ignore_index=True), folder, options, say)


def _write(
    rows: pd.DataFrame, folder: Path, options: TabularOptions, say: Callable[[str], None]
) -> None:
    """Write what determines the rows, the rows, their table and picture; print the table."""
    write_text(folder / "options.yaml", result_options(options))
    write_text(folder / "results.csv", rows.to_csv(index=False))
    markdown = report.markdown(rows)
    try:
        write_text(folder / "table.md", markdown)
        with plots.optional(folder / "plot.png"):
            plots.save(report.accuracy_plot(rows), folder / "plot.png")
    finally:
        say(markdown)
