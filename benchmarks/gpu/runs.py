"""Parts that run the scripts: same twice, resumed, recompilations, several GPUs and processes."""

import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.gpu.networks import BARE, DENSE, KINDS, Sizes, batches, program
from benchmarks.gpu.parts import Found
from startsparse import checkpoint, console, plots
from startsparse.errors import Interrupted

ROOT = Path(__file__).parents[2]
STOPS = (3, 8)  # steps after which a run is stopped, to be resumed

NETWORK = "--arch resnet20 --batch-size 256 --sparse-compute off"
STR = f"--set digits {NETWORK} --epochs 2 --warmup-length 0"
LEVELS = "--final-prune-epoch 1 --er-sparse-init 0.5 --threshold-list 0.3 0.2"
DST = f"--data digits {NETWORK} --epochs 2 --sparse --update-frequency 3"
DST += " --init-density 0.5 --final-density 0.2"
SLT = f"--dataset digits {NETWORK} --epochs 1 --levels 2 --er-init-density 0.6 --sparsity 0.2"

RUNS = {
    "dense": ("STR", f"{STR} --conv-type DenseConv"),
    "ConvMask": ("STR", STR),
    "ConvMask, adam, clipped": ("STR", f"{STR} --optimizer adam --lr 0.01 --clip-norm 1"),
    "STRConvER": ("STR", f"{STR} --conv-type STRConvER --sInit-value -3"),
    "levels, mag, rewound": ("STR", f"{STR} {LEVELS} --rewind weights"),
    "levels, snip": ("STR", f"{STR} {LEVELS} --pruner snip"),
    "levels, grasp": ("STR", f"{STR} {LEVELS} --pruner grasp"),
    "levels, synflow": ("STR", f"{STR} {LEVELS} --pruner synflow"),
    "GraNet, gradient": ("ER_DST", f"{DST} --growth gradient"),
    "GraNet, random": ("ER_DST", f"{DST} --growth random"),
    "GraNet, momentum, flow": ("ER_DST", f"{DST} --growth momentum --flow-preservation always"),
    "GMP per layer": ("ER_DST", f"{DST} --method GMP_uniform"),
    "edge-popup per layer": ("ER_SLT", SLT),
    "edge-popup global": ("ER_SLT", f"{SLT} --global"),
    "graph": ("STR", "--set karate --arch gcn --epochs 20 --er-sparse-init 0.5"),
}
COMPILED = ("ConvMask", "STRConvER", "levels, mag, rewound", "GraNet, gradient",
            "edge-popup per layer", "edge-popup global")  # fmt: skip


def run(name: str, where: Path, sizes: Sizes, *more: str) -> Path:
    """One of `RUNS` in this process; returns the run folder."""
    script, line = RUNS[name]
    smaller = ["--arch", "mlp", "--width", "16"] * (sizes.rehearsal and "resnet20" in line)
    folders = ["--log-dir", f"{where}/runs", "--result-dir", str(where)]
    module = importlib.import_module(f"{script}.main")
    with patch.object(plots, "plot_run_by_rank_0", lambda *_: None):
        module.main([*line.split(), *smaller, *more, *folders])
    return max((where / "runs").glob("*/*/seed-*"), key=lambda path: path.stat().st_mtime)


def difference(one: Path, other: Path) -> str:
    """Where two runs first differ; "" if they are the same to the bit."""
    flat = []
    for folder in (one, other):
        state = checkpoint.load(folder / "checkpoint.pt")
        kept = {name: state[name] for name in ("model", "optimizer", "history", "tables", "best")}
        flat.append(torch.utils._pytree.tree_flatten_with_path(kept)[0])
    if [path for path, _ in flat[0]] != [path for path, _ in flat[1]]:
        return "structure"
    for (path, a), (_, b) in zip(*flat):
        name = torch.utils._pytree.keystr(path)
        if "seconds" in name or (a != a if isinstance(a, float) else False):
            continue
        if torch.is_tensor(a) and not torch.equal(a, b):
            return f"{name} by {(a.double() - b.double()).abs().max():.2g}"
        if not torch.is_tensor(a) and a != b:
            return f"{name}: {a} and {b}"
    return ""


def same_and_resumed(name: str, sizes: Sizes) -> dict:
    """Whether a run equals itself, and itself stopped by SIGTERM and resumed."""
    found = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        first = run(name, Path(folder, "first"), sizes)
        again = run(name, Path(folder, "again"), sizes)
        found["repeated"] = difference(first, again) or "same"
        for stop in STOPS:
            where = Path(folder, f"stopped-{stop}")
            with _terminated_after(stop):
                try:
                    run(name, where, sizes)
                    found[f"resumed after step {stop}"] = "was not stopped"
                    continue
                except Interrupted:
                    pass
            resumed = run(name, where, sizes, "--resume", "auto")
            found[f"resumed after step {stop}"] = difference(first, resumed) or "same"
    return found


