"""Training step of edge-popup, divided by that of the same network with frozen, dense weights.

ResNet18 for 32x32 images, batch 128, a random mask of density 0.5 and a ticket of 0.2. The base
also computes gradients of its weights, and has the same optimizer with a learning rate of 0. Goals:
at most 1.10 on the CPU, and 1.15 on a GPU, where both are compiled.
"""

from collections.abc import Callable

import torch

from benchmarks.steps import devices, interleaved, timed_step
from ER_SLT.edge_popup import RANKINGS, set_density
from ER_SLT.main import plan, pop_up
from ER_SLT.options import SLTOptions
from startsparse import er, models
from startsparse.data import Shape


def popup_step(ranking: str, device: torch.device) -> Callable[[], float]:
    """The step in which scores learn."""
    options = SLTOptions(arch="resnet18", global_ranking=ranking == "global")
    model, requested = plan(options, Shape(classes=10, channels=3, size=32))
    er.attach_er_masks(model, requested, options)
    pop_up(model, options)
    set_density(model, options.sparsity)
    return timed_step(model, options, device, compiled=device.type == "cuda")


def frozen_step(device: torch.device) -> Callable[[], float]:
    """The step in which nothing learns."""
    model = models.build("resnet18", classes=10)
    return timed_step(model, SLTOptions(), device, lr=0.0, compiled=device.type == "cuda")


def main() -> None:
    for device in devices():
        pairs = 9 if device.type == "cpu" else 200
        base = frozen_step(device)
        print(f"{'ResNet18, ' + device.type:<20} {'ms':>8} {'base ms':>9} {'ratio':>6}")
        programs = {"the base itself": frozen_step(device)}
        programs |= {f"{r} ranking": popup_step(r, device) for r in RANKINGS}
        for name, step in programs.items():
            mine, other, ratio = interleaved(step, base, pairs)
            print(f"{name:<20} {1e3 * mine:8.1f} {1e3 * other:9.1f} {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    main()
