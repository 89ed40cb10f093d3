"""Runs of the scripts on pretended GPUs, and once more on the CPU.

A scenario is one line of `SCENARIOS`: a script and its command line. The fixture ``gpu`` of the
tests starts this program, at most once in each process of pytest, and asks it for a scenario when a
test does; ``gpu("masked")`` is then, as a dict:

    steps, updates     number of optimizer steps, and of those that moved masks
    launches           region -> kernels: the median of ordinary steps for "step", the mean for
                       "update", of both for other regions the sum (see `pretended_log`)
    waits              region -> {"kind file:line": how often}
    products           device -> dtypes in which it convolved or multiplied matrices
    distance           largest difference between a number of the networks
    counts             the first mask that keeps another number of weights than on the CPU; "": none
    differs            the first thing in which the run differs from the CPU's; "": none, to the bit
    digests            SHA-256 of each tensor of the network
    log                what the run printed
    error              a traceback, if the run ended with an exception

``gpu.resumed("masked")`` is a run that dies after its first checkpoint and is resumed; its
``differs`` and ``distance`` are those from an unbroken run on the same devices.

``gpu.call(function)`` runs a function of a test file there, inside ``pretended_gpus()``, with the
`Log` as its argument; what it returns must be JSON. ``gpus=2`` is for both; a scenario on several
GPUs, and its run on the CPU, have BatchNorm with fixed statistics, so that they can be compared.

To try one by hand: python tests/gpu_scenarios.py masked
"""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]

# Few images and a small network. Sparse compute, which is for CPUs, is off there too, and so is
# bf16, which GPUs use by default: the runs are compared to the bit.
_FEW = "--sparse-compute off --amp off"
_STR = f"--set digits --config STR/configs/digits.yaml --batch-size 32 --epochs 2 {_FEW}"
_RESNET = f"{_STR} --arch resnet20 --width 4 --warmup-length 0"
_DST = f"--data digits --config ER_DST/configs/digits.yaml --batch-size 32 --epochs 2 {_FEW}"
_MOVES = f"{_DST} --update-frequency 2 --sparse --init-density 0.5"
_SLT = f"--dataset digits --config ER_SLT/configs/digits.yaml --batch-size 32 --epochs 1 {_FEW}"
_POPUP = f"{_SLT} --levels 2 --er-init-density 0.6 --sparsity 0.2"

SCENARIOS = {
    "dense": ("STR", f"{_RESNET} --conv-type DenseConv"),
    "masked": ("STR", f"{_RESNET} --er-sparse-init 0.3"),
    "mlp": ("STR", f"{_STR} --arch mlp --width 16 --er-sparse-init 0.3"),
    "soft": ("STR", f"{_RESNET} --conv-type STRConvER --sInit-value -3 --er-sparse-init 0.5"),
    "levels": (
        "STR",
        f"{_RESNET} --er-sparse-init 0.5 --final_prune_epoch 1 --threshold-list 0.3 "
        "--rewind weights --warmup-epochs 1",
    ),
    "gcn": (
        "STR",
        f"--set karate --arch gcn --epochs 3 --optimizer adam --er-sparse-init 0.5 {_FEW}",
    ),
    "algorithmic": (
        "STR",
        "--set modular-addition --modulus 13 --arch algorithmic --width 16 --epochs 2 --passes 1 "
        f"--batch-size 16 --optimizer adam --lr 0.01 --er-sparse-init 0.5 {_FEW}",
    ),
    "granet": (
        "ER_DST",
        f"{_MOVES} --model resnet20 --width 4 --method GraNet --final-density 0.2 "
        "--flow-preservation always",
    ),
    "rigl": ("ER_DST", f"{_MOVES} --model mlp --width 16 --method DST --growth momentum"),
    "set": ("ER_DST", f"{_MOVES} --model mlp --width 16 --method DST --growth random"),
    "popup-layer": ("ER_SLT", f"{_POPUP} --model resnet20 --width 4 --per-layer"),
    "popup-global": ("ER_SLT", f"{_POPUP} --model resnet20 --width 4 --global"),
    "diverges": ("STR", f"{_STR} --arch mlp --width 16 --lr 1e30 --warmup-length 0"),
}


