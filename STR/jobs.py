"""The runs of a sweep as processes: how many at once, on which device, and how they are stopped."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from startsparse import runs, threads
from startsparse.errors import UserError
from STR.held import BUSY
from STR.options import STROptions

HELD = Path(__file__).with_name("held.py")


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
        self.found = self.found or runs.find_run_by_rank_0(self.options)
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


@dataclasses.dataclass
class Running:
    """A job that has its turn; ``process`` is None while another process has the run."""

    job: Job
    bar: tqdm
    process: subprocess.Popen | None = None


def run_all(jobs: list[Job], at_once: int, devices: list[str]) -> list[Job]:
    """Run what is not finished; returns what failed. Children are stopped with this process.

    Where it is killed and cannot stop them they go on; the next sweep waits for them to end. Runs
    at the same time share the cores.

    Args:
        at_once: runs at the same time.
        devices: values of --multigpu, "" for none, that they have in turns.

    Raises:
        UserError: SIGINT, SIGTERM or SIGHUP came; the children have stopped and can be resumed.
    """
    waiting, failed = [job for job in jobs if not job.finished], []
    slots, environment = (devices * at_once)[:at_once], shared_cores(at_once)
    running: dict[int, Running] = {}
    stopped: list[int] = []
    signals = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # the terminal is gone; Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
        signals.append(hangup)
    handlers = {
        signum: signal.signal(signum, lambda number, _frame: stopped.append(number))
        for signum in signals
    }
    sweep = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="sweep", disable=None)
    try:
        while (waiting or running) and not stopped:
            for slot in range(at_once):
                if slot not in running and waiting:
                    job = waiting.pop(0)
                    running[slot] = _start(job, slots[slot], environment, position=slot + 1)
            time.sleep(0.5)
            for slot, run in list(running.items()):
                _show(run.job, run.bar)
                if run.process is None:
                    run.process = _launch(run.job, slots[slot], environment)
                elif (code := run.process.poll()) == BUSY:  # another sweep was a moment faster
                    run.process = None
                elif code is not None:
                    del running[slot]
                    run.bar.close()
                    sweep.update()
                    how = "failed" if run.process.returncode else "finished"
                    tqdm.write(f"{run.job.title}: {how}")
                    if run.process.returncode:
                        failed.append(run.job)
    finally:
        children = [run.process for run in running.values() if run.process]
        for process in children:
            process.terminate()  # saves its checkpoint
        for process in children:
            process.wait()
        for run in running.values():
            run.bar.close()
        sweep.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if stopped:
        error = UserError("stopped; the same command continues where the runs were")
        error.exit_code = 128 + stopped[0]
        raise error
    return failed


def shared_cores(at_once: int) -> dict[str, str]:
    """The environment in which each of ``at_once`` runs has its share of the cores, at least one.

    Where the user has said how many threads there are, or a run is alone, it is this process's.
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
        tqdm.write(f"{job.title}: goes on in a process of another sweep; waiting for its end")
    return Running(job, bar, process)


def _launch(job: Job, device: str, environment: dict[str, str]) -> subprocess.Popen | None:
    """The process of a job; None while another process has it."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    lock = str(job.log.with_name(f".{job.log.name}.lock"))
    command = [sys.executable, str(HELD), lock, *job.argv]
    command += ["--multigpu", device] if device else []
    try:
        with FileLock(lock, timeout=0):
            pass
    except Timeout:
        return None
    with job.log.open("a") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes here, and is passed on as SIGTERM
        )


def _show(job: Job, bar: tqdm) -> None:
    path = job.folder and job.folder / "epochs.csv"
    if path and path.exists():
        bar.update(max(0, path.read_text().count("\n") - 1 - bar.n))
