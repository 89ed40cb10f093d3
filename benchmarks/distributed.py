"""Two processes on CPUs: a step by DistributedDataParallel, by one all-reduce, and in one process.

Strong scaling shares a batch, weak scaling gives each process as many images as one process has
alone. All are measured in turns, in the training loop, with one thread for each process. CPU time
is the sum over the processes; the seconds say something only where two cores are idle. Then the
paper estimate of docs/distributed.md for GPUs, from bytes and FLOPs.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.steps import OneBatch, random_images
from startsparse import flops, processes, training
from startsparse.data import Shape
from STR.main import network
from STR.options import STROptions

CPU = torch.device("cpu")
NETWORKS = {"resnet20": 32, "resnet18": 4, "mlp": 128}  # images of one process
STEPS, ROUNDS = 2, 4
SHAPES = {"resnet18": Shape(10, 3, 32), "resnet50": Shape(1000, 3, 224)}

SUSTAINED = 250e12  # FLOP/s of one GPU in bf16: a quarter of an H100's peak
PER_GPU = 256  # images
BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once
# GPUs -> bytes/s at which each sends: NVLink within a machine; one 400 Gbit/s card per GPU; one
# 100 Gbit/s card per machine of 8 GPUs.
LINKS = {
    "8, NVLink": (8, 370e9),
    "64, 400 Gbit/s a GPU": (64, 50e9),
    "64, 100 Gbit/s": (64, 12.5e9),
}


class Steps(OneBatch):
    """An epoch of several steps, on this process's images of a batch of ``whole``."""

    def __init__(self, images: Tensor, whole: int):
        super().__init__(images)
        self.whole = whole

    def __len__(self) -> int:
        return STEPS

    def epoch(self, _epoch: int, _start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batch in each step."""
        for _ in range(STEPS):
            yield self.images, self.labels

    def size(self, _step: int) -> int:
        """Of the whole batch."""
        return self.whole


class Replicated(training.Learner):
    """Its forward function averages the gradients."""

    def average_gradients(self, _parameters: object) -> None:
        """They are averaged."""


def learner(arch: str, kind: type[training.Learner]) -> training.Learner:
    """A network at density 0.2 and its optimizer."""
    options = STROptions(arch=arch, er_sparse_method="uniform")
    model, _ = network(options, Shape(classes=10, channels=3, size=32))
    model.to(memory_format=torch.channels_last)
    forward = processes.all_replicate(model) if kind is Replicated else model
    return kind(model, options.make_optimizer(model), forward=forward)


def epoch(learning: training.Learner, batches: Steps) -> tuple[float, float]:
    """CPU seconds and seconds of a step."""
    began = time.process_time(), time.perf_counter()
    sums = training.new_sums(CPU)
    training.train_epoch(learning, batches, lambda _: 1e-3, sums, epoch=0)
    return (time.process_time() - began[0]) / STEPS, (time.perf_counter() - began[1]) / STEPS


def measure(rank: int, port: int, found: multiprocessing.Queue) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes.start()
    for arch, batch in NETWORKS.items():
        images = random_images(batch, CPU, torch.channels_last)
        plain, replicated = learner(arch, training.Learner), learner(arch, Replicated)
        half, whole = Steps(images[: batch // 2], batch), Steps(images, 2 * batch)
        programs = {
            "strong, DDP": (replicated, half),
            "strong, one all-reduce": (plain, half),
            "weak, DDP": (replicated, whole),
            "weak, one all-reduce": (plain, whole),
        }
        times: dict[str, list] = {}
        for number in range(1 + ROUNDS):
            if rank == 0:
                with processes.alone():
                    alone = [epoch(plain, whole)]
            else:
                alone = []
            processes.all_copy_rank_0(plain.model)
            both = {"one process": alone} | {n: [epoch(*p)] for n, p in programs.items()}
            if number:  # the first warms up
                for name, measured in both.items():
                    times.setdefault(name, []).extend(measured)
        found.put((arch, times))
    dist.destroy_process_group()


def estimate() -> None:
    """Milliseconds of a step on GPUs and of its all-reduce, and how efficient that is."""
    columns = f"{'MB sent':>8}{'ms sent':>8}{'ms step':>8}{'floor':>7}{'hidden':>8}"
    print(f"\n{'GPUs':<26}{'network':<10}{columns}")
    for link, (count, speed) in LINKS.items():
        for arch, shape in SHAPES.items():
            options = STROptions(arch=arch, set="imagenet" if shape.size > 32 else "cifar10")
            model, _ = network(options, shape)
            gradients = 4 * sum(p.numel() for p in model.parameters())
            forward = sum(flops.forward_flops(model, torch.zeros(shape.input)).values())
            step = 3 * forward * PER_GPU / SUSTAINED
            sent = 2 * (count - 1) / count * gradients
            send = sent / speed
            # The backward pass, two thirds of a step, hides all but the last bucket.
            open_ = max(send - 2 / 3 * step, send * min(1, BUCKET / gradients))
            floor, hidden = step / (step + send), step / (step + open_)
            print(f"{link:<26}{arch:<10}{sent / 1e6:8.1f}{1e3 * send:8.2f}"
                  f"{1e3 * step:8.2f}{floor:7.2f}{hidden:8.2f}")  # fmt: skip


def main() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue = context.Queue()
    children = [
        context.Process(target=measure, args=(rank, store.port, found), daemon=True)
        for rank in range(2)
    ]
    for child in children:
        child.start()
    times: dict[str, list] = {}
    for _ in range(2 * len(NETWORKS)):
        arch, mine = found.get()
        times.setdefault(arch, []).append(mine)
    for child in children:
        child.join()
    for arch, both in times.items():
        print(f"{arch:<26}{'CPU ms':>8}{'ms':>8}{'CPU ratio':>11}{'ratio':>7}")
        medians = {}
        for name in both[0] if "one process" in both[0] else both[1]:
            measured = [each[name] for each in both if each[name]]
            cpu = sum(statistics.median(c for c, _ in one) for one in measured)
            medians[name] = cpu, max(statistics.median(s for _, s in one) for one in measured)
            alone = medians["one process"]
            ratios = [now / then for now, then in zip(medians[name], alone)]
            print(f"{name:<26}{1e3 * cpu:8.1f}{1e3 * medians[name][1]:8.1f}"
                  f"{ratios[0]:11.2f}{ratios[1]:7.2f}", flush=True)  # fmt: skip
    estimate()


if __name__ == "__main__":
    main()
