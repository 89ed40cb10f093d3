"""The runs of a sweep as processes: how many at once, on which device, and how they are stopped."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from startsparse import finding, locks, runs, stopping, threads
from startsparse.errors import Interrupted
from STR.held import BUSY
from STR.options import STROptions

HELD = Path(__file__).with_name("held.py")


@dataclasses.dataclass
class Job:
    """One run of main.py. Flags are parsed here, so that bad ones show before anything runs."""

    argv: list[str]
    options: STROptions
    _folder: Path | None = None

    @property
    def epochs(self) -> int:
        """Total number of epochs."""
        options = self.options
        pruning = len(options.threshold_list) * options.final_prune_epoch
        return options.warmup_epochs + pruning + options.epochs

    @property
    def folder(self) -> Path | None:
        """Run folder; None until the run begins."""
        self._folder = self._folder or finding.find_run_by_rank_0(self.options)
        return self._folder

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return self.folder is not None and runs.summary(self.folder) is not None

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.options.name}, seed {self.options.seed}"

    @property
    def log(self) -> Path:
        """The file of its output."""
        return Path(self.options.log_dir) / f"{self.options.name}-seed-{self.options.seed}.log"


@dataclasses.dataclass
class Running:
    """A job in a slot; ``process`` is None while another sweep runs the job."""

    job: Job
    bar: tqdm
    process: subprocess.Popen | None = None


def run_all(jobs: list[Job], at_once: int, devices: list[str]) -> list[Job]:
    """Run the jobs that are not finished; return those that fail. Runs share the cores.

    Children stop with this process. If it is killed and cannot stop them, they go on, and the next
    sweep waits for them to end. A second signal ends the children at once, too.

    Args:
        at_once: runs at the same time.
        devices: values of --multigpu, "" for none; the slots take them in turn.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the children have stopped and can be resumed.
    """
    waiting, failed = [job for job in jobs if not job.finished], []
    slots, environment = (devices * at_once)[:at_once], shared_cores(at_once)
    running: dict[int, Running] = {}
    with stopping.StopSignal() as stop:
        sweep = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="sweep", disable=None)
        try:
            while (waiting or running) and not stop.received:
                for slot in range(at_once):
                    if slot not in running and waiting:
                        job = waiting.pop(0)
                        running[slot] = _start(job, slots[slot], environment, position=slot + 1)
                time.sleep(0.5)
                for slot, run in list(running.items()):
                    code = _exit_code(run, slots[slot], environment)
                    if code is not None:
                        del running[slot]
                        sweep.update()
                        if code:
                            failed.append(run.job)
        finally:
            _stop(running.values())
            sweep.close()
        if stop.received:
            advice = "the same command continues where the runs were"
            raise Interrupted(stop.received, f"stopped; {advice}")
    return failed


def _exit_code(run: Running, device: str, environment: dict[str, str]) -> int | None:
    """Show the epochs of a run; its exit code once it ends. Launch it if another sweep ran it."""
    _show(run.job, run.bar)
    if run.process is None:
        run.process = _launch(run.job, device, environment)
        return None
    code = run.process.poll()
    if code == BUSY:  # another sweep was a moment faster
        run.process = None
        return None
    if code is not None:
        run.bar.close()
        tqdm.write(f"{run.job.title}: {'failed' if code else 'finished'}")
    return code


def _stop(running: Collection[Running]) -> None:
    """Stop the processes of all jobs and wait for their ends."""
    children = [run.process for run in running if run.process]
    for process in children:
        process.terminate()  # saves its checkpoint
    for process in children:
        process.wait()
    for run in running:
        run.bar.close()


def shared_cores(at_once: int) -> dict[str, str]:
    """The environment that gives each of ``at_once`` runs an equal number of cores, at least one.

    It is that of this process if the user has set the number of threads, or a run is alone.
    """
    if at_once == 1 or threads.number_is_given():
        return dict(os.environ)
    return os.environ | {"OMP_NUM_THREADS": str(max(1, threads.cores() // at_once))}


def _start(job: Job, device: str, environment: dict[str, str], position: int) -> Running:
    bar = tqdm(
        total=job.epochs,
        desc=job.title,
        position=position,
        leave=False,
        unit="epoch",
        disable=None,
    )
    process = _launch(job, device, environment)
    if process is None:
        tqdm.write(f"{job.title}: runs in another sweep already; waiting for it to end")
    return Running(job, bar, process)


def _launch(job: Job, device: str, environment: dict[str, str]) -> subprocess.Popen | None:
    """The process of a job; None while another sweep runs the job."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    lock = job.log.with_name(f".{job.log.name}.lock")
    command = [sys.executable, str(HELD), str(lock), *job.argv]
    command += ["--multigpu", device] if device else []
    try:
        with locks.locked(lock, "run this sweep", 0):
            pass
    except Timeout:
        return None
    with job.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only this process, which sends SIGTERM on
        )
    stopping.adopt(process)
    return process


def _show(job: Job, bar: tqdm) -> None:
    path = job.folder and job.folder / "epochs.csv"
    if path and path.exists():
        bar.update(max(0, path.read_bytes().count(b"\n") - 1 - bar.n))
