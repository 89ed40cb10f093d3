"""How threads wait, and how many there are: before torch is loaded, unless the user has said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from startsparse import errors, threads

ROOT = Path(__file__).parents[1]
OWN = threads.WAITING + threads.NUMBER
FOUND = {name: value for name, value in os.environ.items() if name not in OWN}


def python(*argv, cwd=ROOT, path=(), **environment):
    """What a new process prints, on both streams; it finds ``path`` before all else."""
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=FOUND | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """A folder with a torch that only says how threads are to wait when it is imported."""
    folder = tmp_path_factory.mktemp("telling")
    names = "('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')"
    says = f"print('waits', *(os.environ.get(name) for name in {names}), flush=True)"
    (folder / "torch.py").write_text(f"import os\n{says}\nos._exit(0)\n")
    return folder


@pytest.mark.parametrize(
    ("folder", "program"),
    [
        ("STR", ["main.py"]),
        ("STR", ["run_imp.py"]),
        ("ER_DST", ["main.py"]),
        ("ER_SLT", ["main.py"]),
        ("ER_SLT", ["cifar_main.py"]),
        (".", ["-m", "startsparse.tabular"]),
        (".", ["-m", "startsparse.export"]),
        (".", ["-m", "startsparse.report"]),
        (".", ["-m", "startsparse.sweep"]),
        (".", ["-m", "benchmarks.step_time"]),
        (".", ["-c", "from startsparse import masks"]),
    ],
)
def test_every_program_says_how_threads_wait_before_torch_is_loaded(telling, folder, program):
    assert python(*program, cwd=ROOT / folder, path=[telling]) == "waits passive 1000\n"


def test_the_user_is_heard(telling):
    say = ["-c", "import startsparse, torch"]
    assert python(*say, path=[telling], OMP_WAIT_POLICY="active") == "waits active None\n"
    assert python(*say, path=[telling], GOMP_SPINCOUNT="1") == "waits None 1\n"
    for name in ("KMP_BLOCKTIME", "KMP_LIBRARY"):
        assert python(*say, path=[telling], **{name: "1"}) == "waits None None\n"


def test_where_torch_is_loaded_already_nothing_is_set(monkeypatch):
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    threads.wait_shortly()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delitem(sys.modules, "torch")
    threads.wait_shortly()
    assert threads.SHORTLY.items() <= os.environ.items()


def test_openmp_hears_it():
    """The runtime says itself what it has read."""
    said = python("-c", "import startsparse, torch", OMP_DISPLAY_ENV="verbose")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said or "OMP_WAIT_POLICY='PASSIVE'" in said
    assert "GOMP_SPINCOUNT = '1000'" in said or "KMP_BLOCKTIME" in said


# The number of threads


@pytest.fixture
def machine(monkeypatch, cgroups):
    """Eight cores, and cgroups as files of a folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return cgroups


V1 = "5:cpuset:/a\n4:cpu,cpuacct:/a/b\n1:name=systemd:/\n"


def v1(quota, where="cpu__a__b__"):
    return {
        f"{where}cpu.cfs_quota_us": f"{quota}\n",
        f"{where}cpu.cfs_period_us": "100000\n",
    }


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # a share of a core is used
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
        ("0::/a/b\n", {"a__b__cpu.max": "max 100000\n", "a__cpu.max": "300000 100000\n"}, 3),
        ("0::/docker/of-the-host\n", {"cpu.max": "200000 100000\n"}, 2),
        (V1, v1(-1), 8),
        (V1, v1(400000), 4),
        (V1, v1(50000), 1),
        (V1, v1(250000, "cpu__a__"), 3),
        (V1, v1(200000, "cpu__"), 2),
        (V1, v1(100000, "cpuset__a__"), 8),
        (V1 + "0::/\n", {**v1(400000), "cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_cores_of_a_container(machine, own, files, cores):
    machine(own, **files)
    assert threads.cores() == cores


def test_cores_without_cgroups(machine, monkeypatch):
    assert threads.cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert threads.cores() == 3


@pytest.mark.parametrize(
    ("cores", "given", "expected"),
    [(2, None, 2), (8, None, 4), (2, "OMP_NUM_THREADS", 4), (2, "MKL_NUM_THREADS", 4)],
)
def test_a_program_has_no_more_threads_than_cores(monkeypatch, cores, given, expected):
    for name in threads.NUMBER:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "4")
    monkeypatch.setattr(threads, "cores", lambda: cores)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        with pytest.raises(SystemExit):
            errors.run_script(lambda: found.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert found == [expected]
