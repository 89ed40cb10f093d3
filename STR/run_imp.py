"""Sweeps of iterative pruning: many runs of main.py, one table and one plot.

cd STR && python run_imp.py [options] [-- flags for every main.py]; --help lists the options.
Running it again skips what is finished and resumes what was interrupted.
"""

import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd

from startsparse import effects, plots, processes, report, results, runs
from startsparse.atomic import write_text
from startsparse.commandline import from_flags, named, parse
from startsparse.data import SETS
from startsparse.errors import OptionError, UserError
from startsparse.fields import Condition, choice, counts, default_is, normal
from startsparse.options import require_gpus, require_range
from startsparse.schedules import geometric
from STR.jobs import Job, run_all
from STR.main import CONFIGS
from STR.options import STROptions

POWERS = Condition(lambda o: not o.densities, "with --densities")
KEYS = ["er_sparse_method", "er_sparse_init", "pruner", "rewind"]  # what makes a setting


@dataclasses.dataclass
class SweepOptions:
    """Iterative pruning from ER networks, over seeds, ratios, densities and pruners."""

    config: str = str(CONFIGS / "largescale/resnet18-cifar-str-1.yaml")
    """YAML file of the runs"""
    set: Annotated[str, choice(("", *SETS)), default_is("the config's")] = ""
    """Data set"""
    seeds: tuple[int, ...] = (1,)
    """Seeds"""
    er_sparse_methods: tuple[str, ...] = ("balanced",)
    """Layer-wise ratios of the random masks; --er-sparse-method of main.py"""
    er_sparse_inits: tuple[float, ...] = (0.3,)
    """Densities of the random masks; 1 is the dense start"""
    pruners: tuple[str, ...] = ("mag",)
    """What decides which weights go; --pruner of main.py"""
    target_expt_name: Annotated[str, default_is("none")] = ""
    """Run folder whose masks the pruner mask-ref takes. In it, and in the flags after --, each run
    puts its own values for {seed}, {method}, {init} (density of the random mask) and {rewind}, as
    in runs/imp/digits/{method}-{init}-mag-weights/seed-{seed}"""
    rewind: tuple[str, ...] = ("weights",)
    """What goes back after each pruning; --rewind of main.py"""
    keep: Annotated[float, counts(POWERS)] = 0.8
    """Share of the weights that a level keeps; the last level goes on to --target"""
    target: Annotated[float, counts(POWERS)] = 0.01
    """Density of the last level, of round(log(target / density of the random mask) / log(keep))"""
    densities: Annotated[tuple[float, ...], default_is("from --keep and --target")] = ()
    """Densities of the levels, instead of --keep and --target; those not below the density of
    the random mask are left out"""
    log_dir: str = "runs/imp"
    """Folder of the run folders, and of what each run said"""
    result_dir: str = "results/imp"
    """Folder of results.csv, levels.csv, table.csv, table.md and plot.png; those of several sweeps
    are of all runs together"""
    jobs: Annotated[int | None, default_is("one for each of --devices")] = None
    """Runs at the same time; they share the cores, unless OMP_NUM_THREADS is set"""
    devices: Annotated[str, default_is("the first GPU, if there is one")] = ""
    """GPUs, as in 0,1; the runs of one time have them in turns, one each"""
    dry_run: bool = False
    """Print the commands and the number of epochs in all, and stop"""

    @property
    def at_once(self) -> int:
        """Runs at the same time."""
        return self.devices.count(",") + 1 if self.jobs is None else self.jobs

    def check(self) -> None:
        """Raise `OptionError` for values that cannot be meant; names the option."""
        if processes.world_size() > 1:
            raise OptionError("torchrun: is for main.py; a sweep starts its own runs, see --jobs")
        require_range(self, "keep", low=0, high=1, open_low=True, open_high=True)
        require_range(self, "target", low=0, high=1, open_low=True)
        require_gpus(self, "devices")
        gpus = self.devices.count(",") + 1
        if self.jobs is not None:
            require_range(self, "jobs", low=1)
        if self.at_once < gpus:
            raise OptionError(
                f"--jobs: {self.jobs} uses only some of --devices {self.devices}; give at least "
                f"{gpus}, or fewer devices"
            )
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
        if options.densities:
            densities = [density for density in options.densities if density < start]
        else:
            densities = geometric(start, options.keep, options.target)
        if not densities or densities[0] >= start:
            raise OptionError(
                f"--er-sparse-inits: {start:g} has no level below it; see --densities and --target"
            )
        argv = ["--config", options.config]
        argv += ["--set", options.set] if options.set else []
        argv += ["--seed", str(seed), "--er-sparse-method", method, "--er-sparse-init", str(start)]
        argv += ["--pruner", pruner, "--rewind", rewind]
        argv += ["--threshold-list", *map(str, densities)]
        argv += ["--name", f"{method}-{start:g}-{pruner}-{rewind}"]
        argv += ["--log-dir", options.log_dir, "--result-dir", options.result_dir]
        own = {"seed": seed, "method": method, "init": f"{start:g}", "rewind": rewind}
        if options.target_expt_name and normal(pruner) == "mask-ref":
            argv += ["--target-expt-name", _filled(options.target_expt_name, own)]
        argv += [*(_filled(word, own) for word in extra), "--resume", "auto"]
        jobs.append(Job(argv, parse(STROptions, CONFIGS, argv)))
    return jobs


