"""``python -m startsparse.tabular``: tables in; results, a table of them and a picture out.

torchrun starts it in several processes, each on a GPU of its own if there are GPUs, on one machine
or many. Each trains its share of the networks, and rank 0 writes the results. A command that was
stopped goes on (`unfinished`).
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from startsparse import plots, processes, stopping
from startsparse.atomic import write_text
from startsparse.commandline import from_flags
from startsparse.data import data_root
from startsparse.data.arrays import device_memory
from startsparse.errors import UserError
from startsparse.masks import sparse_layers
from startsparse.tabular import experiment, report, tables
from startsparse.tabular.experiment import Setting
from startsparse.tabular.options import TabularOptions, alone, check_folder, result_options
from startsparse.tabular.tables import Table
from startsparse.tabular.unfinished import Unfinished, remove_all

_COPIES = 5  # of float32 for each weight: at the start, now, gradient, two moments of Adam


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Run the experiment on each table; write results, a table of them and a picture."""
    options = from_flags(
        TabularOptions, list(sys.argv[1:] if argv is None else argv), TabularOptions()
    )
    options.check()
    folder = Path(options.result_dir)
    processes.all_from_rank_0(lambda: check_folder(folder, options))
    root = data_root(options.data)
    with processes.all_in_turn():  # the first fetches what is missing
        loaded = {
            name: tables.load(
                name, root=root, state=options.state, year=options.year, label=options.label
            )
            for name in options.tables
        }
    for table in loaded.values():
        check(table, options)
    with _all_alone(folder, options):
        own = shares(options, processes.world_size())[processes.rank()]
        folder.mkdir(parents=True, exist_ok=True)  # of a machine with a disk of its own
        with processes.alone(), stopping.advice("the same command goes on"):
            trained = [
                _train(name, loaded[name], options, folder, networks) for name, networks in own
            ]
        rows = [part for parts in processes.all_gather(trained) for part in parts]
        processes.all_from_rank_0(lambda: _write(in_order(rows, options), folder, options, say))
        remove_all(folder)
        processes.all_agree(True)  # all have, before another run may write here


def shares(options: TabularOptions, count: int) -> list[list[tuple[str, list[Setting]]]]:
    """What each of ``count`` processes trains: (table, settings of networks).

    Where there are no more processes than tables, a process has whole tables. Else each table is
    split into as few pieces as give all processes work; networks that train as one batched model
    depend on each other's number in the last bits. Those that train one after the other do not, so
    they are dealt out one by one.
    """
    every = experiment.settings(options)
    wanted = len(every) if options.loop == "loop" else -(-count // len(options.tables))
    pieces = min(wanted, len(every))
    units = [(name, every[piece::pieces]) for name in options.tables for piece in range(pieces)]
    result: list[list[tuple[str, list[Setting]]]] = []
    for rank in range(count):
        mine: dict[str, list[Setting]] = {}
        for name, settings in units[rank::count]:
            mine.setdefault(name, []).extend(settings)
        result.append(list(mine.items()))
    return result


def in_order(parts: Sequence[pd.DataFrame], options: TabularOptions) -> pd.DataFrame:
    """The rows of all processes, in the order in which one process trains the networks."""
    rows = pd.concat(parts, ignore_index=True)
    table = {name: number for number, name in enumerate(options.tables)}
    network = {setting: number for number, setting in enumerate(experiment.settings(options))}
    places = [
        (table[row.table], -row.requested, network[row.start, row.reset, row.flow, row.seed])
        for row in rows.itertuples()
    ]
    return rows.iloc[sorted(range(len(rows)), key=places.__getitem__)].reset_index(drop=True)


def check(table: Table, options: TabularOptions) -> None:
    """Raise `UserError` unless all networks of ``options`` can train on ``table``."""
    for seed in options.seeds:
        parts = tables.split(table, seed)
        if len(parts.train[1]) < 2:  # BatchNorm
            raise UserError(f"{table.source}: has one row to train on, and two are needed")
    with torch.device("meta"):
        layers = sparse_layers(experiment.network(table, options))
    weights = sum(layer.weight.numel() for layer in layers.values())
    device = options.torch_device()
    networks = together(options, device)
    needed, there = 4 * _COPIES * networks * weights, device_memory(device)
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


def together(options: TabularOptions, device: torch.device) -> int:
    """Networks that are in the memory of ``device`` at once: a process trains table by table."""
    most = max(len(s) for own in shares(options, processes.world_size()) for _, s in own)
    spread = device.type == "cuda" and ":" not in options.device
    devices = torch.cuda.device_count() if spread else 1
    return most * math.ceil(processes.local_size() / devices)


def _train(
    name: str, table: Table, options: TabularOptions, folder: Path, networks: Sequence[Setting]
) -> pd.DataFrame:
    members = experiment.make_members(table, options, networks)
    rows = experiment.run(members, options, Unfinished(folder, table, options, networks))
    rows.insert(0, "table", name)
    return rows


@contextlib.contextmanager
def _all_alone(folder: Path, options: TabularOptions) -> Iterator[None]:
    """A collective: rank 0 holds the folder of results against other runs of the program."""
    with contextlib.ExitStack() as held:

        def hold() -> None:
            held.enter_context(alone(folder))
            check_folder(folder, options)  # another run may have written meanwhile

        processes.all_from_rank_0(hold)
        yield


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
