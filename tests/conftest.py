"""Settings of all tests."""

import math
import os
from functools import partial

import pytest
import torch
from gpu_scenarios import Server
from hypothesis import settings
from script_runs import few_digits, newest
from slt_runs import slt

from ER_DST import main as dst_main
from startsparse import containers, data, plots, saving
from STR import main as str_main

# Two test processes with two threads each would slow one another down on two cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A checkpoint after each epoch, however long it takes: which are written should not differ.
saving.SHARE = math.inf

# The same examples in every run: a failure can be repeated, and 4 sigma stays 4 sigma.
settings.register_profile("startsparse", derandomize=True, deadline=None)
settings.load_profile("startsparse")


def pytest_runtest_setup(item):
    """Skip tests marked ``gpu``, or ``gpu(2)``, where there are not so many GPUs."""
    for mark in item.iter_markers("gpu"):
        needed = mark.args[0] if mark.args else 1
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} GPUs with CUDA")


@pytest.fixture
def run(tmp_path):
    """Run STR/main.py in this process; returns the run folder."""
    return in_process(str_main.main, tmp_path)


@pytest.fixture
def run_dst(tmp_path):
    """The same for ER_DST/main.py."""
    return in_process(dst_main.main, tmp_path)


@pytest.fixture
def run_slt(tmp_path):
    """`slt` in a temporary folder."""
    return partial(slt, tmp_path)


@pytest.fixture(scope="session")
def gpu():
    """Runs on pretended GPUs, as `gpu_scenarios` describes."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def few_images():
    """The digits cut down to 180 training, 20 validation and 40 test images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SETS, "digits", few_digits(200, 40))
        yield


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """Makes cgroups in a folder: content of the list of own groups, files with __ for slashes."""
    monkeypatch.setattr(containers, "_CGROUPS", tmp_path / "sys")
    monkeypatch.setattr(containers, "_OWN_CGROUPS", tmp_path / "own")

    def make(own, **files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "sys" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no curves.png: that takes longer than training a small network."""
    monkeypatch.setattr(plots, "plot_run_by_rank_0", lambda *_: None)


def in_process(main, tmp_path):
    def run(*argv, where="a"):
        folders = ["--log-dir", f"{tmp_path / where}/runs", "--result-dir", f"{tmp_path / where}"]
        main([*argv, *folders])
        return newest(tmp_path / where)

    return run
