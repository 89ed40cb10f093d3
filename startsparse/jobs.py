"""The runs of a sweep as processes: how many at once, on which device, and how they are stopped."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from startsparse import finding, locks, runs, stopping, threads
from startsparse.errors import Interrupted, OptionError
from startsparse.held import BUSY
from startsparse.options import Options


@dataclasses.dataclass
class Job:
    """One run of a script. Flags are parsed before, so that bad ones show before anything runs.

    Attributes:
        module: the script, as STR.main.
        argv: its command line.
        options: what that means.
    """

    module: str
    argv: list[str]
    options: Options
    _folder: Path | None = None

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
    def name(self) -> str:
        """The name of the run, which its seeds share."""
        return self.options.name or self.options.default_name()

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.name}, seed {self.options.seed}"

    @property
    def log(self) -> Path:
        """The file of its output."""
        return Path(self.options.log_dir) / f"{self.name}-seed-{self.options.seed}.log"

    @property
    def lock(self) -> Path:
        """The file that is locked while the run is at work."""
        return self.log.with_name(f".{self.log.name}.lock")

    @property
    def epochs(self) -> int:
        """Epochs that it has done."""
        path = self.folder and self.folder / "epochs.csv"
        return path.read_bytes().count(b"\n") - 1 if path and path.exists() else 0

    def at_work(self) -> bool:
        """Whether a process of this machine does it now."""
        if not self.lock.exists():
            return False
        try:
            with locks.locked(self.lock, "run this sweep", 0):
                return False
        except Timeout:
            return True

    def command(self, processes: int = 1, device: str = "") -> list[str]:
        """The command of the process that does it, and holds `lock`.

        Args:
            processes: that share its work, by torchrun.
            device: value of --multigpu; "" for none.
        """
        words = [sys.executable, "-m", "startsparse.held", str(self.lock), str(processes)]
        more = ["--multigpu", device] if device else []
        return [*words, self.module, *self.argv, *more]


def require_distinct(jobs: Sequence[Job]) -> None:
    """Raise `OptionError` if two runs of a sweep are the same: a seed was named twice, say."""
    seen: dict[str, Job] = {}
    for job in jobs:
        first = seen.setdefault(repr({**runs.computed(job.options), "name": ""}), job)
        if first is not job:
            raise OptionError(f"the sweep has one run twice: {first.title}, and {job.title}")


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
        total=job.options.total_epochs,
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
    if job.at_work():
        return None
    with job.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            job.command(device=device),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only this process, which sends SIGTERM on
        )
    stopping.adopt(process)
    return process


def _show(job: Job, bar: tqdm) -> None:
    bar.update(max(0, job.epochs - bar.n))
