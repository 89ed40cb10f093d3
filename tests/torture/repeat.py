"""The same command gives the same files to the byte, but for times and where they are."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from forked import Script
from hypothesis import strategies as st
from script_runs import ROOT, TIMES

from startsparse import checkpoint
from torture.promises import promise

NET = ["--width", "8", "--batch-size", "256", "--epochs", "1"]
MLP, CONV = ["--arch", "mlp", *NET], ["--arch", "resnet20", *NET, "--width", "4"]
IMP = ["--threshold-list", "0.1", "--final_prune_epoch", "1"]
DST = ["--sparse", *MLP, "--update-frequency", "3", "--final-density", "0.1"]
SLT = ["--dataset", "DIGITS", *MLP, "--levels", "2"]


def _settings() -> list[tuple[str, list[str]]]:
    found = [("STR/main.py", [*MLP, "--conv-type", kind]) for kind in ("ConvMask", "DenseConv")]
    found += [
        ("STR/main.py", [*net, "--conv-type", kind, "--sInit-value", "-3"])
        for kind in ("STRConv", "STRConvER")
        for net in (MLP, CONV)
    ]
    found += [
        ("STR/main.py", [*MLP, *IMP, "--pruner", pruner])
        for pruner in ("mag", "snip", "grasp", "synflow", "random-erk", "random-global")
    ]
    found += [
        ("STR/main.py", [*MLP, *IMP, "--rewind", rewind, "--warmup-epochs", "1"])
        for rewind in ("none", "weights", "bn", "amplitudes", "signs")
    ]
    found += [
        ("ER_DST/main.py", [*DST[:-2], *final, "--method", method, "--growth", growth])
        for method, final in (("DST", []), ("GraNet", DST[-2:]), ("GraNet_uniform", DST[-2:]))
        for growth in ("gradient", "random", "momentum")
    ]
    found += [("ER_DST/main.py", [*DST, "--method", "GMP"])]
    found += [
        ("ER_DST/main.py", [*DST, "--sparse-init", init])
        for init in ("snip", "ER_snip", "ER_synflow", "ER_imp", "pyramid_sparsity")
    ]
    found += [
        ("ER_DST/main.py", [*DST, "--flow-preservation", "always", "--ortho-repair", "True"]),
        ("ER_DST/main.py", [*DST, "--init-method", "looks-linear", "--optimizer", "adam"]),
    ]
    found += [
        ("ER_SLT/main.py", [*SLT, "--initBias", bias])
        for bias in ("kn-zero-bias", "kn-nonzero-bias", "signed-const-with-bias")
    ]
    found += [
        ("ER_SLT/main.py", [*SLT, *more])
        for more in (["--shuffle"], ["--global"], ["--score-init", "constant"])
    ]
    graphs = ["--set", "karate", "--arch", "gcn", "--width", "8", "--epochs", "3"]
    return [*found, ("STR/main.py", graphs)]


SETTINGS = _settings()


def files(folder: Path) -> dict[str, bytes]:
    """All files of a run, its results and its export, without times and where they are."""
    found = {}
    for path in sorted(folder.rglob("[!.]*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "tensorboard" in name or path.name in SAYS_WHERE:
            continue
        found[name] = _content(path, folder)
    return found


SAYS_WHERE = ("environment.json", "log.txt", "stdout", "stderr")


def _content(path: Path, folder: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".csv":
        table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
        data = table.drop(columns=TIMES, errors="ignore").to_csv().encode()
    if path.name == "summary.json":
        data = repr({k: v for k, v in json.loads(data).items() if k not in TIMES}).encode()
    if path.suffix == ".pt":
        state = checkpoint.load(path)
        state.pop("clock", None)
        for row in state.get("history", []):
            for time in TIMES:
                row.pop(time, None)
        packed = io.BytesIO()
        torch.save(state, packed)
        data = packed.getvalue()
    return data.replace(str(folder).encode(), b"FOLDER")


def run_apart(words: list[str], folder: Path, threads: int) -> None:
    """A new process with another order of hashes, another working folder, and another load."""
    folder.mkdir()
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
            | {"PYTHONHASHSEED": str(random.SystemRandom().randrange(2**32))},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        load.kill()
        load.wait()
    assert done.returncode == 0, done.stderr


def check_same(one: Path, other: Path) -> None:
    first, second = files(one), files(other)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert not different, different


def argv_of(setting: tuple[str, list[str]], form: str, folder: Path) -> list[str]:
    path, argv = setting
    places = ["--log-dir", f"{folder}/runs", "--result-dir", str(folder)]
    config = ["--config", ""] if path.startswith("STR") else []
    form = "off" if "momentum" in argv else form  # it needs all gradients
    return [str(ROOT / path), *config, *argv, "--sparse-compute", form, *places]


@promise(
    "The same command, seed and number of threads give the same files to the byte",
    st.tuples(
        st.sampled_from(SETTINGS), st.sampled_from(["on", "off"]), st.sampled_from([1, 2, 4])
    ),
    cases=120,
    sample=0,
)
def repeated(case, folder):
    setting, form, threads = case
    folders = folder / "one", folder / "other"
    for where in folders:
        run_apart(argv_of(setting, form, where), where, threads)
    check_same(*folders)
    (run,) = (folders[0] / "runs").glob("*/*/*")
    for where in folders:
        copy = where / run.relative_to(folders[0])
        out = str(where / "exported.safetensors")
        words = ["-m", "startsparse.export", str(copy), "--output", out, "--repeats", "0"]
        run_apart(words, where / "work", 1)
    assert len({(where / "exported.safetensors").read_bytes() for where in folders}) == 1


@promise(
    "The same command in two processes gives the same files to the byte",
    st.tuples(st.sampled_from(SETTINGS), st.sampled_from(["on", "off"])),
    cases=100,
    sample=1,
)
def repeated_in_forks(case, folder):
    folders = folder / "one", folder / "other"
    for where in folders:
        script, *argv = argv_of(*case, where)
        process = Script(Path(script), argv, where)
        _, errors = process.wait()
        assert process.exit_code == 0, errors
    check_same(*folders)


@promise(
    "startsparse.tabular repeats its tables to the byte",
    st.tuples(st.sampled_from(["on", "off"]), st.sampled_from([1, 2, 4])),
    cases=6,
    sample=0,
)
def tabular(case, folder):
    form, threads = case
    folders = folder / "one", folder / "other"
    for where in folders:
        words = ["-m", "startsparse.tabular", "--seeds", "1", "2", "--densities", "0.3", "0.1"]
        words += ["--epochs", "1", "--final-epochs", "1", "--width", "16", "--sparse-compute", form]
        run_apart([*words, "--result-dir", str(where)], where, threads)
    check_same(*folders)
