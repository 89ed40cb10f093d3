"""Sweeps on a cluster: what is submitted, that preempted runs go on, what --status says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pandas as pd
import pytest
import submitit
from script_runs import ROOT, same

from startsparse import cluster, sweep
from startsparse.errors import OptionError, UserError
from startsparse.jobs import Job
from startsparse.remote import Remote
from STR import main as script
from STR import run_imp
from STR.options import STROptions

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="signals of Linux")

SMALL = ["--", "--set", "karate", "--epochs", "2", "--passes", "1"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of the jobs of a fake Slurm."""
    programs = fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(cluster, "_POLL", 0.2)
    monkeypatch.setattr(submitit.SlurmExecutor, "_throttle", lambda _: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "slurm/jobs"


def on_slurm(*options):
    return ["STR", "--launcher", "slurm", *options]


def job_of(seed, *flags):
    argv = [*flags, "--seed", str(seed), "--log-dir", "runs/sweep", "--resume", "auto"]
    return Job("STR.main", argv, script.parse(STROptions, script.CONFIGS, argv))
