"""Sparse to sparse on tables: random masks, trained, pruned by magnitude and trained again.

`program` runs it and writes files; tabular.ipynb shows it step by step. The setting is that of
Gadhikar et al. (2023, arXiv:2210.02412): an MLP of four layers and width 256, BatchNorm after ReLU,
Adam 0.01, batch 64, 10 epochs at each density and 20 at the last. All networks that exist at a
density train there together (`batched`).
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from startsparse import flow, parallel, processes, pruning, training
from startsparse.data.rows import Rows
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
from startsparse.tabular import batched, compute, tables
from startsparse.tabular.options import TabularOptions
from startsparse.tabular.tables import Table
from startsparse.tabular.unfinished import Unfinished

Setting = tuple[float, bool, bool, int]
"""Start, reset, flow and seed of a `Member`."""


@dataclasses.dataclass
class Member:
    """One network, its data and its setting.

    Attributes:
        initial: parameters and buffers at the start, without the masks.
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
    model = network(table, options)
    init_weights(model, options.init, seed)
    device = options.torch_device()
    model.to(device)  # what is drawn is the same on all
    initial = copy.deepcopy(model.state_dict())
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparse_layers(model).items()}
    densities = layer_densities(options.er_sparse_method, list(shapes.values()), start)
    attach_masks(model, draw_masks(shapes, densities, seed, "exact"))
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


def network(table: Table, options: TabularOptions) -> nn.Module:
    """The network of ``options`` for a table, not yet initialised."""
    return build(
        "mlp",
        classes=len(table.class_names),
        channels=len(table.feature_names),
        size=1,
        width=options.width,
    )


def settings(options: TabularOptions) -> list[Setting]:
    """Those of all networks of ``options`` on one table."""
    return list(
        itertools.product(options.starts, options.reset, options.flow_preservation, options.seeds)
    )


def make_members(
    table: Table, options: TabularOptions, chosen: Sequence[Setting] | None = None
) -> list[Member]:
    """The networks of ``chosen`` settings; None: all of ``options``."""
    chosen = settings(options) if chosen is None else chosen
    return [make_member(table, options, *setting) for setting in chosen]


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


def run(
    members: Sequence[Member], options: TabularOptions, kept: Unfinished | None = None
) -> pd.DataFrame:
    """Train and prune ``members`` down to the lowest density; changes them in place.

    Tested weights are those of the last epoch at each density: validation selects nothing, and the
    test set is used once at each density.

    Args:
        members: as `make_members` makes them.
        kept: where they are kept after each density, and were, if this is not the first try.

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
    every, levels = [member.model for member in members], options.levels()
    done, rows = kept.load(every) if kept else (0, [])
    hidden = None if processes.shows() else True
    for level, density in enumerate(tqdm(levels, desc="densities", disable=hidden)):
        present = [member for member in members if member.start >= density]
        if level < done or not present:
            continue
        for member in present:
            change_masks(member, density, level)
        first_epoch = level * options.epochs
        epochs = options.final_epochs if density == levels[-1] else options.epochs
        models, parts = [m.model for m in present], [m.train for m in present]
        forms = compute.sparse_forms(
            models, parts, recipe, mode=options.sparse_compute, loop=options.loop
        )
        if forms:
            batched.train_loop(models, parts, recipe, epochs, first_epoch, forms)
        else:
            batched.LOOPS[options.loop](models, parts, recipe, epochs, first_epoch)
        for model in models:
            training.require_finite(model, when=f" at density {density:g}")
        rows += [measure(member, density) for member in present]
        if kept:
            kept.save(every, level + 1, rows)
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