class Server:
    """The other side of this program, in the process of the tests."""

    def __init__(self) -> None:
        self._known: dict[str, dict] = {}
        self._process: subprocess.Popen | None = None

    def __call__(self, name: str, *more: str, gpus: int = 1) -> dict:
        """The run of a scenario; ``more`` words of its command line change it."""
        return self._ask({"run": name, "more": list(more), "gpus": gpus})

    def resumed(self, name: str, *more: str, gpus: int = 1) -> dict:
        """The run of a scenario that dies after its first checkpoint, and is resumed."""
        return self._ask({"resume": name, "more": list(more), "gpus": gpus})

    def call(self, function: Callable[[Any], Any], gpus: int = 1) -> Any:
        """What a function of a module in tests/ returns there."""
        words = {"module": function.__module__, "function": function.__name__, "gpus": gpus}
        answer = self._ask(words)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def _ask(self, request: dict) -> dict:
        line = json.dumps(request)
        if line not in self._known:
            if self._process is None:
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
                command = [sys.executable, str(Path(__file__))]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                self._process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, f"gpu_scenarios.py ended at {line}; its standard error says why"
            self._known[line] = json.loads(answer)
        return self._known[line]

    def close(self) -> None:
        """End the program."""
        if self._process is not None and self._process.stdin:
            self._process.stdin.close()
            self._process.wait()


def serve() -> None:
    """Answer requests, one a line, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(request: dict) -> dict:
    """Of one request of `Server`."""
    try:
        if "run" in request:
            return run(request["run"], request["more"], request["gpus"])
        if "resume" in request:
            return resumed(request["resume"], request["more"], request["gpus"])
        from pretended_gpu import pretended_gpus

        function = getattr(importlib.import_module(request["module"]), request["function"])
        with pretended_gpus(request["gpus"]) as log:
            return {"value": function(log)}
    except BaseException:
        return {"error": traceback.format_exc()}


def run(name: str, more: list[str], gpus: int) -> dict:
    """A scenario on the pretended GPU, and on the CPU."""
    from pretended_gpu import pretended_gpus

    script, words = SCENARIOS[name]
    argv = [*words.split(), *more]
    with _prepared(gpus) as (folder, found):
        with pretended_gpus(gpus) as log:
            there = _start(script, [*argv, *_devices(gpus)], folder / "gpu")
        found |= log.summary()
        found["digests"] = _digests(there)
        found |= _compared(there, _start(script, argv, folder / "cpu"))
    return found


def resumed(name: str, more: list[str], gpus: int) -> dict:
    """A scenario on the pretended GPU without a stop, and with one."""
    from pretended_gpu import pretended_gpus
    from script_runs import Crash, crashing, newest

    from startsparse.trainer import Trainer

    script, words = SCENARIOS[name]
    argv = [*words.split(), *more, *_devices(gpus)]
    with _prepared(gpus) as (folder, found), pretended_gpus(gpus):
        whole = _start(script, argv, folder / "whole")
        with (
            mock.patch.object(Trainer, "save", crashing("after", 1)),
            contextlib.suppress(Crash),
        ):
            _start(script, argv, folder / "broken")
        broken = newest(folder / "broken")
        again = ["--resume", str(broken), *_devices(gpus)]
        importlib.import_module(f"{script}.main").main(again)
        found |= _compared(broken, whole)
    return found


def _devices(gpus: int) -> list[str]:
    return ["--multigpu", ",".join(map(str, range(gpus)))] if gpus > 1 else []


def _compared(one: Path, other: Path) -> dict[str, Any]:
    return {
        "differs": difference(one, other),
        "distance": distance(one, other),
        "counts": other_count(one, other),
    }


@contextlib.contextmanager
def _prepared(gpus: int):
    """A folder, and a dict that gets what the runs print, and their exception, if any."""
    folder, said, found = Path(tempfile.mkdtemp()), io.StringIO(), {}
    try:
        with _few_digits_and_no_clock(), _said_to(said), _fixed_statistics(gpus > 1):
            yield folder, found
    except BaseException:
        found["error"] = traceback.format_exc()
    finally:
        found["log"] = said.getvalue()
        shutil.rmtree(folder)


def _start(script: str, argv: list[str], where: Path) -> Path:
    """Run a main.py in this process; the run's folder."""
    from script_runs import newest

    main = importlib.import_module(f"{script}.main").main
    main([*argv, "--log-dir", f"{where}/runs", "--result-dir", str(where)])
    return newest(where)


