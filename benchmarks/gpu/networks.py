"""The networks that are measured, each in the project's training loop, on its own data path."""

import dataclasses
import time
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ER_DST.dynamic import DynamicSparse, schedule
from ER_DST.main import network as dst_network
from ER_DST.options import DSTOptions
from ER_SLT.edge_popup import set_density
from ER_SLT.main import plan, pop_up
from ER_SLT.options import SLTOptions
from startsparse import er, models, parallel, training
from startsparse.data import Batches, Shape
from startsparse.method import PLAIN, Method
from startsparse.options import Options
from STR.main import network as str_network
from STR.options import STROptions

DENSE, BARE = "DenseConv", "bare PyTorch"
POPUP = {"edge-popup per layer": False, "edge-popup global": True}  # name -> --global
DROP_AND_GROW = "drop and grow"
KINDS = ("ConvMask", DROP_AND_GROW, "STRConv", "STRConvER", *POPUP)

SHAPE = Shape(classes=10, channels=3, size=32)
NEVER = 10**9  # steps between updates


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured: `FULL` on a GPU, `TINY` in a rehearsal."""

    device: torch.device
    arch: str = "resnet18"
    width: int = 0
    batches: tuple[int, ...] = (512, 1024)
    examples: int = 48 * 1024  # whole batches of both sizes
    pairs: int = 4  # of epochs, of a network and of the dense one
    steps: int = 12  # of short measurements
    repeats: int = 7  # of those of Python's time
    backend: str = "inductor"
    workers: int = 12

    @property
    def rehearsal(self) -> bool:
        """Whether this is a rehearsal, on the CPU."""
        return self.device.type == "cpu"


def full() -> Sizes:
    """On the GPU that a run would take, set up as a run sets it up."""
    return Sizes(parallel.choose_devices("")[0])


def tiny() -> Sizes:
    """On the CPU."""
    small = {"arch": "mlp", "width": 16, "batches": (8, 16), "examples": 64}
    fast = {"pairs": 1, "steps": 3, "repeats": 1, "backend": "eager", "workers": 1}
    return Sizes(torch.device("cpu"), **small, **fast)


def network(
    kind: str, sizes: Sizes, *, every: int = NEVER, **more: object
) -> tuple[nn.Module, Options, Method]:
    """A network as the script of its ``kind`` makes it, on the device, with density 0.2.

    Args:
        every: steps between updates of drop and grow.
        more: further options of drop and grow.
    """
    own = {"arch": sizes.arch, "width": sizes.width, "epochs": 160}
    if kind in POPUP:
        options = SLTOptions(**own, global_ranking=POPUP[kind])
        model, requested = plan(options, SHAPE)
        er.attach_er_masks(model, requested, options)
        pop_up(model, options)
        set_density(model, options.sparsity)
    elif kind == DROP_AND_GROW:
        masks = {"er_sparse_method": "ERK", "er_sparse_init": 0.2, "final_density": 0.05}
        options = DSTOptions(**own, sparse=True, update_frequency=every, **{**masks, **more})
        model, *_ = dst_network(options, SimpleNamespace(shape=SHAPE), sizes.device)
        method = DynamicSparse(options, schedule(options, steps_per_epoch=100))
        return model, options, method
    else:
        options = STROptions(**own, conv_type=kind, er_sparse_method="ERK", sInit_value=-5.0)
        model, _ = str_network(options, SHAPE)
    return model.to(sizes.device).to(memory_format=torch.channels_last), options, PLAIN


def images(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 32, 32, 3] of noise, and labels."""
    draws = torch.Generator().manual_seed(0)
    shape = (sizes.examples, SHAPE.size, SHAPE.size, SHAPE.channels)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=draws)
    return pixels, torch.randint(10, (sizes.examples,), generator=draws)


def batches(sizes: Sizes, batch: int) -> Batches:
    """They are held on the device, cropped and mirrored, as those of CIFAR."""
    colours = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    where = {"batch_size": batch, "device": sizes.device, "seed": 0, "pad": 4, "flip": True}
    return Batches(*images(sizes), **colours, **where)


class First:
    """The first ``steps`` steps of each epoch."""

    def __init__(self, whole: Batches, steps: int):
        self.whole, self.steps = whole, steps
        self.examples = steps * whole.batch_size

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches."""
        return islice(self.whole.epoch(epoch, start), self.steps - start)


class Noting(training.Learner):
    """A learner that notes when its steps began, and which one is under way."""

    began: list[float]
    step: int | None = None

    def before_step(self, method: Method, step: int) -> None:
        """Note the time of the host."""
        self.began.append(time.perf_counter())
        self.step = step
        super().before_step(method, step)

    def after_step(self, method: Method, step: int) -> None:
        """Note that none is under way."""
        super().after_step(method, step)
        self.step = None


class Program:
    """One network in training, an epoch at a time."""

    def __init__(
        self, kind: str, whole: Batches, sizes: Sizes, *, compiled: bool = False, **more: object
    ):
        """Args:
        whole: its data.
        more: of `network`.
        """
        self.whole, self.sizes = whole, sizes
        self.model, options, self.method = network(kind, sizes, **more)
        forward = torch.compile(self.model, backend=sizes.backend) if compiled else self.model
        self.learner = Noting(
            self.model,
            options.make_optimizer(self.model),
            forward=forward,
            autocast=parallel.autocast(sizes.device, options.amp),
            seed=options.seed,
        )
        self.epochs = self.done = 0

    def epoch(self, steps: int | None = None) -> float:
        """Train for an epoch, or its first ``steps`` steps; returns the seconds of a step."""
        part = First(self.whole, steps or len(self.whole))
        self.learner.began = []
        sums = training.new_sums(self.sizes.device)
        synchronize(self.sizes.device)
        began = time.perf_counter()
        training.train_epoch(
            self.learner,
            part,
            lambda _: 1e-3,
            sums,
            epoch=self.epochs,
            method=self.method,
            first=self.done,
        )
        synchronize(self.sizes.device)
        self.epochs, self.done = self.epochs + 1, self.done + len(part)
        return (time.perf_counter() - began) / len(part)


class Bare:
    """The ceiling: the dense network on one batch, cuDNN free to choose, nothing else in a step."""

    def __init__(self, whole: Batches, sizes: Sizes, *, compiled: bool = False):
        self.sizes = sizes
        self.model = models.build(sizes.arch, classes=10, width=sizes.width).to(sizes.device)
        self.model.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.model, backend=sizes.backend) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, 0.9, fused=True)
        self.batch, self.steps = next(whole.epoch(0)), len(whole)

    def epoch(self, steps: int | None = None) -> float:
        """As `Program.epoch`."""
        (inputs, labels), steps = self.batch, steps or self.steps
        autocast = parallel.autocast(self.sizes.device, "auto")
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=True, benchmark=True, deterministic=False):
            synchronize(self.sizes.device)
            began = time.perf_counter()
            for _ in range(steps):
                with autocast:
                    loss = F.cross_entropy(self.forward(inputs), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            synchronize(self.sizes.device)
        return (time.perf_counter() - began) / steps


def program(kind: str, whole: Batches, sizes: Sizes, compiled: bool) -> Program | Bare:
    """The program of a line of the table."""
    if kind == BARE:
        return Bare(whole, sizes, compiled=compiled)
    return Program(kind, whole, sizes, compiled=compiled)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
