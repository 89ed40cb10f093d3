"""Sweeps of iterative pruning: many runs of main.py, one table and one plot.

cd STR && python run_imp.py [options] [-- flags for every main.py]; --help lists the options.
Running it again skips what is finished and resumes what was interrupted.
"""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd

from startsparse import finding, labels, names, plots, processes, report, results, runs
from startsparse.atomic import remove_leftovers, write_text
from startsparse.commandline import parse
from startsparse.data import SETS
from startsparse.errors import OptionError, UserError
from startsparse.fields import PATH, Condition, choice, counts, default_is, normal
from startsparse.filled import filled
from startsparse.jobs import Job, require_distinct
from startsparse.launch import LaunchOptions, launch, read, say_failed, show
from startsparse.numbers import Seed
from startsparse.options import require_range
from startsparse.places import check_file
from startsparse.schedules import geometric
from STR.main import CONFIGS
from STR.options import STROptions

POWERS = Condition(lambda o: not o.densities, "with --densities")
KEYS = ["er_sparse_method", "er_sparse_init", "pruner", "rewind"]  # they make a setting


@dataclasses.dataclass
class SweepOptions(LaunchOptions):
    """Iterative pruning from ER networks, over seeds, ratios, densities and pruners."""

    config: Annotated[str, PATH] = str(CONFIGS / "largescale/resnet18-cifar-str-1.yaml")
    """YAML file of the runs"""
    set: Annotated[str, choice(("", *SETS)), default_is("the config's")] = ""
    """Data set"""
    seeds: tuple[Seed, ...] = (1,)
    """Seeds"""
    er_sparse_methods: tuple[str, ...] = ("balanced",)
    """Layer-wise ratios of the random masks; --er-sparse-method of main.py"""
    er_sparse_inits: tuple[float, ...] = (0.3,)
    """Densities of the random masks; 1 is the dense start"""
    pruners: tuple[str, ...] = ("mag",)
    """How to choose the weights to prune; --pruner of main.py"""
    target_expt_name: Annotated[str, PATH, default_is("none")] = ""
    """Run folder whose masks the pruner mask-ref takes. Here and in the flags after --, {seed},
    {method}, {init} (density of the random mask) and {rewind} stand for the values of each run, as
    in runs/imp/digits/{method}-{init}-mag-weights/seed-{seed}"""
    rewind: tuple[str, ...] = ("weights",)
    """What goes back after each pruning; --rewind of main.py"""
    keep: Annotated[float, counts(POWERS)] = 0.8
    """Share of the weights that a level keeps; the last level goes to --target"""
    target: Annotated[float, counts(POWERS)] = 0.01
    """Density of the last level; the number of levels is round(log(target / density of the random
    mask) / log(keep))"""
    densities: Annotated[tuple[float, ...], default_is("from --keep and --target")] = ()
    """Densities of the levels, instead of --keep and --target; those not below the density of
    the random mask are left out"""
    log_dir: Annotated[str, PATH] = "runs/imp"
    """Folder of the run folders, and of the output of each run"""
    result_dir: Annotated[str, PATH] = "results/imp"
    """Folder of results.csv, levels.csv, table.csv, table.md and plot.png; sweeps that share it are
    reported together"""

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        names.check(self)
        require_range(self, "keep", low=0, high=1, open_low=True, open_high=True)
        for name in ("target", "er_sparse_inits", "densities"):
            require_range(self, name, low=0, high=1, open_low=True)
        super().check()
        for name in ("seeds", "er_sparse_methods", "er_sparse_inits", "pruners", "rewind"):
            if not getattr(self, name):
                raise OptionError(f"--{name.replace('_', '-')}: needs at least one value")
        if self.target_expt_name and "mask-ref" not in map(normal, self.pruners):
            raise OptionError("--target-expt-name: goes with --pruners mask-ref")


def plan(options: SweepOptions, extra: list[str]) -> list[Job]:
    """The runs of a sweep."""
    jobs = []
    for method, start, pruner, rewind, seed in itertools.product(
        options.er_sparse_methods,
        options.er_sparse_inits,
        options.pruners,
        options.rewind,
        options.seeds,
    ):
        if start == 1 and method != options.er_sparse_methods[0]:
            continue  # dense is dense, whatever the ratio
        densities = _levels(options, start)
        argv = ["--config", options.config]
        argv += ["--set", options.set] if options.set else []
        argv += ["--seed", str(seed), "--er-sparse-method", method, "--er-sparse-init", str(start)]
        argv += ["--pruner", pruner, "--rewind", rewind]
        argv += ["--threshold-list", *map(str, densities)]
        argv += ["--name", f"{method}-{start:g}-{pruner}-{rewind}"]
        argv += ["--log-dir", options.log_dir, "--result-dir", options.result_dir]
        values = {"seed": seed, "method": method, "init": f"{start:g}", "rewind": rewind}
        if options.target_expt_name and normal(pruner) == "mask-ref":
            argv += ["--target-expt-name", filled(options.target_expt_name, values)]
        argv += [*(filled(word, values) for word in extra), "--resume", "auto"]
        jobs.append(Job("STR.main", argv, parse(STROptions, CONFIGS, argv)))
    return jobs


