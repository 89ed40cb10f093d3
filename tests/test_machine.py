"""environment.json, and what it says about a resumed run."""

import json
import subprocess
import sys
import time

import pytest
import torch
from script_runs import MLP, ROOT

from startsparse import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty folder that seems to be a checkout, and what git is there."""
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    monkeypatch.setattr(machine.startsparse, "checkout", lambda: tmp_path / "checkout")

    def git(script):
        path = tmp_path / "bin" / "git"
        path.parent.mkdir()
        if script:
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin" if script else str(path.parent))

    return git


def test_the_environment_says_versions():
    known = machine.environment()
    assert known["torch"] == torch.__version__
    assert known["torchvision"]
    assert known["threads"] >= 1
    assert known["cpu_capability"]


@pytest.mark.parametrize(
    ("git", "reason"),
    [
        ("", "No such file or directory"),
        ("exit 3", "exit code 3"),
        ("echo 'fatal: detected dubious ownership' >&2; echo more >&2; exit 128",
         "fatal: detected dubious ownership"),
        ("exec sleep 60", "no answer within 0.2 s"),
    ],
)  # fmt: skip
def test_without_git_one_line_says_so(git, reason, checkout, monkeypatch, caplog):
    checkout(git)
    monkeypatch.setattr(machine, "_GIT", 0.2)
    started = time.monotonic()
    known = machine.environment()
    assert time.monotonic() - started < 10
    assert (known["git_commit"], known["git_changes"]) == ("", [])
    line = f"warning: environment.json will not have the state of git ({reason})"
    assert caplog.messages == [line]


def test_names_that_are_not_utf_8_do_no_harm(checkout):
    checkout("printf 'M \\351\\nM b\\n'")
    assert machine.environment()["git_changes"] == ["M \ufffd", "M b"]


def test_without_a_repository_nothing_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(machine.startsparse, "checkout", lambda: tmp_path)
    assert machine.environment()["git_commit"] == ""
    assert not caplog.messages


def test_git_writes_nothing(checkout, tmp_path):
    checkout(f"echo $GIT_OPTIONAL_LOCKS >> {tmp_path}/said")
    machine.environment()
    assert (tmp_path / "said").read_text() == "0\n0\n"


def test_a_run_that_goes_on_with_other_threads_is_another_one(run, few_images, caplog):
    folder = run(*MLP, "--epochs", "1")
    (folder / "summary.json").unlink()
    caplog.clear()
    run(*MLP, "--epochs", "1", "--resume", str(folder))
    assert not [line for line in caplog.messages if "last bits" in line]
    (folder / "summary.json").unlink()
    (path,) = folder.glob("environment.json")
    began = json.loads(path.read_text())
    path.write_text(json.dumps(began | {"threads": 7, "cpu_capability": "AVX9"}))
    run(*MLP, "--epochs", "1", "--resume", str(folder))
    (line,) = [line for line in caplog.messages if "last bits" in line]
    here = torch.backends.cpu.get_cpu_capability()
    assert line == (
        f"warning: --resume: cpu_capability AVX9 then, {here} now, threads 7 then, 1 now: "
        "it is another run in the last bits"
    )


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"threads": []}', "\xff", "7"])
def test_a_damaged_environment_ends_no_run(text, tmp_path):
    if text is not None:
        (tmp_path / "environment.json").write_bytes(text.encode("latin-1"))
    assert machine.change(tmp_path) in ("", "threads [] then, 1 now")


# --- what a run imports before its first step -----------------------------------------------------

FIRST_STEP = """
import os, sys
from startsparse import optimizers, trainer
import ER_DST.main, ER_SLT.main
from STR.main import main

def stop(*_, **__):
    left = sorted(name for name in {slow} if name in sys.modules)
    print(*left, flush=True)
    os._exit(0)

trainer.Trainer.after_step = stop
main({argv})
"""

SLOW = [
    *("torch._dynamo", "torch._inductor", "sympy", "networkx", "torchvision", "sklearn", "scipy"),
    *("matplotlib", "tensorboard", "torch.utils.tensorboard", "torch.utils.flop_counter"),
    "torch.distributed.fsdp",
]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["--config", "", "--set", "modular-addition", "--arch", "algorithmic"], ""),
        (["--width", "64"], "scipy sklearn"),  # has the digits; tries the sparse form, too
    ],
)
def test_a_run_takes_its_first_step_without_slow_libraries_that_it_does_not_need(
    tmp_path, options, needed
):
    """PyTorch's compiler alone, which its optimizers import, took a second of four."""
    argv = [*options, "--epochs", "1", "--log-dir", f"{tmp_path}/runs", "--result-dir"]
    argv += [str(tmp_path)]
    code = FIRST_STEP.format(slow=SLOW, argv=argv)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == needed
