"""Sweeps of iterative pruning: many runs of main.py, one table and one plot.

cd STR && python run_imp.py [options] [-- flags for every main.py]; --help lists the options.
Running it again skips what is finished and resumes what was interrupted.
"""

import dataclasses
import itertools
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from tqdm import tqdm

from startsparse import report, runs
from startsparse.atomic import write_text
from startsparse.commandline import choice, default_is, from_flags, parse
from startsparse.data import SETS
from startsparse.errors import OptionError, UserError, run_script
from startsparse.options import require_range
from startsparse.schedules import geometric
from STR.main import CONFIGS
from STR.options import STROptions

MAIN = Path(__file__).parent / "main.py"
KEYS = ["er_sparse_method", "er_sparse_init", "pruner", "rewind"]  # what makes a setting


@dataclasses.dataclass
class SweepOptions:
    """Iterative pruning from ER networks, over seeds, ratios, densities and pruners."""

    config: str = str(CONFIGS / "largescale/resnet18-cifar-str-1.yaml")
    """YAML file of the runs"""
    set: Annotated[choice(("", *SETS)), default_is("the config's")] = ""
    """Data set"""
    seeds: tuple[int, ...] = (1,)
    """Seeds"""
    er_sparse_methods: tuple[str, ...] = ("balanced",)
    """Layer-wise ratios of the random masks; --er-sparse-method of main.py"""
    er_sparse_inits: tuple[float, ...] = (0.3,)
    """Densities of the random masks; 1 is the dense start"""
    pruners: tuple[str, ...] = ("mag",)
    """What decides which weights go; --pruner of main.py"""
    rewind: tuple[str, ...] = ("weights",)
    """What goes back after each pruning; --rewind of main.py"""
    keep: float = 0.8
    """Share of the weights that a level keeps"""
    target: float = 0.01
    """Density of the last level"""
    densities: Annotated[tuple[float, ...], default_is("from --keep and --target")] = ()
    """Densities of the levels, instead of --keep and --target; those not below the density of
    the random mask are left out"""
    log_dir: str = "runs/imp"
    """Folder of the run folders, and of what each run said"""
    result_dir: str = "results/imp"
    """Folder of results.csv, levels.csv, table.csv, table.md and plot.png"""
    jobs: int = 1
    """Runs at the same time"""
    devices: Annotated[str, default_is("the first GPU, if there is one")] = ""
    """GPUs, as in 0,1; each run has one of them"""
    dry_run: bool = False
    """Print the commands and the number of epochs in all, and stop"""

    def check(self) -> None:
        """Raise `OptionError` for values that cannot be meant; names the option."""
        require_range(self, "keep", low=0, high=1, open_low=True, open_high=True)
        require_range(self, "target", low=0, high=1, open_low=True)
        require_range(self, "jobs", low=1)
        for name in ("seeds", "er_sparse_methods", "er_sparse_inits", "pruners", "rewind"):
            if not getattr(self, name):
                raise OptionError(f"--{name.replace('_', '-')}: needs at least one value")


@dataclasses.dataclass
class Job:
    """One run of main.py, parsed: bad flags are found before anything runs."""

    argv: list[str]
    options: STROptions
    found: Path | None = None

    @property
    def epochs(self) -> int:
        """Epochs in all."""
        options = self.options
        pruning = len(options.threshold_list) * options.final_prune_epoch
        return options.warmup_epochs + pruning + options.epochs

    @property
    def folder(self) -> Path | None:
        """Run folder, if it has begun."""
        self.found = self.found or runs.find_run(self.options)
        return self.found

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return self.folder is not None and runs.summary(self.folder) is not None

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.options.name}, seed {self.options.seed}"

    @property
    def log(self) -> Path:
        """The file of what it says."""
        return Path(self.options.log_dir) / f"{self.options.name}-seed-{self.options.seed}.log"


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
        argv += [*extra, "--resume", "auto"]
        jobs.append(Job(argv, parse(STROptions, CONFIGS, argv)))
    return jobs


