"""How the runs of a sweep are started: here as processes, or on a cluster as jobs."""

import dataclasses
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, TypeVar

from startsparse import cluster, effects, processes
from startsparse import jobs as local
from startsparse.commandline import from_flags, named
from startsparse.errors import OptionError, say
from startsparse.fields import Condition, choice, counts, default_is
from startsparse.jobs import Job
from startsparse.options import require_gpus, require_range

LAUNCHERS = ("local", "slurm")

SLURM = Condition(lambda o: o.launcher == "slurm", "without --launcher slurm")
LOCAL = Condition(lambda o: o.launcher == "local", "with --launcher slurm; see --gpus-per-run")


@dataclasses.dataclass
class LaunchOptions:
    """The options of every sweep."""

    jobs: Annotated[int | None, default_is("one for each of --devices; with slurm, all")] = None
    """Runs at the same time; as processes they share the cores, unless OMP_NUM_THREADS is set"""
    devices: Annotated[str, default_is("the first GPU, if there is one"), counts(LOCAL)] = ""
    """GPUs, as in 0,1; runs at the same time take them in turn, one each"""
    dry_run: bool = False
    """Print the commands and the total number of epochs, and stop"""
    status: bool = False
    """Print how far each run is, and stop"""
    launcher: Annotated[str, choice(LAUNCHERS)] = "local"
    """local: each run is a process of this machine; slurm: a job of a Slurm cluster, by submitit"""
    partition: Annotated[str, default_is("the cluster's"), counts(SLURM)] = ""
    """Partition of the jobs"""
    time: Annotated[str, counts(SLURM)] = "24:00:00"
    """Time limit of a job, as in 90 (minutes), 12:00:00 or 2-00:00:00; a run that reaches it
    saves a checkpoint, goes back into the queue, and continues"""
    gpus_per_run: Annotated[int, counts(SLURM)] = 1
    """GPUs of each run; several are one process each, as of torchrun (0: none)"""
    cpus_per_run: Annotated[int, counts(SLURM)] = 4
    """CPU cores of each run"""
    memory: Annotated[str, default_is("the cluster's"), counts(SLURM)] = ""
    """Memory of each run, as in 32G"""
    sbatch: Annotated[tuple[str, ...], default_is("none"), counts(SLURM)] = ()
    """Further parameters of sbatch, as in account=NAME qos=low exclusive"""
    wait: Annotated[bool, counts(SLURM)] = False
    """Wait until all jobs have ended"""

    @property
    def at_once(self) -> int:
        """Runs at the same time, as processes."""
        return self.devices.count(",") + 1 if self.jobs is None else self.jobs

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        if processes.world_size() > 1:
            raise OptionError("torchrun: is for main.py; a sweep starts its own runs, see --jobs")
        require_gpus(self, "devices")
        if self.jobs is not None:
            require_range(self, "jobs", low=1)
        gpus = self.devices.count(",") + 1
        if self.at_once < gpus:
            raise OptionError(
                f"--jobs: {self.jobs} uses only some of --devices {self.devices}; give at least "
                f"{gpus}, or fewer devices"
            )
        require_range(self, "gpus_per_run", low=0)
        require_range(self, "cpus_per_run", low=1)
        if not re.fullmatch(r"(\d+[KMGT]B?)?", self.memory):
            raise OptionError(f"--memory: '{self.memory}' is no amount such as 32G")
        cluster.minutes(self.time)
        cluster.sbatch(self.sbatch)
        if self.launcher == "slurm" and not self.dry_run:
            cluster.require()


L = TypeVar("L", bound=LaunchOptions)  # of a sweep


def read(kind: type[L], argv: Sequence[str] | None = None) -> tuple[L, list[str]]:
    """The options of a sweep, checked, and the flags of its runs, which follow ``--``.

    Args:
        kind: of the options.
        argv: the command line (default: this program's).

    Raises:
        OptionError: with one line that names the option.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options = from_flags(kind, words[:split], kind())
    effects.refuse_named(options, named(kind, words[:split]))
    options.check()
    return options, words[split + 1 :]


def say_failed(jobs: Sequence[Job]) -> int:
    """Say where the output of runs that failed is; the exit code of the sweep."""
    for job in jobs:
        say(f"error: {job.title} failed; see {job.log}")
    return 1 if jobs else 0


def launch(jobs: Sequence[Job], options: LaunchOptions) -> list[Job]:
    """Start the runs that are not finished; return those that failed.

    As processes, all have ended then. As jobs of a cluster they may still be queued or at work,
    and a line says so.

    Raises:
        UserError: the cluster refuses the jobs.
        Interrupted: a signal came.
    """
    if options.launcher == "local":
        return local.run_all(list(jobs), options.at_once, options.devices.split(","))
    cluster.launch(jobs, options)
    there = cluster.states(jobs)
    if there:
        print(f"{len(there)} of {len(jobs)} runs are queued or at work; --status shows them, and "
              "the same command shows the table when all have ended")  # fmt: skip
        return []
    return [job for job in jobs if not job.finished]


def show(jobs: Sequence[Job], options: LaunchOptions, script: Sequence[str]) -> bool:
    """Print what --dry-run or --status asks for; whether one of them was given.

    Args:
        script: how a command line of Python names the script.
    """
    if options.dry_run:
        for job in jobs:
            print(shlex.join(["python", *script, *job.argv]))
        print(f"{len(jobs)} runs, {sum(job.options.total_epochs for job in jobs)} epochs")
    elif options.status:
        print(status(jobs, options))
    return options.dry_run or options.status


def state(job: Job) -> str:
    """How a run stands that no cluster has."""
    if job.finished:
        return "finished"
    if job.at_work():
        return "running"
    last = _last_line(job)
    if last.startswith("error: ") and "stopped" not in last:
        return "failed"
    if job.folder:
        return "stopped"
    return "failed" if cluster.noted(job) else "waiting"


def status(jobs: Sequence[Job], options: LaunchOptions) -> str:
    """A line for each run, with its state and epochs, and how many there are of each state."""
    there = cluster.states(jobs) if options.launcher == "slurm" else {}
    rows = [("state", "epochs", "run")]
    for place, job in enumerate(jobs):
        now = "finished" if job.finished else there.get(place) or state(job)
        rows.append((now, f"{job.epochs}/{job.options.total_epochs}", job.title))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{now:<{widths[0]}}  {done:>{widths[1]}}  {title}" for now, done, title in rows]
    numbers = Counter(now for now, _, _ in rows[1:])
    return "\n".join([*lines, ", ".join(f"{count} {now}" for now, count in numbers.items())])


def _last_line(job: Job) -> str:
    try:
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
