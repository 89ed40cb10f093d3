"""Training beside other work: the quick start next to a busy loop on each core, and runs in pairs.

First, the time of the quick start's first two epochs beside busy loops, over the time alone, with
masked and with sparse compute. Waiting threads either spin a thousand times and then sleep, which
startsparse sets, or sleep at once, or spin as long as the OpenMP runtime does by default. The last
column is the time alone over that of the third way. Then, the time of a sweep of eight small runs,
two at the same time over one after the other. Goals: beside at most 3 times alone; nothing is lost
alone; two at a time at most 0.6. Other work on the machine spoils all of these.
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
# How threads wait -> environment variables, and number of measurements: spinning takes minutes.
SETTINGS = {
    "spin, sleep": ({}, 3),
    "sleep": ({"OMP_WAIT_POLICY": "passive"}, 3),
    "spin": ({"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}, 1),  # the runtimes' defaults
}


@contextmanager
def busy_cores() -> Iterator[None]:
    """Run a busy loop on each core inside the block."""
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop) for _ in range(threads.cores())]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def seconds(argv: list[str], setting: dict[str, str], more: list[str] = ()) -> float:
    """Time of a program of STR in its own process; its runs are deleted."""
    unset = (*threads.WAITING, *threads.NUMBER)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
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
    pairs = {}
    for name, (setting, rounds) in SETTINGS.items():
        pairs[name] = []
        for _ in range(rounds):
            pair = []
            for work in (nullcontext, busy_cores):
                with work():
                    pair.append(seconds([*QUICK, "--sparse-compute", form], setting))
            pairs[name].append(pair)
    spinning = median(alone for alone, _ in pairs["spin"])
    for name, times in pairs.items():
        alone, beside = (median(column) for column in zip(*times))
        ratio = median(beside / alone for alone, beside in times)
        print(
            f"{form:<8} {name:<12} {alone:8.1f} {beside:8.1f} {ratio:8.2f} {alone / spinning:8.2f}",
            flush=True,
        )


def main() -> None:
    seconds([*QUICK, "--sparse-compute", "on"], {})  # warm-up: builds the kernels, reads the files
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
