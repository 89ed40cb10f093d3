"""Dense training step in channels_last, divided by the same step in PyTorch's default layout.

Batch 128, 32x32 images, on the CPU. Below 1, the project's choice, channels_last, is the faster.
Then the product of all gradients with masks that lie in memory as they do, divided by the same with
masks in the default layout.
"""

import time
from collections.abc import Callable

import torch

from benchmarks.steps import interleaved, make_step
from startsparse import models
from startsparse.masks import mask_gradients, sparse_layers


def make_product(arch: str, masks_format: torch.memory_format) -> Callable[[], float]:
    """A function that multiplies the gradients by masks, and returns its seconds."""
    layers = sparse_layers(models.build(arch, classes=10)).values()
    conv = [layer.weight.shape for layer in layers if layer.weight.dim() == 4]
    gradients = [torch.randn(s).to(memory_format=torch.channels_last) for s in conv]
    masks = [(torch.rand(s) < 0.1).to(memory_format=masks_format) for s in conv]

    def product() -> float:
        started = time.perf_counter()
        mask_gradients(gradients, masks)
        return time.perf_counter() - started

    return product


def main() -> None:
    cpu = torch.device("cpu")
    print(f"{'network':<20} {'ms':>8} {'default ms':>10} {'ratio':>6}")
    for arch, pairs in (("resnet18", 7), ("vgg16", 7), ("resnet20", 15)):
        last = make_step("DenseConv", cpu, arch=arch)
        default = make_step("DenseConv", cpu, arch=arch, memory_format=torch.contiguous_format)
        mine, base, ratio = interleaved(last, default, pairs)
        print(f"{arch:<20} {1e3 * mine:8.1f} {1e3 * base:10.1f} {ratio:6.3f}", flush=True)
    for arch in ("resnet18", "vgg16", "resnet20"):
        alike, default = (
            make_product(arch, form) for form in (torch.channels_last, torch.contiguous_format)
        )
        mine, base, ratio = interleaved(alike, default, pairs=15, in_a_row=5)
        name = f"{arch}, masks"
        print(f"{name:<20} {1e3 * mine:8.2f} {1e3 * base:10.2f} {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    main()
