"""One pruning by each pruner, divided by a training step of the same network.

ResNet18 for 32x32 images, batch 128, from density 0.5 to 0.4 of its 11 million weights; synflow is
one of its 100 rounds. A round is a training step and then each pruner once; the median over rounds
is printed. Goal: at most 1 for mag on the CPU.
"""

import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.steps import OneBatch, devices, make_step
from startsparse import pruning
from startsparse.data import Shape
from startsparse.masks import keep_inside, masked_weights
from STR.main import network
from STR.options import STROptions


def make_prune(pruner: str, device: torch.device) -> Callable[[], float]:
    """A function that prunes from 0.5 to 0.4, always the same masks, and returns its seconds."""
    options = STROptions(
        arch="resnet18", conv_type="ConvMask", er_sparse_method="uniform", er_sparse_init=0.5
    )
    model, _ = network(options, Shape(classes=10, channels=3, size=32))
    model.to(device, memory_format=torch.channels_last)
    batches = OneBatch(128, device, torch.channels_last)
    entries = [(w.detach(), w.detach().clone(), m, m.clone()) for _, w, m in masked_weights(model)]
    count = round(0.4 * sum(mask.numel() for _, _, mask in masked_weights(model)))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step() -> float:
        for weight, first_weight, mask, first_mask in entries:
            weight.copy_(first_weight)
            mask.copy_(first_mask)
        keep_inside(model)
        wait()
        started = time.perf_counter()
        with patch.object(pruning, "ROUNDS", 1):
            pruning.prune(
                model,
                pruner,
                count,
                seed=1,
                level=1,
                batch=lambda: (batches.images, batches.labels),
                shape=(1, 3, 32, 32),
            )
        wait()
        return time.perf_counter() - started

    return step


def main() -> None:
    for device in devices():
        rounds = 3 if device.type == "cpu" else 50
        train = make_step("ConvMask", device)
        prunings = [make_prune(pruner, device) for pruner in pruning.PRUNERS]
        times = torch.tensor([[f() for f in (train, *prunings)] for _ in range(1 + rounds)])
        step, *mine = times[1:].T  # the first round warms up
        print(f"{'ResNet18, ' + device.type:<20} {'ms':>8} {'step ms':>9} {'ratio':>6}")
        for pruner, seconds in zip(pruning.PRUNERS, mine):
            ms, step_ms = 1e3 * seconds.median(), 1e3 * step.median()
            print(f"{pruner:<20} {ms:8.1f} {step_ms:9.1f} {(seconds / step).median():6.3f}")


if __name__ == "__main__":
    main()