def _levels(options: SweepOptions, start: float) -> list[float]:
    """The densities that runs from density ``start`` prune to."""
    if options.densities:
        densities = [density for density in options.densities if density < start]
    else:
        densities = geometric(start, options.keep, options.target)
    if not densities or densities[0] >= start:
        raise OptionError(
            f"--er-sparse-inits: {start:g} has no level below it; see --densities and --target"
        )
    return densities


def collect(jobs: list[Job], path: Path) -> None:
    """Add the levels of every finished run, with its options, to levels.csv, the table ``path``.

    Rows of other sweeps stay. Runs that results.csv lacks are added there.

    Raises:
        UserError: a table cannot be read or written.
    """
    rows = []
    for job in jobs:
        if job.folder and (summary := runs.summary(job.folder)):
            runs.add_missing_row_by_rank_0(job.options, job.folder, summary)
            levels = results.read(job.folder / "levels.csv").to_dict("records")
            rows += [{"run": job.folder, **level, **runs.computed(job.options)} for level in levels]
    results.add(path, rows)


def check_places(jobs: list[Job], path: Path) -> None:
    """Raise `OptionError` if a file cannot be written, or levels.csv has one of these runs already.

    Runs count if they lie in another folder: their seed would repeat within a setting.
    """
    results.check(path)
    results.check(path.with_name("results.csv"))
    for name in ("table.csv", "table.md", "plot.png"):
        check_file("--result-dir", path.with_name(name))
    for job in jobs:
        check_file("--log-dir", job.log)
    planned = pd.DataFrame(runs.computed(job.options) for job in jobs).map(results.cell)
    # A run that is to begin gets the folder of its row if that is gone, as in a fresh checkout.
    folders = {results.identity(job.folder or finding.next_folder(job.options)) for job in jobs}
    known = results.without(results.read_runs(path), path, folders).drop_duplicates("run")
    both = results.numbers(pd.concat([known, planned.assign(run="this sweep")]).fillna(""))
    try:
        report.settings(both, KEYS, options_of(both))
    except UserError as error:
        raise OptionError(f"--result-dir: {path}: {error}") from None


def options_of(table: pd.DataFrame) -> list[str]:
    """The columns of levels.csv that are options and matter to the results, but for the seed."""
    names = [field.name for field in dataclasses.fields(STROptions)]
    other = runs.FREE | report.SEEDS_AND_NAMES
    return [name for name in names if name in table and name not in other]


def write_report(path: Path) -> str:
    """Write table.csv, table.md and plot.png beside levels.csv; return the table as Markdown.

    Other options than `KEYS` that vary make settings too.
    """
    table = results.numbers(results.read_runs(path))
    _, more = report.settings(table, [*KEYS, "requested"], options_of(table))
    table = report.without_seeds(table, more)
    dense = table["er_sparse_init"] == 1  # whatever the ratio
    one = table.loc[dense, "er_sparse_method"].nunique() == 1
    start = table["er_sparse_method"]
    start = start.where(~dense, "dense" if one else "dense, " + start)
    pruning = table["pruner"] + ", rewind " + table["rewind"]
    for name in more:
        pruning += f", {name} " + table[name].map(labels.shown)
    table = table.assign(
        density=table["requested"],
        start=start,
        start_density=table["er_sparse_init"].map(labels.shown),
        pruning=pruning,
    )
    keys = ["density", "start", "pruning", "start_density"]
    means = report.summarise(table, keys, ["test_accuracy"])
    write_text(path.with_name("table.csv"), means.to_csv(index=False))
    plots.plot(means, keys, "test_accuracy", path.with_name("plot.png"))
    cells = means.assign(
        cell=[
            f"{100 * mean:.2f}" + ("" if pd.isna(half) else f" ± {100 * half:.2f}")
            for mean, half in zip(means["test_accuracy"], means["test_accuracy_ci95"])
        ]
    )
    rows = ["pruning", "start", "start_density"]
    wide = cells.pivot(index=rows, columns="density", values="cell").fillna("")
    wide = wide.loc[list(dict.fromkeys(zip(*(cells[r] for r in rows)))), wide.columns[::-1]]
    lines = [["pruning", "start", "at density", *map(labels.shown, wide.columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[*name, *row] for name, row in zip(wide.index, wide.to_numpy())]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_text(path.with_name("table.md"), markdown)
    return markdown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit code, 1 if a run failed."""
    options, extra = read(SweepOptions, argv)
    jobs = plan(options, extra)
    require_distinct(jobs)
    if show(jobs, options, ["main.py"]):
        return 0
    levels = Path(options.result_dir) / "levels.csv"
    check_places(jobs, levels)
    failed = launch(jobs, options)
    if any(job.finished for job in jobs):
        collect(jobs, levels)
        with results.locked(levels):
            for name in ("table.csv", "table.md", "plot.png"):
                remove_leftovers(levels.parent, name)
            text = write_report(levels)
        print(text)
    return say_failed(failed)


if __name__ == "__main__":
    processes.run_script(main)
