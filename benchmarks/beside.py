"""Training beside other work: the quick start next to a busy loop on each core, and runs in pairs.

First the time of the quick start's first two epochs beside busy loops over the time alone, masked
and inside the masks: with threads that spin a thousand times where they wait and then sleep, as
startsparse sets it, with threads that sleep at once, and with threads that spin as long as the
OpenMP runtime lets them where nothing is set. The last column is the time alone over that of the
last. Then the time of a sweep of eight small runs, two at the same time over one after the other.
Goals: beside at most 3 times alone; nothing is lost alone; two at a time at most 0.6. Other work on
the machine spoils all of them.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

from startsparse import threads

STR = Path(__file__).parents[1] / "STR"
QUICK = ["main.py", "--config", "configs/digits.yaml", "--epochs", "2"]
SWEEP = [
    *("run_imp.py", "--config", "configs/digits.yaml", "--seeds", *map(str, range(1, 9))),
    *("--er-sparse-inits", "0.2", "--densities", "0.1"),
]
SMALL = ["--", "--epochs", "1", "--final_prune_epoch", "1", "--sparse-compute", "off"]
# How threads wait -> what is set for it, and how often it is measured: spinning takes minutes.
SETTINGS = {
    "spin, sleep": ({}, 3),
    "sleep": ({"OMP_WAIT_POLICY": "passive"}, 3),
    "spin": ({"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}, 1),  # the runtimes' own
}


@contextmanager
def busy_cores() -> Iterator[None]:
    """Within it, a loop runs on each core."""
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop) for _ in range(threads.cores())]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def seconds(argv: list[str], setting: dict[str, str], more: list[str] = ()) -> float:
    """Of a program of STR in a process of its own, whose runs are thrown away."""
    own = (*threads.WAITING, *threads.NUMBER)
    environment = {name: value for name, value in os.environ.items() if name not in own}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *argv, "--log-dir", folder, "--result-dir", folder, *more]
        started = time.perf_counter()
        subprocess.run(
            command,
            cwd=STR,
            env=environment | setting,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - started


def quick_start(form: str) -> None:
    """Print a line for each way to wait."""
    found = {}
    for name, (setting, rounds) in SETTINGS.items():
        found[name] = []
        for _ in range(rounds):
            pair = []
            for work in (nullcontext, busy_cores):
                with work():
                    pair.append(seconds([*QUICK, "--sparse-compute", form], setting))
            found[name].append(pair)
    spinning = median(alone for alone, _ in found["spin"])
    for name, times in found.items():
        alone, beside = (median(column) for column in zip(*times))
        ratio = median(beside / alone for alone, beside in times)
        print(
            f"{form:<8} {name:<12} {alone:8.1f} {beside:8.1f} {ratio:8.2f} {alone / spinning:8.2f}",
            flush=True,
        )


def main() -> None:
    seconds([*QUICK, "--sparse-compute", "on"], {})  # the kernels are built, the files are read
    heads = f"{'alone s':>8} {'beside s':>8} {'ratio':>8} {'of spin':>8}"
    print(f"{'sparse':<8} {'threads':<12} {heads}", flush=True)
    for form in ("off", "on"):
        quick_start(form)

    print(f"\n{'sweep, s':<18} {'--jobs 1':>8} {'--jobs 2':>8} {'ratio':>8}")
    times = []
    for _ in range(2):
        times.append([seconds([*SWEEP, "--jobs", jobs], {}, SMALL) for jobs in ("1", "2")])
    one, two = (median(column) for column in zip(*times))
    ratio = median(two / one for one, two in times)
    print(f"{'':<18} {one:8.1f} {two:8.1f} {ratio:8.2f}")


if __name__ == "__main__":
    main()
