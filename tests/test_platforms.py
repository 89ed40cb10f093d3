"""As on macOS, as far as Linux can be: no fcntl, affinity or /proc, and processes that spawn."""

import os
import subprocess
import sys

from data_files import write_imagenet
from script_runs import ROOT, newest

from startsparse import runs

PROGRAM = """
import builtins, io, multiprocessing, os, pathlib, sys
sys.modules["fcntl"] = None
for name in ("sched_getaffinity", "posix_fadvise", "memfd_create"):
    vars(os).pop(name, None)
there = io.open
def no_proc(path, *args, **kwargs):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "no such file", str(path))
    return there(path, *args, **kwargs)
io.open = builtins.open = no_proc
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    script, *argv = sys.argv[1:]
    sys.argv = [script, *argv]
    import runpy
    runpy.run_path(script, run_name="__main__")
"""


def run(tmp_path, script, argv):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    places = ["--log-dir", f"{tmp_path}/runs", "--result-dir", str(tmp_path)]
    return subprocess.run(
        [sys.executable, str(program), str(ROOT / script), *argv, *places],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_workers_that_spawn_read_images(tmp_path):
    write_imagenet(tmp_path)
    argv = ["--config", "", "--set", "imagenet", "--data", str(tmp_path), "--arch", "resnet18"]
    argv += ["--epochs", "1", "--batch-size", "4", "--workers", "1", "--warmup-length", "0"]
    done = run(tmp_path, "STR/main.py", [*argv, "--sparse-compute", "off"])
    assert done.returncode == 0, done.stderr
    assert runs.summary(newest(tmp_path))["epoch"] == 1
