"""What a run runs on: versions, git state, machine; and whether a resumed run is still the same."""

import json
import logging
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import startsparse
from startsparse import processes
from startsparse.errors import one_line

log = logging.getLogger("startsparse")

ENVIRONMENT = "environment.json"

_GIT = 10  # seconds that git has to answer, on a slow file system say


def environment() -> dict[str, Any]:
    """Versions, git state, machine and command line."""
    commit, changes = _git_state(startsparse.checkout())
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "startsparse": startsparse.__version__,
        "git_commit": commit,
        "git_changes": changes,
        "python": platform.python_version(),
        "torchvision": _version("torchvision"),
        "numpy": np.__version__,
        "machine": platform.platform(),
        **order_of_sums(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def change(folder: Path) -> str:
    """What differs here from where the run in ``folder`` began, and changes the order of sums.

    "" if nothing does: then a resumed run is the run that was not stopped, to the bit.
    """
    try:
        began = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        then = {name: began[name] for name in order_of_sums() if name in began}
    except (OSError, ValueError, TypeError):  # it only tells
        return ""
    now = order_of_sums()
    return ", ".join(
        f"{name} {value} then, {now[name]} now"
        for name, value in then.items()
        if value != now[name]
    )


def order_of_sums() -> dict[str, Any]:
    """What decides in which order PyTorch and the kernels sum, and so on the last bits."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processes": processes.world_size(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git_state(folder: Path | None) -> tuple[str, list[str]]:
    """The commit of the checkout in ``folder`` and its changes; says it if git does not tell."""
    # A repository around an installed package is another one.
    if folder is None or not (folder / ".git").exists():
        return "", []
    try:
        return _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain").splitlines()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit code {error.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_GIT} s"
    except OSError as error:
        reason = error.strerror or str(error)
    reason = one_line(reason.partition("\n")[0])
    log.warning("warning: %s will not have the state of git (%s)", ENVIRONMENT, reason)
    return "", []


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        check=True,
        timeout=_GIT,
    )
    return done.stdout.strip()
