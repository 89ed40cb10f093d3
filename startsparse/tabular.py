"""Sparse to sparse on tables: random masks, trained, pruned by magnitude and trained again.

``python -m startsparse.tabular`` writes results.csv, table.md and plot.png; tabular.ipynb shows the
same step by step. The setting is that of Gadhikar et al. (2023, arXiv:2210.02412): an MLP of four
layers and width 256, BatchNorm after ReLU, Adam 0.01, batch 64, 10 epochs at each density and 20 at
the last. All networks that exist at a density train there together (`startsparse.batched`).
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from startsparse import batched, batched_compute, flow, parallel, pruning, ratios, training
from startsparse.atomic import write_text
from startsparse.commandline import from_flags
from startsparse.data import data_root, tables
from startsparse.data.rows import Rows
from startsparse.data.tables import Table
from startsparse.engine.compute import MODES
from startsparse.errors import OptionError, run_script
from startsparse.fields import Truth, choice, default_is
from startsparse.masks import attach_masks, density_table, draw_masks, keep_inside, sparse_layers
from startsparse.models import INITS, build, init_weights
from startsparse.options import require_range
from startsparse.ratios import layer_densities


@dataclasses.dataclass
class TabularOptions:
    """Networks that start sparse, pruned on from there, on tables."""

    tables: tuple[str, ...] = ("breast-cancer",)
    """breast-cancer, digits, ACSEmployment, ACSIncome, or the paths of .csv files"""
    data: Annotated[str, default_is("$STARTSPARSE_DATA, else data/ at the root")] = ""
    """Folder of the census files"""
    state: str = "AL"
    """State of the census, two letters"""
    year: int = 2018
    """Year of the census"""
    label: Annotated[str, default_is("none")] = ""
    """Column of the classes in a .csv file"""

    starts: tuple[float, ...] = (1.0, 0.5)
    """Densities of the random masks to start from; 1 is the dense start"""
    er_sparse_method: choice(m for m in ratios.METHODS if m != "network") = "uniform"
    """Layer-wise ratio of the random masks"""
    densities: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    """Densities to prune to by magnitude; those not below the start are left out"""
    reset: tuple[Truth, ...] = (False, True)
    """After each pruning: False goes on, True puts all weights back to their initial values"""
    flow_preservation: tuple[Truth, ...] = (False,)
    """True: every unit without an incoming or outgoing edge gets one, after each pruning"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds; each has its own split, weights, masks and order of the data"""

    width: int = 256
    """Units of the hidden layers"""
    init: choice(INITS) = "kaiming_normal"
    """Initialisation of the weights"""
    optimizer: choice(("adam", "sgd")) = "adam"
    """Optimizer; it starts anew at each density"""
    lr: float = 0.01
    """Learning rate"""
    weight_decay: float = 0.0
    """Weight decay"""
    batch_size: int = 64
    """Rows per step"""
    epochs: int = 10
    """Epochs at each density"""
    final_epochs: int = 20
    """Epochs at the last density"""
    form: choice(batched.FORMS) = "batched"
    """Train all networks at once, or one after the other: the same within rounding"""
    sparse_compute: choice(MODES) = "auto"
    """Train one after the other, and compute and store only what is inside the masks; auto: at the
    densities where a few steps are faster so. The same within rounding"""
    result_dir: str = "results/tabular"
    """Folder of results.csv, table.md and plot.png"""

    def check(self) -> None:
        """Raise `OptionError` for values that cannot be meant; names the option."""
        for name in ("tables", "starts", "densities", "reset", "flow_preservation", "seeds"):
            if not getattr(self, name):
                raise OptionError(f"--{name.replace('_', '-')}: needs at least one value")
        for name in ("starts", "densities"):
            for density in getattr(self, name):
                if not 0 < density <= 1:
                    raise OptionError(f"--{name}: {density:g} should be above 0 and at most 1")
        require_range(self, "lr", low=0, open_low=True)
        require_range(self, "weight_decay", low=0)
        for name in ("width", "epochs", "final_epochs"):
            require_range(self, name, low=1)
        require_range(self, "batch_size", low=2)  # BatchNorm

    def levels(self) -> list[float]:
        """Densities at which networks train, falling."""
        return sorted({*self.starts, *self.densities}, reverse=True)