def _filled(word: str, values: dict[str, object]) -> str:
    """``word`` with the values of the run for {seed} and the like."""

    def value(match: re.Match) -> str:
        if match[1] not in values:
            known = ", ".join(f"{{{name}}}" for name in values)
            raise OptionError(f"'{word}': there is no {match[0]}; choose from {known}")
        return str(values[match[1]])

    return re.sub(r"\{(\w+)\}", value, word)


def collect(jobs: list[Job], path: Path) -> None:
    """Put the levels of every finished run into the table ``path``: levels.csv and its options.

    Those of other sweeps are there already, and stay.
    """
    rows = []
    for job in jobs:
        if job.folder and job.finished:
            levels = pd.read_csv(job.folder / "levels.csv").to_dict("records")
            rows += [{"run": job.folder, **level, **computed(job.options)} for level in levels]
    results.add(path, rows)


def computed(options: STROptions) -> dict[str, object]:
    """The options that say what a run computes, and its name."""
    fields = dataclasses.asdict(options)
    return {name: value for name, value in fields.items() if name not in runs.FREE}


def require_distinct(jobs: list[Job]) -> None:
    """Raise `OptionError` where two runs of a sweep are the same, as of a seed named twice."""
    seen: dict[str, Job] = {}
    for job in jobs:
        first = seen.setdefault(repr({**computed(job.options), "name": ""}), job)
        if first is not job:
            raise OptionError(f"the sweep has one run twice: {first.title}, and {job.title}")


def check_tables(jobs: list[Job], path: Path) -> None:
    """Raise `OptionError` if levels.csv cannot take these runs, or has one from elsewhere."""
    results.check(path)
    planned = pd.DataFrame(computed(job.options) for job in jobs).map(results.cell)
    own = {job.folder.resolve() for job in jobs if job.folder}
    known = results.without(results.read_runs(path), path, own).drop_duplicates("run")
    both = results.numbers(pd.concat([known, planned.assign(run="this sweep")]).fillna(""))
    try:
        report.settings(both, KEYS, options_of(both))
    except UserError as error:
        raise OptionError(f"--result-dir: {path}: {error}") from None


def options_of(table: pd.DataFrame) -> list[str]:
    """The columns of levels.csv that are options of what a run computes, but the seed."""
    names = [field.name for field in dataclasses.fields(STROptions)]
    other = runs.FREE | report.SEEDS_AND_NAMES
    return [name for name in names if name in table and name not in other]


def write_report(path: Path) -> str:
    """Beside levels.csv, table.csv, table.md and plot.png; returns the table as Markdown.

    Options besides `KEYS` that vary make settings of their own.
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
        pruning += f", {name} " + table[name].map(plots.shown)
    table = table.assign(
        density=table["requested"],
        start=start,
        start_density=table["er_sparse_init"].map(plots.shown),
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
    lines = [["pruning", "start", "at density", *map(plots.shown, wide.columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[*name, *row] for name, row in zip(wide.index, wide.to_numpy())]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_text(path.with_name("table.md"), markdown)
    return markdown


def main(argv: Sequence[str] | None = None) -> int:
    """The sweep; 1 if a run failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options = from_flags(SweepOptions, argv[:split], SweepOptions())
    effects.refuse_named(options, named(SweepOptions, argv[:split]))
    options.check()
    jobs = plan(options, argv[split + 1 :])
    require_distinct(jobs)
    if options.dry_run:
        for job in jobs:
            print(shlex.join(["python", "main.py", *job.argv]))
        print(f"{len(jobs)} runs, {sum(job.epochs for job in jobs)} epochs")
        return 0
    levels = Path(options.result_dir) / "levels.csv"
    check_tables(jobs, levels)
    failed = run_all(jobs, options.at_once, options.devices.split(","))
    if any(job.finished for job in jobs):
        collect(jobs, levels)
        print(write_report(levels))
    for job in failed:
        print(f"error: {job.title} failed; see {job.log}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    processes.run_script(main)