def run_all(jobs: list[Job], options: SweepOptions) -> list[Job]:
    """Run what is not finished; returns what failed. Children are stopped with this process."""
    waiting, failed = [job for job in jobs if not job.finished], []
    slots = (options.devices.split(",") * options.jobs)[: options.jobs]
    running: dict[int, tuple[Job, subprocess.Popen, tqdm]] = {}
    stopped: list[int] = []
    handlers = {
        signum: signal.signal(signum, lambda number, _frame: stopped.append(number))
        for signum in (signal.SIGINT, signal.SIGTERM)
    }
    sweep = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="sweep", disable=None)
    try:
        while (waiting or running) and not stopped:
            for slot in range(options.jobs):
                if slot not in running and waiting:
                    running[slot] = _start(waiting.pop(0), slots[slot], position=slot + 1)
            time.sleep(0.5)
            for slot, (job, process, bar) in list(running.items()):
                _show(job, bar)
                if process.poll() is not None:
                    del running[slot]
                    bar.close()
                    sweep.update()
                    tqdm.write(f"{job.title}: {'failed' if process.returncode else 'finished'}")
                    if process.returncode:
                        failed.append(job)
    finally:
        for _, process, _ in running.values():
            process.terminate()  # saves its checkpoint
        for _, process, bar in running.values():
            process.wait()
            bar.close()
        sweep.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if stopped:
        error = UserError("stopped; the same command continues where the runs were")
        error.exit_code = 128 + stopped[0]
        raise error
    return failed


def _start(job: Job, device: str, position: int) -> tuple[Job, subprocess.Popen, tqdm]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(MAIN), *job.argv, *(["--multigpu", device] if device else [])]
    with job.log.open("a") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes here, and is passed on as SIGTERM
        )
    return (
        job,
        process,
        tqdm(
            total=job.epochs,
            desc=job.title,
            position=position,
            leave=False,
            unit="epoch",
            disable=None,
        ),
    )


def _show(job: Job, bar: tqdm) -> None:
    path = job.folder and job.folder / "epochs.csv"
    if path and path.exists():
        bar.update(max(0, path.read_text().count("\n") - 1 - bar.n))


def collect(jobs: list[Job]) -> pd.DataFrame:
    """One row per level of every finished run: its setting, seed and levels.csv."""
    tables = []
    for job in jobs:
        if job.finished:
            table = pd.read_csv(job.folder / "levels.csv")
            for key in (*KEYS, "seed"):
                table[key] = getattr(job.options, key)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def write_report(table: pd.DataFrame, folder: Path) -> str:
    """levels.csv, table.csv, table.md and plot.png; returns the table as Markdown."""
    write_text(folder / "levels.csv", table.to_csv(index=False))
    dense = table["er_sparse_init"] == 1  # whatever the ratio
    table = table.assign(
        density=table["requested"],
        start=table["er_sparse_method"].where(~dense, "dense"),
        start_density=table["er_sparse_init"].map("{:g}".format),
        pruning=table["pruner"] + ", rewind " + table["rewind"],
    )
    keys = ["density", "start", "pruning", "start_density"]
    means = report.summarise(table, keys, ["test_accuracy"])
    write_text(folder / "table.csv", means.to_csv(index=False))
    report.plot(means, keys, "test_accuracy", folder / "plot.png")
    cells = means.assign(
        cell=[
            f"{100 * mean:.2f}" + ("" if pd.isna(half) else f" ± {100 * half:.2f}")
            for mean, half in zip(means["test_accuracy"], means["test_accuracy_ci95"])
        ]
    )
    rows = ["pruning", "start", "start_density"]
    wide = cells.pivot(index=rows, columns="density", values="cell").fillna("")
    wide = wide.loc[list(dict.fromkeys(zip(*(cells[r] for r in rows)))), wide.columns[::-1]]
    lines = [["pruning", "start", "at density", *(f"{d:g}" for d in wide.columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[*name, *row] for name, row in zip(wide.index, wide.to_numpy())]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_text(folder / "table.md", markdown)
    return markdown


def main(argv: Sequence[str] | None = None) -> int:
    """The sweep; 1 if a run failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options = from_flags(SweepOptions, argv[:split], SweepOptions())
    options.check()
    jobs = plan(options, argv[split + 1 :])
    if options.dry_run:
        for job in jobs:
            print(shlex.join(["python", "main.py", *job.argv]))
        print(f"{len(jobs)} runs, {sum(job.epochs for job in jobs)} epochs")
        return 0
    failed = run_all(jobs, options)
    table = collect(jobs)
    if len(table):
        print(write_report(table, Path(options.result_dir)))
    for job in failed:
        print(f"error: {job.title} failed; see {job.log}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
