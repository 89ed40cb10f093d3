"""The training loop's own cost: a step of a small MLP, divided by that of a bare PyTorch loop.

64 features, 100 hidden units, 10 classes, batches of 64, SGD with momentum, one thread: a step so
short that most of it is Python's. Both loops take their batches from the same shuffled rows; the
bare one has no mask, sums no loss and seeds nothing. CPU time of 50 steps, in turns; the figure is
the median of the ratios. Goal: at most 1.15.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from startsparse.data import Data, Rows, Shape
from startsparse.finding import open_run
from startsparse.masks import attach_masks, draw_masks, sparse_layers
from startsparse.models.mlp import MLP
from startsparse.phases import Phase
from startsparse.trainer import Trainer
from startsparse.training import new_sums, train_epoch
from STR.options import STROptions

CPU = torch.device("cpu")
STEPS, BATCH = 50, 64


def rows() -> Rows:
    """Training rows of as many steps as are measured at once."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(STEPS * BATCH, 64, generator=draw)
    labels = torch.randint(10, (STEPS * BATCH,), generator=draw)
    return Rows(features, labels, batch_size=BATCH, device=CPU, seed=1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the bare loop."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def bare(batches: Rows) -> Callable[[], None]:
    """An epoch of the shortest loop."""
    model = MLP(64, 10, width=100, hidden=1)
    optimizer = sgd(model)

    def epoch() -> None:
        for inputs, labels in batches.epoch(0):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def ours(batches: Rows, folder: Path, density: float) -> Callable[[], None]:
    """An epoch of the project's loop, as a script trains; ``density`` 1: without masks."""
    model = MLP(64, 10, width=100, hidden=1)
    options = STROptions(log_dir=str(folder), sparse_compute="off")
    if density < 1:
        shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
        attach_masks(model, draw_masks(shapes, [density] * len(shapes), 1, "exact"))
    data = Data(batches, batches, batches, Shape(10, 64, 1))
    trainer = Trainer(model, data, options, open_run(options), [CPU])
    phase, sums = Phase("train", 1, "constant"), new_sums(CPU)

    def epoch() -> None:
        train_epoch(
            trainer, batches, lambda _: 0.01, sums, epoch=0, method=phase.method, title="train"
        )

    return epoch


def cpu_seconds(run: Callable[[], None]) -> float:
    """Of one call."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def main() -> None:
    torch.set_num_threads(1)
    batches = rows()
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"dense": 1.0, "mask of 0.2": 0.2}
        loops = {name: ours(batches, Path(folder), density) for name, density in kinds.items()}
        loops = {"bare": bare(batches), "bare again": bare(batches), **loops}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(103):
            for name, loop in loops.items():
                seconds = cpu_seconds(loop) / STEPS
                if turn > 2:
                    times[name].append(seconds)
    table = {name: torch.tensor(values, dtype=torch.float64) for name, values in times.items()}
    print(f"{'':<20} {'us':>6} {'ratio':>6}")
    for name, values in table.items():
        ratio = (values / table["bare"]).median().item()
        print(f"{name:<20} {1e6 * values.median().item():6.0f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
