"""One pruning by each pruner, divided by a training step of the same network.

ResNet18 for 32x32 images, batch 128, from density 0.5 to 0.4 of its 11 million weights. synflow
takes 100 rounds, and one; mask-ref reads its masks from a file. A round of measurements is a
training step and then each pruner once; figures are medians. Goal: at most 1 for mag on the CPU.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.steps import OneBatch, devices, make_step, random_images
from startsparse import checkpoint, pruning
from startsparse.data import Shape
from startsparse.masks import keep_inside, masked_weights
from STR.iterative import reference_masks, take_masks
from STR.main import network
from STR.options import STROptions

ONE_ROUND, MASK_REF = "synflow, one round", "mask-ref"
PROGRAMS = (*pruning.PRUNERS, ONE_ROUND, MASK_REF)


def half_dense() -> nn.Module:
    """The network at density 0.5."""
    options = STROptions(
        arch="resnet18", conv_type="ConvMask", er_sparse_method="uniform", er_sparse_init=0.5
    )
    return network(options, Shape(classes=10, channels=3, size=32))[0]


def goal(model: nn.Module) -> int:
    """Its weights at density 0.4."""
    return round(0.4 * sum(mask.numel() for _, _, mask in masked_weights(model)))


def make_prune(program: str, device: torch.device, reference: Path) -> Callable[[], float]:
    """A function that prunes the same masks from 0.5 to 0.4 each time, and returns its seconds."""
    model = half_dense()
    model.to(device, memory_format=torch.channels_last)
    batches = OneBatch(random_images(128, device, torch.channels_last))
    entries = [(w.detach(), w.detach().clone(), m, m.clone()) for _, w, m in masked_weights(model)]
    count = goal(model)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def prune() -> None:
        if program == MASK_REF:
            take_masks(model, reference_masks(reference, level=1))
            return
        with patch.object(pruning, "ROUNDS", 1 if program == ONE_ROUND else pruning.ROUNDS):
            pruning.prune(
                model,
                program.partition(",")[0],
                count,
                seed=1,
                level=1,
                batch=lambda: (batches.images, batches.labels),
                shape=(1, 3, 32, 32),
            )

    def step() -> float:
        for weight, first_weight, mask, first_mask in entries:
            weight.copy_(first_weight)
            mask.copy_(first_mask)
        keep_inside(model)
        wait()
        started = time.perf_counter()
        prune()
        wait()
        return time.perf_counter() - started

    return step


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder)
        model = half_dense()
        pruning.prune(model, "mag", goal(model), seed=1, level=1)
        checkpoint.save_by_rank_0(reference / "levels/level-1.pt", {"model": model.state_dict()})
        for device in devices():
            rounds = 3 if device.type == "cpu" else 50
            train = make_step("ConvMask", device)
            prunings = [make_prune(program, device, reference) for program in PROGRAMS]
            times = torch.tensor([[f() for f in (train, *prunings)] for _ in range(1 + rounds)])
            step, *mine = times[1:].T  # the first round warms up
            print(f"{'ResNet18, ' + device.type:<20} {'ms':>8} {'step ms':>9} {'ratio':>6}")
            for program, seconds in zip(PROGRAMS, mine):
                ms, step_ms = 1e3 * seconds.median(), 1e3 * step.median()
                print(f"{program:<20} {ms:8.1f} {step_ms:9.1f} {(seconds / step).median():6.3f}")


if __name__ == "__main__":
    main()
