"""A Slurm of one machine, for tests: sbatch, srun, squeue, scontrol and scancel on the PATH.

`install` makes them. They keep the states of jobs in a folder. A job runs as soon as the limit of
its array allows. scancel --signal sends a signal to the process that srun has become.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel")


def install(folder: Path) -> Path:
    """Make the programs; the folder to put on the PATH. States lie in ``folder``/jobs.

    While there is a file ``hold`` nothing begins; a file ``end`` ends all.
    """
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in PROGRAMS:
        path = folder / "bin" / name
        words = f'exec {sys.executable} -S {__file__} {folder / "jobs"} {name} "$@"'
        path.write_text(f"#!/bin/sh\n{words}\n")
        path.chmod(0o755)
    return folder / "bin"


def sbatch(jobs: Path, script: str) -> None:
    """Submit a script as an array, whose elements a process in the background runs."""
    text = Path(script).read_text()
    if "--partition=nosuch" in text:
        print("sbatch: error: invalid partition specified: nosuch", file=sys.stderr)
        sys.exit(1)
    number = 100 + len(list(jobs.glob("*.sh")))
    (jobs / f"{number}.sh").write_text(text)
    found = re.search(r"^#SBATCH --array=0-(\d+)%(\d+)$", text, re.MULTILINE)
    last, limit = (int(found[1]), int(found[2])) if found else (0, 1)
    elements = [f"{number}_{k}" if found else str(number) for k in range(last + 1)]
    for element in elements:
        (jobs / element).write_text("PENDING")
    node = [sys.executable, "-S", __file__, str(jobs), "node", str(number), str(limit), *elements]
    nothing = subprocess.DEVNULL
    subprocess.Popen(node, start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing)
    print(f"Submitted batch job {number}")


def node(jobs: Path, number: str, limit: str, *elements: str) -> None:
    """Run the elements of an array, at most ``limit`` at once; again those that are requeued."""
    waiting, running = list(elements), {}
    while (waiting or running) and not (jobs / "end").exists():
        while waiting and len(running) < int(limit) and not (jobs / "hold").exists():
            element = waiting.pop(0)
            (jobs / element).write_text("RUNNING")
            array, _, task = element.partition("_")
            ids = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {}
            environment = os.environ | ids | {"SLURM_JOB_ID": array, "FAKE_ELEMENT": element}
            running[element] = subprocess.Popen(["bash", jobs / f"{number}.sh"], env=environment)
        time.sleep(0.05)
        for element, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[element]
            asked = jobs / f"{element}.requeue"
            if asked.exists():
                asked.unlink()
                waiting.append(element)
                (jobs / element).write_text("PENDING")
            else:
                (jobs / element).write_text("FAILED" if process.returncode else "COMPLETED")
    for element in running:
        with contextlib.suppress(OSError):
            os.kill(int((jobs / f"{element}.pid").read_text()), signal.SIGUSR2)  # ends its run


def srun(jobs: Path, *argv: str) -> None:
    """Become the command of a job, with its output in the file of --output."""
    element = os.environ["FAKE_ELEMENT"]
    (jobs / f"{element}.pid").write_text(str(os.getpid()))
    output = argv[argv.index("--output") + 1].replace("%A_%a", element).replace("%j", element)
    file = os.open(output.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    first = argv.index("-u") - 1
    os.execvp(argv[first], argv[first:])


def squeue(jobs: Path, *argv: str) -> None:
    """List what is queued or runs, as NUMBER|STATE."""
    assert "--format=%i|%T" in argv
    for path in sorted(jobs.glob("*")):
        if not path.suffix and path.name not in ("hold", "end"):
            state = path.read_text()
            if state in ("PENDING", "RUNNING"):
                print(f"{path.name}|{state}")


def scontrol(jobs: Path, verb: str, element: str) -> None:
    """Put a job back into the queue when it ends."""
    assert verb == "requeue"
    (jobs / f"{element}.requeue").touch()


def scancel(jobs: Path, option: str, element: str) -> None:
    """Send a signal: --signal=NUMBER."""
    os.kill(int((jobs / f"{element}.pid").read_text()), int(option.partition("=")[2]))


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
