"""Two processes of `startsparse.tabular`: `python tabular_processes.py FOLDER`.

For test_tabular_split. As `processes_runs`, whose `pair` it uses.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import sklearn.datasets  # noqa: F401 - else each process imports it
import torch
from processes_runs import pair

from startsparse import plots, processes, stopping
from startsparse.tabular import batched, experiment, program, report

TINY = [
    *("--seeds", "1", "2", "--width", "8", "--epochs", "1", "--final-epochs", "1"),
    *("--starts", "1", "0.5", "--densities", "0.5", "0.2", "--reset", "no", "--batch-size", "128"),
    *("--sparse-compute", "off"),
]
TABLES = ["--tables", "breast-cancer", "digits"]
RUNS = {  # of two processes; equal to the byte to one process
    "two tables": [*TINY, *TABLES],
    "one after the other": [*TINY, "--form", "loop"],
    "few networks": [*TINY, "--form", "loop", "--starts", "1", "--seeds", "3"],
}
SPLIT = [*TINY, "--seeds", "1", "2", "3"]  # one table in two pieces: within rounding


def train(argv: list[str]) -> Callable[[Path], None]:
    """The program with these options."""

    def do(where: Path) -> None:
        stopping.watch()
        processes.run_script(lambda: program.main([*argv, "--result-dir", str(where / "out")]))

    return do


def in_rank_1(change: Callable[[], None], argv: list[str] = TINY) -> Callable[[Path], None]:
    """The program after ``change`` in one of the processes."""

    def do(where: Path) -> None:
        if os.environ["RANK"] == "1":
            change()
        train(argv)(where)

    return do


def stop() -> None:
    """The program is stopped while it trains."""
    run = experiment.run

    def stopped(*args: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return run(*args)

    experiment.run = stopped


def stop_late() -> None:
    """The program is stopped at the second density of the second table."""
    train_batched, calls = batched.LOOPS["batched"], []

    def stopped(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_batched(*args)

    batched.LOOPS["batched"] = stopped


def diverge() -> None:
    """No loss is finite."""
    evaluate = torch.nn.functional.cross_entropy
    torch.nn.functional.cross_entropy = lambda *a, **k: evaluate(*a, **k) * torch.nan


def vanish() -> None:
    """The process ends without a word."""
    experiment.run = lambda *_: os._exit(9)


BAD = {
    "option": train([*TINY, "--lr", "-1"]),
    "device": train([*TINY, "--device", "cuda:3"]),
    "table": train([*TINY, "--tables", "none.csv", "--label", "y"]),
    "held": train(TINY),
    "stopped": in_rank_1(stop),
    "diverged": in_rank_1(diverge),
    "gone": in_rank_1(vanish),
}


def main() -> None:
    """Print the exit codes of each run as JSON."""
    torch.set_num_threads(1)
    plots.save = report.accuracy_plot = lambda *_: None  # they import matplotlib
    where = Path(sys.argv[1])
    jobs = {**{n: train(a) for n, a in RUNS.items()}, "split": train(SPLIT), **BAD}
    codes = {name: pair(job, where / name) for name, job in jobs.items()}
    late = in_rank_1(stop_late, RUNS["two tables"])
    codes["stopped late"] = pair(late, where / "resumed")
    codes["resumed"] = pair(train(RUNS["two tables"]), where / "resumed")
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
