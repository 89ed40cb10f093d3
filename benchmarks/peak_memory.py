"""Peak memory of a training step of each kind of layer, divided by the dense step's.

ResNet18 for 32x32 images, batch 128. On the CPU each kind has its own process, and the figure is
the peak of what steps add to resident memory; on a GPU it is the allocator's peak. Goal: at most
1.1.
"""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.steps import CONV_TYPES, devices, make_step


def peak(kind: str, device: torch.device) -> float:
    """Peak memory in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(kind, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2**10


def main() -> None:
    for device in devices():
        print(f"{'ResNet18, ' + device.type:<20} {'MiB':>8} {'ratio':>6}")
        dense = None
        for kind in CONV_TYPES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
                mine = own_process.submit(peak, kind, device).result()
            dense = dense or mine
            print(f"{kind:<20} {mine:8.0f} {mine / dense:6.3f}", flush=True)


if __name__ == "__main__":
    main()