@dataclasses.dataclass
class Member:
    """One network, its data and its setting.

    Attributes:
        initial: parameters and buffers at the start, without the masks.
        first_masks: density -> bool [outputs, inputs], the first layer's mask at that density.
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

    Networks of one seed begin with the same weights and split, whatever their mask.
    """
    parts = tables.split(table, seed)
    model = build(
        "mlp",
        classes=len(table.class_names),
        channels=len(table.feature_names),
        size=1,
        width=options.width,
    )
    init_weights(model, options.init, seed)
    initial = copy.deepcopy(model.state_dict())
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparse_layers(model).items()}
    densities = layer_densities(options.er_sparse_method, list(shapes.values()), start)
    attach_masks(model, draw_masks(shapes, densities, seed, "exact"))
    cpu = torch.device("cpu")
    return Member(
        start=start,
        reset=reset,
        flow=flow,
        seed=seed,
        model=model,
        train=Rows(*parts.train, batch_size=options.batch_size, device=cpu, seed=seed),
        valid=Rows(*parts.valid, batch_size=1024, device=cpu),
        test=Rows(*parts.test, batch_size=1024, device=cpu),
        initial=initial,
        first_masks={},
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

    Weights are those after the last epoch at each density: nothing is chosen by validation, and the
    test set is used once at each density.

    Returns:
        One row per network and density. Columns: start, reset, flow, seed, requested and (realised)
        density, valid_accuracy and test_accuracy in [0, 1], majority (share of the most frequent
        class in the test set), dead_outputs and dead_inputs (units without an incoming, outgoing
        edge), empty_layers (names of layers without a weight) and cut (no path of edges leads from
        any input to any output).

    Raises:
        NonFiniteLoss: training diverged.
    """
    recipe = batched.Recipe(options.optimizer, options.lr, options.weight_decay)
    rows, first_epoch, levels = [], 0, options.levels()
    for level, density in enumerate(tqdm(levels, desc="densities", disable=None)):
        present = [member for member in members if member.start >= density]
        for member in present:
            change_masks(member, density, level)
        epochs = options.final_epochs if density == levels[-1] else options.epochs
        models, parts = [m.model for m in present], [m.train for m in present]
        forms = batched_compute.sparse_forms(
            models, parts, recipe, mode=options.sparse_compute, form=options.form
        )
        if forms:
            batched.train_loop(models, parts, recipe, epochs, first_epoch, forms)
        else:
            batched.FORMS[options.form](models, parts, recipe, epochs, first_epoch)
        first_epoch += epochs
        rows += [measure(member, density) for member in present]
    return pd.DataFrame(rows)


def measure(member: Member, density: float) -> dict:
    """The row of a network at a density; see `run`."""
    layers = density_table(member.model)
    total, layers = layers.iloc[-1], layers.iloc[:-1]
    labels = member.test.labels
    masks = [layer.weight_mask for layer in sparse_layers(member.model).values()]
    member.first_masks[density] = masks[0].clone()
    return {
        "start": member.start,
        "reset": member.reset,
        "flow": member.flow,
        "seed": member.seed,
        "requested": density,
        "density": float(total["density"]),
        "valid_accuracy": accuracy(member.model, member.valid),
        "test_accuracy": accuracy(member.model, member.test),
        "majority": float(labels.bincount().max() / len(labels)),
        "dead_outputs": int(total["dead_outputs"]),
        "dead_inputs": int(total["dead_inputs"]),
        "empty_layers": " ".join(layers.loc[layers["kept"] == 0, "layer"]),
        "cut": not connected(masks),
    }


def accuracy(model: nn.Module, rows: Rows) -> float:
    """Share of rows that the network gets right."""
    device = torch.device("cpu")
    autocast = parallel.autocast(device, "off")
    return training.evaluate(model, model, rows, autocast, device)["accuracy"]


def connected(masks: Sequence[Tensor]) -> bool:
    """Whether a path of edges leads from an input to an output.

    Args:
        masks: bool [outputs, inputs] of fully connected layers, in forward order.
    """
    reached = torch.ones(masks[0].shape[1], dtype=torch.bool)
    for mask in masks:
        reached = (mask & reached).any(1)
    return bool(reached.any())


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    """The experiment on each table; the tables and a picture of the results."""
    from startsparse import tabular_report  # matplotlib is slow to import

    options = from_flags(TabularOptions, list(argv), TabularOptions())
    options.check()
    folder, found = Path(options.result_dir), []
    root = data_root(options.data)
    loaded = {
        name: tables.load(
            name, root=root, state=options.state, year=options.year, label=options.label
        )
        for name in options.tables
    }
    for name, table in loaded.items():
        rows = run(make_members(table, options), options)
        rows.insert(0, "table", name)
        found.append(rows)
    results = pd.concat(found, ignore_index=True)
    write_text(folder / "results.csv", results.to_csv(index=False))
    markdown = tabular_report.markdown(results)
    write_text(folder / "table.md", markdown)
    tabular_report.save(tabular_report.accuracy_plot(results), folder / "plot.png")
    say(markdown)


if __name__ == "__main__":
    import sys

    run_script(lambda: main(sys.argv[1:]))
