"""results/cifar10-jpeg/gpu.sh: its commands, and how many epochs it finds room for."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from script_runs import ROOT

from startsparse.commandline import parse
from STR.main import CONFIGS
from STR.options import STROptions

# Stands for Python: notes the commands of runs, and that of an epoch took 2 seconds.
PYTHON = """#!{python}
import json, os, subprocess, sys
from pathlib import Path

first, *rest = sys.argv[1:]
if first == "-":
    sys.exit(subprocess.call([sys.executable, "-", *rest]))
if first == "-c":
    print("CARD")
elif first == "main.py":
    with open("{notes}", "a") as notes:
        print(json.dumps(rest), file=notes)
    logs, name = (rest[rest.index(word) + 1] for word in ("--log-dir", "--name"))
    folder = Path(logs, "config", name, "seed-1")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "epochs.csv").write_text("epoch,seconds\\n1,4.0\\n2,6.0\\n3,8.0\\n4,10.0\\n")
"""

# Stands for the clock: the second run, of four epochs, takes 30 seconds.
DATE = """#!/bin/sh
if [ -f {notes}.date ]; then echo 130.0; else echo 100.0; touch {notes}.date; fi
"""


@pytest.fixture
def script(tmp_path):
    """Run a copy of the script; returns what came of it and the commands of its runs."""
    (tmp_path / "STR").mkdir()
    copy = tmp_path / "results/cifar10-jpeg/gpu.sh"
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "results/cifar10-jpeg/gpu.sh", copy)
    notes, tools = tmp_path / "notes", tmp_path / "tools"
    tools.mkdir()
    for name, text in (("python", PYTHON), ("date", DATE)):
        (tools / name).write_text(text.format(python=sys.executable, notes=notes))
        (tools / name).chmod(stat.S_IRWXU)

    def run(**environment):
        notes.unlink(missing_ok=True)
        paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
        done = subprocess.run(
            [copy, "--set", "folder", "--data", "DIR"],
            env={**os.environ, **paths, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        lines = notes.read_text().splitlines() if notes.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


def test_as_many_epochs_as_fit_into_the_time(script):
    done, commands = script(BUDGET="1000")
    assert done.returncode == 0, done.stderr
    # Of 30 s, 4 epochs take 8 s: 22 s are around them. 1000 - 30 - 22 s are left for 14 runs.
    assert int((0.9 * 948 / 14 - 22) / 2) == 19
    assert "14 runs of 19 epochs" in done.stdout
    assert len(commands) == 2 + 14
    assert {command[command.index("--epochs") + 1] for command in commands[2:]} == {"19"}
    again, more = script(BUDGET="9000")
    assert "14 runs of 19 epochs" in again.stdout  # the runs are resumed
    assert len(more) == 14


def test_all_commands_are_valid_and_all_runs_are_there(script, monkeypatch, tmp_path):
    for name in ("train", "test"):
        for kind in ("a", "b"):
            (tmp_path / "DIR" / name / kind).mkdir(parents=True)
    done, commands = script(EPOCHS="3")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    options = [parse(STROptions, CONFIGS, command) for command in commands]
    made = {(o.name, o.seed, o.er_sparse_method, o.er_sparse_init) for o in options if o.masked}
    assert made == {
        (f"{ratio}-{density}", seed, ratio, density)
        for ratio in ("ERK", "balanced") for density in (0.2, 0.05, 0.01) for seed in (1, 2)
    }  # fmt: skip
    assert sum(not o.masked for o in options) == 2
    assert {(o.amp, o.batch_size, o.epochs, o.expt_setup) for o in options} == {
        ("bf16", 512, 3, "CARD")
    }


def test_too_little_time_is_said(script):
    done, commands = script(BUDGET="400")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 400 seconds are too few for 14 runs")
    assert len(commands) == 2
    done, commands = script(EPOCHS="3", BUDGET="-1")
    assert done.returncode == 1
    assert "run the same command again" in done.stderr
    assert not commands
