"""Programs that are stopped or killed at any moment, and what they leave."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pandas as pd
from forked import Script
from hypothesis import strategies as st
from script_runs import ROOT, same

from startsparse import checkpoint
from startsparse.stopping import SIGNALS
from torture.promises import promise

TRAINING = ["--arch", "mlp", "--width", "16", "--batch-size", "256", "--save-every", "3"]
STR = ["--config", "", *TRAINING, "--epochs", "2", "--warmup-length", "0"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "levels": ("STR/main.py", [*STR, "--threshold-list", "0.1", "--final_prune_epoch", "1"]),
    "soft thresholds": ("STR/main.py", [*STR, "--conv-type", "STRConvER", "--sInit-value", "-3"]),
    "search": (
        "ER_DST/main.py",
        [
            *("--sparse", *TRAINING, "--epochs", "2", "--sparse-init", "ER_snip"),
            *("--update-frequency", "4", "--final-density", "0.1"),
        ],
    ),
    "tickets": (
        "ER_SLT/main.py",
        ["--dataset", "DIGITS", *TRAINING, "--levels", "2", "--epochs", "1"],
    ),
}
SWEEP = [
    *("--config", "", "--set", "digits", "--densities", "0.1", "--er-sparse-inits", "0.3"),
    *("--jobs", "1", "--", *STR[2:], "--final_prune_epoch", "1"),
]
SOONEST = 0.15  # seconds in which Python itself starts, and handles no signal as we do


def places(folder: Path) -> list[str]:
    return ["--log-dir", f"{folder}/runs", "--result-dir", str(folder), "--sparse-compute", "off"]


def run_folder(folder: Path) -> Path:
    """The one run below; there is no other folder, visible or hidden."""
    (found,) = folder.glob("runs/*/*/*")
    assert found.name == "seed-1"
    return found


def script(name: str, folder: Path, **how: object) -> Script:
    path, argv = RUNS[name]
    return Script(ROOT / path, [*argv, *places(folder), "--resume", "auto"], folder, **how)


@cache
def whole(name: str) -> tuple[Path, float]:
    """The folder of a run that nobody stops, and the seconds that it takes."""
    folder, since = Path(mkdtemp()), time.monotonic()
    process = script(name, folder)
    _, errors = process.wait()
    assert process.exit_code == 0, errors
    return run_folder(folder), time.monotonic() - since


def check_one_line(code: int | None, signum: int, said: str, seconds: float) -> None:
    assert seconds < 5, seconds
    lines = [line for line in said.splitlines() if "warning" not in line]
    assert code in (0, 128 + signum), (code, said)
    if code:
        assert len(lines) == 1, said
        assert lines[0].startswith("error: stopped"), said


def check_files(folder: Path) -> None:
    """Whatever moment it was: each file is whole."""
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".pt":
            checkpoint.load(path)
        elif path.suffix == ".csv":
            pd.read_csv(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def check_resumed(name: str, folder: Path) -> None:
    """The same command ends with the run that nobody stopped, and with one row."""
    check_files(folder)
    process = script(name, folder)
    _, errors = process.wait()
    assert process.exit_code == 0, errors
    run = run_folder(folder)
    assert same(whole(name)[0], run)
    assert len(pd.read_csv(folder / "results.csv")) == 1
    left = {path.name for path in folder.rglob(".*")}
    assert left <= {".lock", ".results.csv.lock"}, left


MOMENT = st.floats(0, 1.05)
STOP = st.sampled_from([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@promise(
    "A run that a signal stops ends within 5 s with one line, and goes on as the run that it was",
    st.tuples(st.sampled_from(sorted(RUNS)), MOMENT, STOP),
    cases=120,
    sample=1,
)
def stopped(case, folder):
    name, moment, signum = case
    seconds = whole(name)[1]
    process = script(name, folder)
    time.sleep(0.3 + moment * seconds)  # forking and the script's first line are not ours
    if process.exit_code is None:
        os.kill(process.pid, signum)
        since = time.monotonic()
        _, said = process.wait()
        check_one_line(process.exit_code, signum, said, time.monotonic() - since)
    check_resumed(name, folder)


@promise(
    "A second signal ends it at once, 5 to 500 ms after the first",
    st.tuples(st.sampled_from(sorted(RUNS)), MOMENT, STOP, st.floats(0.005, 0.5)),
    cases=60,
    sample=0,
)
def stopped_twice(case, folder):
    name, moment, signum, gap = case
    process = script(name, folder)
    time.sleep(0.3 + moment * whole(name)[1])
    if process.exit_code is None:
        os.kill(process.pid, signum)
        time.sleep(gap)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(process.pid, signum)
        since = time.monotonic()
        process.wait()
        assert process.exit_code in (0, 128 + signum, -signum), process.exit_code
        assert time.monotonic() - since < 1.5
    check_resumed(name, folder)


@promise(
    "A run that is killed before any change of its files goes on as the run that it was",
    st.tuples(st.sampled_from(sorted(RUNS)), st.integers(1, 120)),
    cases=200,
    sample=1,
)
def killed_at_an_operation(case, folder):
    name, operation = case
    process = script(name, folder, kill_at=operation)
    _, errors = process.wait()
    assert process.exit_code in (0, -signal.SIGKILL), errors
    check_resumed(name, folder)


@promise(
    "A run that is killed at random, three times, goes on as the run that it was",
    st.tuples(st.sampled_from(sorted(RUNS)), MOMENT, MOMENT, MOMENT),
    cases=100,
    sample=0,
)
def killed_at_random(case, folder):
    name, *moments = case
    for moment in moments:
        process = script(name, folder)
        time.sleep(moment * whole(name)[1])
        if process.exit_code is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    check_resumed(name, folder)


COMMANDS = {
    "STR": ["STR/main.py", *STR],
    "tabular": [
        *("-m", "startsparse.tabular", "--tables", "breast-cancer", "--seeds", "1", "2"),
        *("--starts", "0.5", "--densities", "0.3", "--epochs", "1", "--final-epochs", "1"),
    ],
    "report": [
        "-m",
        "startsparse.report",
        "{run}/../../../../results.csv",
        *("--by", "seed"),
        "--plot",
        "{tmp}/a.png",
    ],
    "export": ["-m", "startsparse.export", "{run}", "--output", "{tmp}/a.safetensors"],
    "sweep": ["STR/run_imp.py", *SWEEP],
    "grid": [
        *("-m", "startsparse.sweep", "STR.main", "--seeds", "1", "2", "--log-dir", "{tmp}/runs"),
        *("--", "--set", "karate", "--epochs", "2"),
    ],
}


@cache
def seconds_of(name: str) -> float:
    """How long a command takes that nobody stops."""
    since = time.monotonic()
    process = started(name, Path(mkdtemp()))
    assert process.wait(120) == 0
    return time.monotonic() - since


def started(name: str, folder: Path) -> subprocess.Popen:
    program, *words = COMMANDS[name]
    run = whole("levels")[0] if "{run}" in " ".join(words) else ""
    argv = [word.format(run=run, tmp=folder) for word in words]
    more = ["--log-dir", f"{folder}/runs"] if program.endswith(".py") else []
    more += ["--result-dir", str(folder)] if name not in ("report", "export") else []
    at = argv.index("--") if "--" in argv else len(argv)
    argv[at:at] = more
    return subprocess.Popen(
        [sys.executable, str(ROOT / program) if program.endswith(".py") else program, *argv],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("w"),
        preexec_fn=_heed,
    )


def _heed() -> None:
    """Heed signals that this program was told to ignore, as by nohup: children would, too."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


@promise(
    "Every command, also while it imports, ends within 5 s with one line, and can be repeated",
    st.tuples(st.sampled_from(sorted(COMMANDS)), MOMENT, STOP),
    cases=120,
    sample=0,
)
def commands(case, folder):
    name, moment, signum = case
    process = started(name, folder)
    time.sleep(SOONEST + moment * seconds_of(name))
    process.send_signal(signum)
    since = time.monotonic()
    code = process.wait(60)
    said = (folder / "stderr").read_text()
    bars = [line for line in said.splitlines() if "it/s" not in line and "%|" not in line]
    # While Python itself starts or, after the last line, ends, a signal ends it without a word.
    if code != -signum or bars or 0.05 < moment < 0.4:
        check_one_line(code, signum, "\n".join(bars), time.monotonic() - since)
    left = [path for path in folder.rglob(".*") if path.name[-9:-8] == "-"]
    assert not left, left
    (folder / "a.safetensors").unlink(missing_ok=True)  # an export that ended before the signal
    assert started(name, folder).wait(120) == 0
