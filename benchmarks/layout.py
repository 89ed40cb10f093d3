"""Dense training step in channels_last, divided by the same step in PyTorch's default layout.

Batch 128, 32x32 images, on the CPU. Below 1, the project's choice, channels_last, is the faster.
"""

import torch

from benchmarks.steps import interleaved, make_step


def main() -> None:
    cpu = torch.device("cpu")
    print(f"{'network':<20} {'ms':>8} {'default ms':>10} {'ratio':>6}")
    for arch, pairs in (("resnet18", 7), ("vgg16", 7), ("resnet20", 15)):
        last = make_step("DenseConv", cpu, arch=arch)
        default = make_step("DenseConv", cpu, arch=arch, memory_format=torch.contiguous_format)
        mine, base, ratio = interleaved(last, default, pairs)
        print(f"{arch:<20} {1e3 * mine:8.1f} {1e3 * base:10.1f} {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    main()
