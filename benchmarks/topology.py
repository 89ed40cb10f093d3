"""One update of the masks, and an ordinary step of ER_DST, divided by its dense training step.

VGG16 for 32x32 images (14.7 million weights), batch 128. The update is GraNet's, from density
0.0102 to 0.01: global pruning, then drop and grow of half of the weights in every layer, with and
without flow preservation. An ordinary step moves no mask; growth by momentum sums up the gradients
in it. A round is a dense step, an ordinary step and an update of each kind; figures are medians
over rounds. Peak memory is that of training steps with an update in each, over dense ones. Goals:
update at most 0.5 on the CPU and 2 on a GPU; ordinary step at most 1.02; memory at most 1.15.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.steps import OneBatch, devices, random_images, timed_step
from ER_DST.dynamic import DynamicSparse, move, remember, schedule
from ER_DST.main import network
from ER_DST.options import DSTOptions
from ER_DST.topology import GROWTH, Change, add_to_momentum
from startsparse import flow, models, parallel, training
from startsparse.data import Shape
from startsparse.masks import attach_masks, draw_masks, masked_weights, sparse_layers
from startsparse.method import PLAIN, Method


def make_step(growth: str, device: torch.device) -> Callable[[], float]:
    """A function that does one step without an update and returns its seconds; "" is dense."""
    options = DSTOptions(
        arch="vgg16",
        sparse=bool(growth),
        growth=growth or "gradient",
        er_sparse_method="uniform",
        er_sparse_init=0.01,
        final_density=0.01,
    )
    shape = SimpleNamespace(shape=Shape(classes=10, channels=3, size=32))
    model, *_ = network(options, shape, device)
    method = DynamicSparse(options, schedule(options, 1000)) if growth else PLAIN
    return timed_step(model, options, device, method=method)


def gradual(growth: str, step: int, preserve_flow: bool = False) -> Change:
    """An update of GraNet."""
    return Change(
        "GraNet", 1, step, density=0.01, fraction=0.5, growth=growth, preserve_flow=preserve_flow
    )


class Always(Method):
    """An update in each step."""

    def __init__(self, growth: str):
        self.growth = growth

    def after_backward(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The update."""
        if accumulate := GROWTH[self.growth].accumulate:
            accumulate(model, 0.9)
        move(model, optimizer, gradual(self.growth, step))


def make_update(
    growth: str, device: torch.device, preserve_flow: bool = False
) -> Callable[[], float]:
    """A function that updates the same masks in each call, and returns its seconds."""
    model = models.build("vgg16", classes=10)
    models.init_weights(model, "kaiming_normal", 1)
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.0102] * len(shapes), 1, "exact"))
    model.to(device, memory_format=torch.channels_last)
    if preserve_flow:  # the update before has repaired the masks
        flow.repair(model, 1, 0, by_magnitude=False)
    remember(model, GROWTH["momentum"])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    add_to_momentum(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.step()
    first = [(w, w.detach().clone(), m, m.clone()) for _, w, m in masked_weights(model)]

    def step() -> float:
        with torch.no_grad():
            for weight, weight_before, mask, mask_before in first:
                weight.copy_(weight_before)
                mask.copy_(mask_before)
        _wait(device)
        started = time.perf_counter()
        move(model, optimizer, gradual(growth, 1, preserve_flow))
        _wait(device)
        return time.perf_counter() - started

    return step


def peak(growth: str, device: torch.device) -> float:
    """Peak memory of three training steps in MiB: dense for "", else with an update in each."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = models.build("vgg16", classes=10)
    if growth:
        shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
        attach_masks(model, draw_masks(shapes, [0.01] * len(shapes), 1, "exact"))
    model.to(device, memory_format=torch.channels_last)
    if growth:
        remember(model, GROWTH[growth])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    learner = training.Learner(model, optimizer, autocast=parallel.autocast(device, "auto"))
    batches = OneBatch(random_images(128, device, torch.channels_last))
    method = Always(growth) if growth else PLAIN
    for _ in range(3):
        sums = training.new_sums(device)
        training.train_epoch(learner, batches, lambda _: 0.01, sums, epoch=0, method=method)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2**10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    for device in devices():
        # Memory first: a new process begins with the peak of the one that started it.
        print(f"{'VGG16, ' + device.type:<24} {'MiB':>8} {'ratio':>6}")
        dense_peak = None
        for growth in ("", *GROWTH):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
                mine = own_process.submit(peak, growth, device).result()
            dense_peak = dense_peak or mine
            name = f"memory, {growth or 'dense'}"
            print(f"{name:<24} {mine:8.0f} {mine / dense_peak:6.3f}", flush=True)

        rounds = 5 if device.type == "cpu" else 50
        programs = {"dense step": make_step("", device)}
        for growth in ("gradient", "momentum"):
            programs[f"ordinary step, {growth}"] = make_step(growth, device)
        for growth in GROWTH:
            programs[f"update, {growth}"] = make_update(growth, device)
            programs[f"update, {growth}, flow"] = make_update(growth, device, preserve_flow=True)
        times = torch.tensor([[f() for f in programs.values()] for _ in range(1 + rounds)])[1:]
        print(f"{'':<24} {'ms':>8} {'ratio':>6}")
        for name, seconds in zip(programs, times.T):
            ratio = (seconds / times[:, 0]).median()
            print(f"{name:<24} {1e3 * seconds.median():8.1f} {ratio:6.3f}")


if __name__ == "__main__":
    main()
