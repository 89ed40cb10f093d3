"""Training steps to measure: STR's networks in the project's own training loop."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from startsparse import parallel, training
from startsparse.data import Shape
from startsparse.method import PLAIN, Method
from startsparse.options import Options
from STR.main import network
from STR.options import CONV_TYPES, STROptions

__all__ = [
    "CONV_TYPES",
    "OneBatch",
    "devices",
    "interleaved",
    "loop_step",
    "make_step",
    "random_images",
    "timed_step",
]


def random_images(
    size: int, device: torch.device, memory_format: torch.memory_format, shape: tuple = (3, 32, 32)
) -> Tensor:
    """A batch of noise, the same in each call."""
    images = torch.randn(size, *shape, generator=torch.Generator().manual_seed(1))
    return images.to(device, memory_format=memory_format)


class OneBatch:
    """An epoch of one batch, on the device of its images."""

    def __init__(self, images: Tensor):
        self.images = images
        self.labels = torch.arange(len(images), device=images.device) % 10

    def __len__(self) -> int:
        return 1

    def epoch(self, _epoch: int, _start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch."""
        yield self.images, self.labels


def devices() -> list[torch.device]:
    """The CPU, and the first GPU if there is one."""
    cpu = torch.device("cpu")
    return [cpu, torch.device("cuda", 0)] if torch.cuda.is_available() else [cpu]


def make_step(
    conv_type: str,
    device: torch.device,
    *,
    arch: str = "resnet18",
    batch: int = 128,
    memory_format: torch.memory_format = torch.channels_last,
) -> Callable[[], float]:
    """A function that does one training step, with optimizer, and returns its seconds."""
    options = STROptions(
        arch=arch, conv_type=conv_type, er_sparse_method="uniform", sInit_value=-5.0
    )
    model, _ = network(options, Shape(classes=10, channels=3, size=32))
    return timed_step(model, options, device, batch=batch, memory_format=memory_format)


def timed_step(
    model: nn.Module,
    options: Options,
    device: torch.device,
    *,
    batch: int = 128,
    memory_format: torch.memory_format = torch.channels_last,
    lr: float = 1e-3,
    compiled: bool = False,
    method: Method = PLAIN,
) -> Callable[[], float]:
    """A function that does one training step of ``model``, and returns its seconds."""
    model.to(device, memory_format=memory_format)
    batches = OneBatch(random_images(batch, device, memory_format))
    learner = training.Learner(
        model,
        options.make_optimizer(model),
        forward=torch.compile(model) if compiled else model,
        autocast=parallel.autocast(device, "auto"),
    )
    return loop_step(learner, batches, lr=lr, method=method)


def loop_step(
    learner: training.Learner,
    batches: OneBatch,
    *,
    lr: float = 1e-3,
    method: Method = PLAIN,
) -> Callable[[], float]:
    """A function that does one step of the training loop, and returns its seconds."""
    device = batches.images.device

    def step() -> float:
        sums = training.new_sums(device)
        started = time.perf_counter()
        # At its end train_epoch reads the sums, which waits for the device.
        training.train_epoch(learner, batches, lambda _: lr, sums, epoch=0, method=method)
        return time.perf_counter() - started

    return step


def interleaved(
    one: Callable[[], float],
    other: Callable[[], float],
    pairs: int,
    in_a_row: int = 1,
    warm_up: int = 2,
) -> tuple[float, float, float]:
    """Median seconds of both, and median of ``one`` / ``other`` over pairs run back to back.

    A measurement is the mean of ``in_a_row`` runs. As in training, a short step then finds in the
    caches what the step before it has left there.
    """

    def pair() -> tuple[float, ...]:
        return tuple(sum(run() for _ in range(in_a_row)) / in_a_row for run in (one, other))

    for _ in range(warm_up):
        pair()
    times = torch.tensor([pair() for _ in range(pairs)], dtype=torch.float64)
    ratio = (times[:, 0] / times[:, 1]).median()
    return times[:, 0].median().item(), times[:, 1].median().item(), ratio.item()
