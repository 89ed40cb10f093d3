"""Parts about speed: steps, updates, input, the CPU's threads."""

import time
from itertools import product
from statistics import median

import torch

from benchmarks import input_pipeline, sparse_compute
from benchmarks.gpu.measure import host_ms, per_step, waits
from benchmarks.gpu.networks import (
    BARE,
    DENSE,
    DROP_AND_GROW,
    KINDS,
    NEVER,
    Bare,
    Program,
    Sizes,
    batches,
    program,
    synchronize,
)
from benchmarks.gpu.parts import Found
from benchmarks.steps import interleaved, random_images
from startsparse.data import Batches
from startsparse.engine.network import SparseForm

UPDATES = (  # growth, flow preservation
    ("gradient", "False"),
    ("random", "False"),
    ("momentum", "False"),
    ("gradient", "always"),
)
CPU_DENSITY, CPU_THREADS = 0.1, (1, 2, 4, 8, 16)


def steps(found: Found, sizes: Sizes) -> None:
    """Training steps of each kind: images/s, over dense, Python's share, launches, memory.

    Dense and fixed masks come first, because time may run out. Each network takes turns with the
    dense one, an epoch each.
    """
    first, second = sizes.batches
    early = [(first, c, k) for c, k in product((False, True), (DENSE, "ConvMask"))]
    rest = [(first, c, k) for c, k in product((False, True), (*KINDS[1:], BARE))]
    large = [(second, c, k) for c, k in product((True, False), (DENSE, "ConvMask"))]
    whole = {batch: batches(sizes, batch) for batch in sizes.batches}
    dense: dict[tuple[int, bool], Program | Bare] = {}
    # Each network counts as a recompilation of the same code.
    with torch._dynamo.config.patch(recompile_limit=64):
        for batch, compiled, kind in (*early, *rest, *large):
            if not found.time_for(25):
                return
            if batch == second and compiled and kind == DENSE:
                dense.clear()
                torch._dynamo.reset()  # a size of its own, not a dimension that varies
            with found.row(kind=kind, batch=batch, compiled=compiled) as row:
                mine = _measure(row, whole[batch], dense.get((batch, compiled)), sizes)
                if kind == DENSE:
                    dense[batch, compiled] = mine


def _measure(
    row: dict, whole: Batches, dense: Program | Bare | None, sizes: Sizes
) -> Program | Bare:
    """Fill a row of `steps`; returns its program."""
    cuda = sizes.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    mine = program(row["kind"], whole, sizes, row["compiled"])
    mine.epoch(2)
    row["first_steps_s"] = round(time.perf_counter() - began, 2)
    mine.epoch()
    if cuda:
        row["peak_MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    pairs = [(mine.epoch(), dense.epoch() if dense else 1.0) for _ in range(sizes.pairs)]
    seconds = median(one for one, _ in pairs)
    row |= {"ms": 1e3 * seconds, "images_per_second": whole.batch_size / seconds}
    if dense:
        row["over_dense"] = median(one / other for one, other in pairs)
    if isinstance(mine, Program):
        row["python_ms"] = host_ms(mine)
        row["python_share"] = row["python_ms"] / row["ms"]
    counted, row["longest"] = per_step(mine.epoch, sizes)
    row |= counted
    row["gpu_share"] = counted["kernel_ms"] / row["ms"]
    return mine


def updates(found: Found, sizes: Sizes) -> None:
    """What an update of all masks adds to a step of drop and grow: time, launches, waits by line.

    The difference between steps that all have an update, and steps that have none.
    """
    whole = batches(sizes, sizes.batches[0])
    for growth, flow in UPDATES:
        if not found.time_for(15):
            return
        with found.row(growth=growth, flow_preservation=flow, method="GraNet") as row:
            more = {"growth": growth, "flow_preservation": flow}
            sides = [
                Program(DROP_AND_GROW, whole, sizes, every=every, **more) for every in (NEVER, 1)
            ]
            for side in sides:
                side.epoch(2)
            times = [min(side.epoch(sizes.steps) for _ in range(sizes.repeats)) for side in sides]
            without, within = (per_step(side.epoch, sizes)[0] for side in sides)
            row |= {"step_ms": 1e3 * times[0], "update_ms": 1e3 * (times[1] - times[0])}
            row |= {f"update_{name}": within[name] - without[name] for name in within}
            row["waits_of_an_update"] = waits(sides[1], sizes.steps)


def pipeline(found: Found, sizes: Sizes) -> None:
    """Images/s of the batches alone: crop, mirror, normalise."""
    for batch in (128, *sizes.batches):
        whole = batches(sizes, batch if not sizes.rehearsal else 16)
        with found.row(batch=batch) as row:
            row["images_per_second"] = input_pipeline.images_per_second(whole)


def cpu(found: Found, sizes: Sizes) -> None:
    """Training step of the sparse form on the CPU, over the dense one, by number of threads."""
    arch, batch = ("mlp", 128) if sizes.rehearsal else ("resnet18", 64)
    images = random_images(
        batch, torch.device("cpu"), torch.channels_last, sparse_compute.NETWORKS[arch][2]
    )
    before = torch.get_num_threads()
    dense = sparse_compute.network(arch, 1.0).to(memory_format=torch.channels_last)
    base = sparse_compute.step(dense, sparse_compute.sgd(dense), images)
    sparse = sparse_compute.network(arch, CPU_DENSITY).to(memory_format=torch.channels_last)
    form = SparseForm(sparse, sparse_compute.NETWORKS[arch][2])
    form.compute_sparsely(form.layers)
    optimizer = sparse_compute.sgd(sparse)
    limit = torch.multiprocessing.cpu_count()
    try:
        with form.within(optimizer):
            mine = sparse_compute.step(form, optimizer, images)
            for threads in (n for n in CPU_THREADS if n <= limit):
                if not found.time_for(12):
                    return
                torch.set_num_threads(threads)
                with found.row(network=arch, density=CPU_DENSITY, threads=threads) as row:
                    names = "sparse_ms", "dense_ms", "over_dense"
                    seconds = interleaved(mine, base, 3, warm_up=1)
                    row |= dict(zip(names, (1e3 * seconds[0], 1e3 * seconds[1], seconds[2])))
    finally:
        torch.set_num_threads(before)


def waiting(found: Found, sizes: Sizes) -> None:
    """Waits in ordinary steps of each kind, by line; there should be none."""
    whole = batches(sizes, sizes.batches[0])
    for kind in (DENSE, *KINDS):
        if not found.time_for(5):
            return
        with found.row(kind=kind) as row:
            mine = Program(kind, whole, sizes)
            mine.epoch(2)
            synchronize(sizes.device)
            row["waits"] = waits(mine, 4)
