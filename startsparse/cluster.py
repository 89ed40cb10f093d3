"""Runs as jobs of a Slurm cluster, by submitit.

Beside the log of a run a file holds the number of its job, so that --status and a second sweep
know of it when the first has ended. What is queued or at work is what squeue lists.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from tqdm import tqdm

from startsparse import locks, stopping
from startsparse.atomic import write_text
from startsparse.errors import Interrupted, OptionError, UserError, reason
from startsparse.jobs import Job
from startsparse.remote import Remote

if TYPE_CHECKING:
    from startsparse.launch import LaunchOptions

_FOLDER = "submitit"  # in --log-dir: what submitit writes
_WARNING = 120  # seconds before the time limit at which Slurm warns
_TIME_LIMITS = 10**6  # how often a run may reach its limit and continue
_POLL = 10.0  # seconds between two looks at the queue
_WAITS = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}

# Parameters of sbatch that are options here, or that the sweep itself sets.
_OWN = {
    "partition": "--partition",
    "time": "--time",
    "mem": "--memory",
    "cpus-per-task": "--cpus-per-run",
    "gpus-per-node": "--gpus-per-run",
    "array": "--jobs",
}
_SET = ("signal", "output", "error", "open-mode", "requeue", "nodes", "ntasks", "ntasks-per-node")


def require() -> None:
    """Raise `OptionError` unless this machine can submit jobs."""
    if importlib.util.find_spec("submitit") is None:
        raise OptionError("--launcher: slurm needs submitit; pip install 'submitit>=1.5'")
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise OptionError(f"--launcher: slurm needs {program}, which is not on the PATH here")


def minutes(limit: str) -> int:
    """The minutes of a time limit as Slurm writes it.

    That is minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or
    days-hours:minutes:seconds.

    Raises:
        OptionError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        raise OptionError(
            f"--time: '{limit}' is no time such as 90 (minutes), 12:00:00 or 2-00:00:00"
        )
    days, *parts = (int(part or 0) for part in found.groups())
    if found[1] is None and found[4] is None:  # minutes[:seconds]
        parts = [0, *parts[:2]]
    hours, whole, seconds = parts
    total = (days * 24 + hours) * 60 + whole + -(-seconds // 60)
    if total < 5:
        raise OptionError(f"--time: {limit} should be at least 5 minutes, to begin and to save")
    return total


def sbatch(words: Sequence[str]) -> dict[str, Any]:
    """Further parameters of sbatch; a word is NAME=VALUE, or NAME for a flag.

    Raises:
        OptionError: a word is neither, or an option of its own.
    """
    parameters: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or (equals and not value):
            raise OptionError(
                f"--sbatch: '{word}' is no parameter such as account=NAME or exclusive"
            )
        if name in _OWN:
            raise OptionError(f"--sbatch: {name} is the option {_OWN[name]}")
        if name in _SET:
            raise OptionError(f"--sbatch: {name} is set by the sweep")
        if name in parameters:
            raise OptionError(f"--sbatch: {name} is named twice")
        parameters[name] = value if equals else True
    return parameters


def submit(jobs: Sequence[Job], options: "LaunchOptions") -> None:
    """Submit runs as one array of jobs, and note their numbers.

    Raises:
        UserError: sbatch refuses them.
    """
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
    queue = executor(Path(jobs[0].options.log_dir) / _FOLDER, len(jobs), options)
    processes = max(1, options.gpus_per_run)
    try:
        with queue.batch():
            numbers = [
                queue.submit(Remote(job.command(processes), os.getcwd(), str(job.log)))  # noqa: PTH109
                for job in jobs
            ]
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"sbatch: {_last_line(error)}") from None
    for job, number in zip(jobs, numbers):
        write_text(_note(job), json.dumps({"job": str(number.job_id)}) + "\n")


def executor(folder: Path, count: int, options: "LaunchOptions") -> Any:
    """The `submitit.Executor` for ``count`` runs, whose files go into ``folder``."""
    import submitit

    queue = submitit.SlurmExecutor(folder.absolute(), max_num_timeout=_TIME_LIMITS)
    more = sbatch(options.sbatch) | {"requeue": True}
    if options.memory:
        more["mem"] = options.memory
    queue.update_parameters(
        job_name="startsparse",
        partition=options.partition or None,
        time=minutes(options.time),
        gpus_per_node=options.gpus_per_run or None,
        cpus_per_task=options.cpus_per_run,
        srun_args=[f"--cpus-per-task={options.cpus_per_run}"],  # which srun does not inherit
        signal_delay_s=_WARNING,
        array_parallelism=options.jobs or count,
        stderr_to_stdout=True,
        additional_parameters=more,
    )
    return queue


def states(jobs: Sequence[Job]) -> dict[int, str]:
    """Place of a job -> "queued" or "running", for those that the cluster has.

    Raises:
        UserError: squeue fails.
    """
    numbers = {place: number for place, job in enumerate(jobs) if (number := noted(job))}
    if not numbers:
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i|%T", f"--user={os.getuid()}"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or reason(error)
        raise UserError(f"squeue: {said.strip().splitlines()[0]}; try again") from None
    rows = (line.strip().partition("|") for line in done.stdout.splitlines())
    found = {number: "queued" if state in _WAITS else "running" for number, _, state in rows}
    return {place: found[number] for place, number in numbers.items() if number in found}


def noted(job: Job) -> str:
    """The number of the last job that was submitted for a run; "": none was."""
    try:
        return str(json.loads(_note(job).read_text(encoding="utf-8"))["job"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{_note(job)}: is damaged; remove it") from None


def launch(jobs: Sequence[Job], options: "LaunchOptions") -> None:
    """Submit the runs that are neither finished nor in the queue; with --wait, wait for all.

    Raises:
        UserError: sbatch or squeue fails.
        Interrupted: a signal came while it waited; the jobs go on.
    """
    lock = Path(jobs[0].options.log_dir) / ".submit.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locks.locked(lock, "submit the same sweep", 60):
            there = states(jobs)
            new = [j for place, j in enumerate(jobs) if place not in there and not j.finished]
            if new:
                submit(new, options)
                print(f"{len(new)} runs submitted as {noted(new[0]).partition('_')[0]}", flush=True)
    except Timeout:
        raise UserError(f"{lock}: another process submits this sweep") from None
    if options.wait:
        _wait(jobs)


def _wait(jobs: Sequence[Job]) -> None:
    with stopping.StopSignal() as stop, tqdm(total=len(jobs), desc="sweep", disable=None) as bar:
        while not stop.received and (there := states(jobs)):
            bar.update(len(jobs) - len(there) - bar.n)
            until = time.monotonic() + _POLL
            while time.monotonic() < until and not stop.received:
                time.sleep(min(0.5, _POLL))
        if stop.received:
            advice = "the jobs go on, and the same command waits for them again"
            raise Interrupted(stop.received, f"stopped; {advice}")


def _note(job: Job) -> Path:
    return job.log.with_name(f".{job.log.name}.job")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "error:" in line.lower()]
    return (said or lines or [type(error).__name__])[-1]
