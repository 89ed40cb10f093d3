"""From the command to the first training step: CPU seconds, and those over importing torch alone.

Digits, ResNet20, one thread, a fresh process that ends after its first step; five times in turns,
medians. Kernels are built before. As it is the run also tries which layers are faster in sparse
form. Goal: at most 3 seconds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMES = 5

IMPORT = "import time, torch; print(time.process_time())"
SCRIPT = """
import sys
from startsparse import stopping
stopping.watch()
import os, time
from torch.optim import optimizer
def end(*_):
    print(time.process_time(), flush=True)
    os._exit(0)
from STR import main
optimizer.register_optimizer_step_post_hook(end)
main.main(sys.argv[1:])
"""


def seconds(program: str, options: list[str], folder: str) -> float:
    """CPU seconds until ``program`` prints them."""
    command = [sys.executable, "-c", program, *options, "--log-dir", folder, "--result-dir", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, encoding="utf-8"
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    starts: dict[str, tuple[str, list[str]]] = {
        "import torch": (IMPORT, []),
        "STR/main.py --sparse-compute off": (SCRIPT, ["--sparse-compute", "off"]),
        "STR/main.py": (SCRIPT, []),
    }
    with tempfile.TemporaryDirectory() as folder:
        for start in starts.values():  # fills caches, builds kernels
            seconds(*start, folder)
        rows = [{name: seconds(*s, folder) for name, s in starts.items()} for _ in range(TIMES)]
    print(f"{'':<34}CPU seconds   ratio")
    for name in starts:
        ratio = statistics.median(row[name] / row["import torch"] for row in rows)
        print(f"{name:<34}{statistics.median(row[name] for row in rows):>11.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
