"""Shared by the tests of main.py: small runs, how to compare them, the original commands."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from startsparse import checkpoint
from startsparse.data import digits
from startsparse.data.arrays import Arrays
from startsparse.trainer import Trainer

ROOT = Path(__file__).parents[1]


# STR, with the options of its configs/digits.yaml. --sparse-compute is off, because auto decides by
# timing, which can differ between runs, and these runs are compared to the bit.
# TINY is for the fixture few_images: six steps an epoch.
TINY = [
    *("--arch", "resnet20", "--width", "4", "--epochs", "2", "--batch-size", "32"),
    *("--sparse-compute", "off"),
]
MLP = [
    *("--arch", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "256"),
    *("--warmup-length", "0"),
]

# an s whose threshold prunes some weights from the first step on
SOFT = ["--sInit-value", "-3"]


TIMES = ["cpu_seconds", "seconds"]
"""Columns of epochs.csv and results.csv in which equal runs differ."""


def newest(where: Path) -> Path:
    return max((where / "runs").glob("*/*/seed-*"), key=lambda path: path.stat().st_mtime)


def weights(folder: Path, name="checkpoint.pt") -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / name)["model"]


@contextmanager
def steps() -> Iterator[list]:
    """A list that grows by one with every optimizer step inside the block."""
    taken = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    try:
        yield taken
    finally:
        hook.remove()


def same(one: Path, other: Path) -> bool:
    """Whether two runs are the same to the bit: weights, optimizer, tables, best, result."""
    equal = _same_leaves(*(_state(folder) for folder in (one, other)))
    best = [weights(folder, "best.pt") for folder in (one, other)]
    equal &= all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    for name in ("levels.csv", "topology.csv"):
        tables = [(f / name).read_bytes() if (f / name).exists() else None for f in (one, other)]
        equal &= tables[0] == tables[1]
    epochs = [pd.read_csv(f / "epochs.csv").drop(columns=TIMES) for f in (one, other)]
    results = [json.loads((f / "summary.json").read_text()) for f in (one, other)]
    for result in results:
        for name in TIMES:
            result.pop(name)
    return equal and epochs[0].equals(epochs[1]) and results[0] == results[1]


def _state(folder: Path) -> tuple:
    state = checkpoint.load(folder / "checkpoint.pt")
    return state["model"], state["optimizer"], state["best"]


def _same_leaves(one: tuple, other: tuple) -> bool:
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (one, other)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves, strict=True)
    )


class Crash(BaseException):
    """Stands for the death of the process."""


def crashing(when, count, save=Trainer.save):
    """A `Trainer.save` whose ``count``-th call raises `Crash`, before or after it saves."""
    calls = []

    def crash(trainer):
        calls.append(1)
        if when == "after" or len(calls) < count:
            save(trainer)
        if len(calls) == count:
            raise Crash

    return crash


def few_digits(train: int, test: int) -> Callable[..., Arrays]:
    """A loader of the digits, cut down to ``train`` and ``test`` images."""

    def load(*where) -> Arrays:
        arrays = digits.load(*where)
        arrays.train = tuple(tensor[:train] for tensor in arrays.train)
        arrays.test = tuple(tensor[:test] for tensor in arrays.test)
        return arrays

    return load


def original_commands():
    """The commands of the original README, word by word."""
    return {
        "random pruning": (
            "--seed 1 --resnet-type large --config configs/largescale/resnet18-cifar-str-1.yaml "
            "--threshold-list  --multigpu 0 --er-sparse-method uniform --er-sparse-init 0.2 --name "
            "cifar-imp-er-uniform-0.2 --final_prune_epoch 150 --result-dir results "
            "--warmup-epochs 0 --prune-scheduler cosine --expt-setup rml --lr 0.1"
        ),
        "soft thresholds": "--config configs/largescale/resnet18-cifar-str-3.yaml",
    }
