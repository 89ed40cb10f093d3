"""Images per second from `Batches`: crop, flip, normalise, channels_last.

50,000 random images of 32 x 32 x 3 (the size of CIFAR) in batches of 128, as training and as
evaluation batches, on the CPU and, if there is one, on a CUDA device. A figure is the best of three
passes over 200 steps. Nothing else is done with a batch, so this is an upper bound on the speed of
training; other work on the machine lowers it.

Two idle cores of a cloud machine, PyTorch 2.15: 330,000 in training, 1,270,000 in evaluation.

    python -m benchmarks.input_pipeline
"""

import time
from itertools import islice

import torch

from startsparse.data import Batches

EXAMPLES = 50_000
BATCH_SIZE = 128
STEPS = 200
PASSES = 3


def images_per_second(batches: Batches) -> float:
    """The best of `PASSES` passes, each over the first `STEPS` steps of an epoch."""
    best = 0.0
    for epoch in range(PASSES + 1):  # epoch 0 warms up
        steps = batches.epoch(epoch)
        next(steps)  # draws the random numbers of all steps of the epoch
        if batches.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        images = sum(len(labels) for _, labels in islice(steps, STEPS))
        if batches.device.type == "cuda":
            torch.cuda.synchronize()
        if epoch > 0:
            best = max(best, images / (time.perf_counter() - began))
    return best


def main() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (EXAMPLES, 32, 32, 3), dtype=torch.uint8, generator=draws)
    labels = torch.randint(10, (EXAMPLES,), generator=draws)
    shared = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": BATCH_SIZE}
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    print(f"images/s at batch {BATCH_SIZE}; {torch.get_num_threads()} CPU threads")
    print(f"{'device':<8}{'training':>12}{'evaluation':>12}")
    for name in names:
        device = torch.device(name)
        train = Batches(images, labels, **shared, device=device, seed=0, pad=4, flip=True)
        test = Batches(images, labels, **shared, device=device)
        speeds = [images_per_second(train), images_per_second(test)]
        print(f"{name:<8}" + "".join(f"{speed:>12,.0f}" for speed in speeds))


if __name__ == "__main__":
    main()