@contextmanager
def _terminated_after(steps: int) -> Iterator[None]:
    taken: list[int] = []

    def count(*_: object) -> None:
        taken.append(1)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def compile_ahead(kind: str, sizes: Sizes) -> dict:
    """Compile a network into the cache that all processes share, before any is timed."""
    began = time.perf_counter()
    program(kind, batches(sizes, sizes.batches[0]), sizes, compiled=True).epoch(2)
    return {"name": f"compiled: {kind}", "compile_s": round(time.perf_counter() - began, 1)}


def _quiet(task: Callable[[], dict]) -> dict:
    console.log.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - progress bars
    return task()


def same(found: Found, sizes: Sizes) -> None:
    """The same command twice, and stopped and resumed: the same to the bit?

    Meanwhile, networks of the part about steps are compiled in other processes.
    """
    kinds = () if sizes.rehearsal else (DENSE, "ConvMask", *KINDS[1:], BARE)
    tasks = {f"compiled: {kind}": partial(compile_ahead, kind, sizes) for kind in kinds}
    tasks |= {name: partial(same_and_resumed, name, sizes) for name in RUNS}
    if sizes.rehearsal:
        tasks = {name: tasks[name] for name in ("ConvMask", "graph")}
    context = multiprocessing.get_context("spawn")
    limit = max(1.0, min(150.0, found.report.left - 30))
    pool = ProcessPoolExecutor(sizes.workers, context)
    try:
        names = {pool.submit(_quiet, task): name for name, task in tasks.items()}
        for job in as_completed(names, timeout=limit):
            with found.row(name=names[job]) as row:
                row |= job.result()
    except TimeoutError:
        done = {row["name"] for row in found.rows}
        found.content["not finished"] = [name for name in tasks if name not in done]
        for process in list(pool._processes.values()):
            process.terminate()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def graphs(found: Found, sizes: Sizes) -> None:
    """How often --compile compiles, by dynamo's count, and how often after the second epoch.

    Each run has an update, level or rewind after it. The graphs themselves are not compiled.
    """
    for name in COMPILED if not sizes.rehearsal else ("GraNet, gradient",):
        if not found.time_for(12):
            return
        epochs = ("--levels", "4") if name.startswith("edge") else ("--epochs", "4")
        with found.row(name=name) as row, _counted() as seen, _silent():
            eager = partial(torch.compile, backend="eager")
            with tempfile.TemporaryDirectory() as folder, patch.object(torch, "compile", eager):
                made = run(name, Path(folder), sizes, *epochs, "--compile")
                per_epoch = len(seen) // len(checkpoint.load(made / "checkpoint.pt")["history"])
            row |= {"graphs": _graphs(), "steps": len(seen)}
            row["after_two_epochs"] = seen[-1] - seen[2 * per_epoch]
            row["in_the_test"] = row["graphs"] - seen[-1]
            row["breaks"] = dict(torch._dynamo.utils.counters["graph_break"])


def _graphs() -> int:
    """That dynamo has made since its counters were cleared."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The number of graphs at each optimizer step inside."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(_graphs()))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _silent() -> Iterator[None]:
    level = console.log.level
    console.log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        console.log.setLevel(level)


def several(found: Found, sizes: Sizes) -> None:
    """One process by torchrun; with two GPUs, DataParallel and two processes, in each script."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    starts = {"one process": [sys.executable], "torchrun, one process": [*torchrun, "1"]}
    if torch.cuda.device_count() > 1:
        starts |= {"torchrun, two processes": [*torchrun, "2"], "--multigpu 0,1": [sys.executable]}
    names = ("ConvMask", "GraNet, gradient", "edge-popup global")
    for name in names[:1] if sizes.rehearsal else names:
        for title, start in starts.items():
            if not found.time_for(30):
                return
            with found.row(name=name, start=title) as row:
                more = ["--multigpu", "0,1"] if title.startswith("--multigpu") else []
                row |= _process(name, start, more, sizes)


def _process(name: str, start: list[str], more: list[str], sizes: Sizes) -> dict:
    """A run in processes of its own: seconds, validation accuracy, or what it printed last."""
    script, line = RUNS[name]
    smaller = ["--arch", "mlp", "--width", "16"] if sizes.rehearsal else []
    with tempfile.TemporaryDirectory() as folder:
        flags = [*line.split(), *smaller, *more, "--log-dir", f"{folder}/runs"]
        began = time.perf_counter()
        done = subprocess.run(
            [*start, str(ROOT / script / "main.py"), *flags, "--result-dir", folder],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        seconds = round(time.perf_counter() - began, 1)
        if done.returncode:
            return {"error": " ".join(done.stderr.split())[-400:], "code": done.returncode}
        run_folder = next(Path(folder, "runs").glob("*/*/seed-*"))
        history = checkpoint.load(run_folder / "checkpoint.pt")["history"]
        return {"seconds": seconds, "valid_accuracy": history[-1]["valid_accuracy"]}