@contextlib.contextmanager
def _few_digits_and_no_clock():
    """Three steps an epoch; no pictures; no second passes, as training then looks at its sums."""
    from script_runs import few_digits

    from startsparse import data, plots, training

    still = SimpleNamespace(monotonic=lambda: 0.0)
    with (
        mock.patch.dict(data.SETS, {"digits": few_digits(100, 20)}),
        mock.patch.object(plots, "plot_run_by_rank_0", lambda *_: None),
        mock.patch.object(training, "time", still),
    ):
        yield


@contextlib.contextmanager
def _fixed_statistics(fixed: bool):
    """BatchNorm trains with statistics of mean 0 and variance 1; on several GPUs it has parts."""
    import torch.nn.functional as F
    from torch.nn.modules.batchnorm import _BatchNorm

    def forward(norm, inputs):
        return F.batch_norm(inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    plain = mock.patch.object(_BatchNorm, "forward", forward)
    with plain if fixed else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _said_to(said: io.StringIO):
    handler = logging.StreamHandler(said)
    log = logging.getLogger("startsparse")
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.removeHandler(handler)


def _leaves(folder: Path) -> list[tuple[str, Any]]:
    """All that a checkpoint says, path -> value, but for times."""
    import torch.utils._pytree as pytree

    from startsparse import checkpoint

    state = checkpoint.load(folder / "checkpoint.pt")
    kept = {key: state[key] for key in ("model", "optimizer", "history", "tables", "best")}
    leaves = pytree.tree_flatten_with_path(kept)[0]
    named = [(pytree.keystr(path), value) for path, value in leaves]
    return [(path, value) for path, value in named if "seconds" not in path]


def _digests(folder: Path) -> dict[str, str]:
    from script_runs import weights

    tensors = weights(folder).items()
    raw = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors}
    return {name: hashlib.sha256(data).hexdigest() for name, data in raw.items()}


def other_count(one: Path, other: Path) -> str:
    """The first mask of which two runs keep different numbers of weights; "": there is none."""
    from script_runs import weights

    first, second = weights(one), weights(other)
    masks = [name for name in first if name.endswith("_mask")]
    return next((name for name in masks if first[name].sum() != second[name].sum()), "")


def distance(one: Path, other: Path) -> float:
    """The largest difference between a number of one network and that of the other."""
    from script_runs import weights

    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def difference(one: Path, other: Path) -> str:
    """The first thing in which the checkpoints of two runs differ; "" if they are the same."""
    import torch

    first, second = _leaves(one), _leaves(other)
    if [path for path, _ in first] != [path for path, _ in second]:
        return "what the checkpoints hold"
    for (path, a), (_, b) in zip(first, second):
        if torch.is_tensor(a):
            if not torch.equal(a, b):
                return f"{path}, by {(a.double() - b.double()).abs().max():.2g}"
        elif a != b and not (a != a and b != b):  # NaN equals NaN
            return f"{path}: {a} and {b}"
    return ""


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:]:
        for asked in sys.argv[1:]:
            result = run(asked, [], 1)
            print(asked, json.dumps(result | {"digests": "...", "log": "..."}, indent=1))
    else:
        serve()
