"""Runs of two processes: `python processes_runs.py RUNS FOLDER` for test_processes.

This program does the slow imports, and is then forked for each process of each run. A process of
pytest cannot be forked: autograd has run in it, and would not work in a fork.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import torch
import torch._dynamo  # else the first optimizer imports it
import torch.distributed as dist
import torch.utils.tensorboard  # else the first epoch does
from script_runs import newest

from ER_DST import main as dst
from ER_SLT import main as slt
from startsparse import plots, processes
from startsparse.engine import choice, compute
from startsparse.engine.network import SparseForm
from startsparse.errors import Interrupted
from startsparse.masks import masked_weights
from startsparse.method import Method
from startsparse.trainer import Trainer
from STR import main as str_

# Without BatchNorm, unless with --sync-bn: its statistics would be those of one process's part of a
# batch. Of 62 examples the last batch has two, which are too few for two parts.
SMALL = [
    *("--width", "8", "--epochs", "2", "--passes", "2", "--batch-size", "12"),
    *("--modulus", "13", "--train-fraction", "0.68", "--lr", "0.1"),
]
STR = ["--set", "modular-addition", "--arch", "algorithmic", *SMALL]
DST = ["--data", "modular-addition", "--model", "algorithmic", "--sparse", *SMALL]
SLT = ["--dataset", "modular-addition", "--model", "algorithmic", *SMALL]
RUNS = {
    "pruned by snip": (
        str_,
        [*STR, "--threshold-list", "0.3", "--final_prune_epoch", "1", "--pruner", "snip"],
    ),
    "soft thresholds": (str_, [*STR, "--conv-type", "STRConvER", "--sInit-value", "-3"]),
    "drop and grow": (dst, [*DST, "--update-frequency", "4", "--final-density", "0.2"]),
    "edge-popup": (slt, [*SLT, "--levels", "2", "--lr", "1"]),
}
# Only in masked form.
MASKED = {
    "static": (str_, [*STR, "--clip-norm", "0.5", "--label-smoothing", "0.1"]),
    "static, --sync-bn": (
        str_,
        [*STR, "--arch", "mlp", "--optimizer", "sgd", "--lr", "0.01", "--sync-bn"],
    ),
    "ratio of imp": (
        dst,
        [*DST, "--sparse-init", "ER_imp", "--growth", "momentum", "--update-frequency", "4"],
    ),
    "GMP": (dst, [*DST, "--method", "GMP", "--update-frequency", "4", "--final-density", "0.2"]),
    "RigL": (dst, [*DST, "--method", "DST", "--update-frequency", "4"]),
    "SET": (dst, [*DST, "--method", "DST", "--growth", "random", "--update-frequency", "4"]),
    "edge-popup, global": (slt, [*SLT, "--levels", "2", "--lr", "1", "--global"]),
}
INTERRUPTED = "drop and grow"
STOP = 7  # step within the epoch before which the other process is asked to stop


def folders(where: Path) -> list[str]:
    return ["--log-dir", f"{where}/runs", "--result-dir", f"{where}"]


def forms(where: Path) -> list[tuple[ModuleType, list[str]]]:
    """Script and arguments of every run, of `RUNS` in both forms."""
    both = [(name, *run, form) for name, run in RUNS.items() for form in ("on", "off")]
    return [
        (script, [*argv, "--sparse-compute", form, *folders(where / f"{name}, {form}")])
        for name, script, argv, form in [*both, *((n, *run, "off") for n, run in MASKED.items())]
    ]


def all_runs(where: Path) -> None:
    """Do every run of `RUNS`, and two more.

    Records digests of this process's weights and masks after every step, and of the model that it
    evaluates.
    """
    seen, after, evaluate = [], Trainer.after_step, Trainer.evaluate

    def look(tensors: Iterable[torch.Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        seen.append(digest.hexdigest())

    def after_step(trainer: Trainer, method: Method, step: int) -> None:
        state = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        look([*state, *(mask for _, _, mask in masked_weights(trainer.model))])
        after(trainer, method, step)

    def evaluated(trainer: Trainer, *batches: object) -> dict[str, float]:
        look(trainer.model.state_dict().values())
        return evaluate(trainer, *batches)

    Trainer.after_step, Trainer.evaluate = after_step, evaluated
    on_own_disk(where)
    for script, argv in forms(Path()):
        script.main(argv)
    # What auto finds by trying: one process tries.
    compute._SMALL, compute.choose = 0, found_by_rank_0
    str_.main([*STR, *folders(Path("auto"))])
    # With the statistics of each process's part, which have no counterpart in one process.
    str_.main([*STR, "--arch", "mlp", "--sparse-compute", "off", *folders(Path("mlp"))])
    (where / f"seen-{processes.rank()}.json").write_text(json.dumps(seen))


def on_own_disk(where: Path) -> None:
    """Be a machine that shares no run folder with that of rank 0."""
    machine = where if processes.rank() == 0 else where / "other machine"
    machine.mkdir(exist_ok=True)
    os.chdir(machine)


def found_by_rank_0(form: SparseForm, *_: object) -> choice.Choice:
    """Replaces `choice.choose`."""
    assert os.environ["RANK"] == "0"
    form.compute_sparsely(["decoder.0"])
    return choice.Choice({"decoder.0": 2.0}, form.computes, 0.5)


def stopped_and_resumed(where: Path) -> None:
    """Ask the other process to stop, and then resume the run."""
    after = Trainer.after_step

    def ask(trainer: Trainer, method: Method, step: int) -> None:
        if processes.rank() == 1 and step + 1 == STOP and not trainer.history:
            os.kill(os.getpid(), signal.SIGTERM)
        after(trainer, method, step)

    script, argv = RUNS[INTERRUPTED]
    on_own_disk(where)
    argv = [*argv, "--sparse-compute", "on", *folders(Path("stopped"))]
    Trainer.after_step = ask
    try:
        script.main(argv)
    except Interrupted as stop:
        code = stop.exit_code
    assert code == 128 + signal.SIGTERM
    Trainer.after_step = after
    if processes.rank() == 0:
        checkpoint = newest(where / "stopped") / "checkpoint.pt"
        checkpoint.with_name("stopped.pt").write_bytes(checkpoint.read_bytes())
    script.main([*argv, "--resume", "auto"])


def bad(argv: list[str]) -> Callable[[Path], None]:
    """A run that ends with one line of error."""
    return lambda where: processes.run_script(lambda: str_.main([*argv, *folders(where)]))


def not_finite(where: Path) -> None:
    """A run in which only one process has a loss that is not finite."""
    if os.environ["RANK"] == "1":
        evaluate = torch.nn.functional.cross_entropy
        torch.nn.functional.cross_entropy = lambda *a, **k: evaluate(*a, **k) * torch.nan
    bad([*STR, "--sparse-compute", "off"])(where)


def killed(where: Path) -> None:
    """A run in which one process is killed."""
    if os.environ["RANK"] == "1":
        Trainer.after_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    bad(STR)(where)


def different(where: Path) -> None:
    """A run in which one process computes another weight."""
    after = Trainer.after_step

    def change(trainer: Trainer, method: Method, step: int) -> None:
        after(trainer, method, step)
        trainer.model.decoder[2].weight.data[3].mul_(1 + 1e-6)

    if os.environ["RANK"] == "1":
        Trainer.after_step = change
    bad([*STR, "--sparse-compute", "off"])(where)


BAD = {
    "option": bad([*STR, "--lr", "-1"]),
    "gpus": bad([*STR, "--multigpu", "0"]),
    "graph": bad(["--set", "karate", "--arch", "gcn"]),
    "batch": bad([*STR, "--batch-size", "3"]),
    "found by the first": bad([*STR, "--resume", "auto", "--evaluate"]),
    "not finite": not_finite,
    "different": different,
    "killed": killed,
}


def pair(job: Callable[[Path], None], where: Path) -> list[int]:
    """Exit codes of two processes that do ``job``; their output is in stderr-0 and stderr-1."""
    where.mkdir(parents=True, exist_ok=True)
    # As torchrun does it: a rendezvous that outlives the processes.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1]:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        sys.stdout = (where / f"stdout-{rank}").open("w")
        sys.stderr = (where / f"stderr-{rank}").open("w")
        code = 0
        try:
            job(where)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def joined(job: Callable[[Path], None]) -> Callable[[Path], None]:
    """``job`` in a process that has joined the others."""

    def do(where: Path) -> None:
        processes.start()
        job(where)

    return do


def main() -> None:
    """Print exit codes as JSON."""
    torch.set_num_threads(1)
    plots.plot_run_by_rank_0 = lambda *_: None
    kind, where = sys.argv[1], Path(sys.argv[2])
    if kind == "bad":
        print(json.dumps({name: pair(job, where / name) for name, job in BAD.items()}))
    else:
        codes = pair(joined(all_runs), where)
        codes += pair(joined(stopped_and_resumed), where)
        print(json.dumps(codes))


if __name__ == "__main__":
    main()
