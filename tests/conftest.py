"""Settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings
from str_runs import newest

from STR import main as script

# Two test processes with two threads each would wait for one another on two cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: a test that fails can be run again, and 4 sigma stays 4 sigma.
settings.register_profile("startsparse", derandomize=True, deadline=None)
settings.load_profile("startsparse")


@pytest.fixture
def run(tmp_path):
    """Run STR/main.py in this process; returns the run folder."""

    def run(*argv, where="a"):
        folders = ["--log-dir", f"{tmp_path / where}/runs", "--result-dir", f"{tmp_path / where}"]
        script.main([*argv, *folders])
        return newest(tmp_path / where)

    return run
