"""docs/architecture.md: its worked changes apply to a copy, are as small as it says, and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dst_runs import WEIGHTS, begin, counts, options

from startsparse.phases import Phase

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text()
DIFFS = dict(re.findall(r"^### (?:An? )([^\n]*)\n.*?^```diff\n(.*?)^```$", TEXT, re.M | re.S))
MOST = {  # files and lines
    **dict.fromkeys(
        ("pruner", "layer-wise ratio", "growth rule", "schedule", "optimizer"), (1, 10)
    ),
    **dict.fromkeys(("data set", "network"), (2, 30)),
    "conv_type": (2, 40),
    "kernel": (4, 40),
}
METHOD = re.search(r"^### A method\n.*?^```python\n(.*?)^```$", TEXT, re.M | re.S)[1]


def files(diff):
    """File -> (lines that go and context, lines that come and context) of each of its hunks."""
    found = {}
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        head, *hunks = part.split("@@\n")
        lines = [hunk.splitlines() for hunk in hunks]
        found[re.search(r"^\+\+\+ b/(.*)$", head, re.MULTILINE)[1]] = [
            tuple("".join(f"{ln[1:]}\n" for ln in hunk if ln[:1] != sign) for sign in "+-")
            for hunk in lines
        ]
    return found


@pytest.mark.parametrize("what", DIFFS)
def test_a_change_is_as_small_as_the_table_says(what):
    parts = re.split(r"^--- ", DIFFS[what], flags=re.MULTILINE)[1:]
    code = [part for part in parts if "+++ b/docs/" not in part]
    rows, lines = (
        sum(len(re.findall(r"^\+(?!\+\+ )", part, re.MULTILINE)) for part in which)
        for which in ([part for part in parts if part not in code], code)
    )
    counts = f"{len(code)} | {lines} | {rows} |"
    assert re.search(rf"^\| \[an? {what}\]\(#[\w-]+\) \| {re.escape(counts)}$", TEXT, re.MULTILINE)
    assert len(code) <= MOST[what][0]
    assert lines <= MOST[what][1]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the code with all changes in it."""
    copy = tmp_path_factory.mktemp("changed")
    for package in ("startsparse", "STR", "ER_DST", "ER_SLT", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "runs", "results")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for diff in DIFFS.values():
        for name, hunks in files(diff).items():
            path = copy / name
            text = path.read_text() if path.exists() else ""
            for before, after in hunks:
                assert text.count(before) == 1 if before else text == "", (name, before)
                text = text.replace(before, after) if before else after
            path.write_text(text)
    return copy


def run(changed, script, *argv, **environment):
    done = subprocess.run(
        [sys.executable, "-m", f"{script}.main", *argv, "--log-dir", "runs", "--result-dir", "out"],
        cwd=changed,
        env={**os.environ, "PYTHONPATH": str(changed), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_changes_run(changed):
    what = ["--set", "gratings", "--arch", "lenet", "--er-sparse-method", "fan-in"]
    prune = ["--threshold-list", "0.1", "--pruner", "mag-relative", "--final_prune_epoch", "2"]
    how = ["--epochs", "3", "--lr-policy", "linear", "--prune-scheduler", "linear", "--lr-min"]
    said = run(changed, "STR", *what, *prune, *how, "0.001", "--optimizer", "nadam", "--lr", "0.01")
    assert "pruned to density 0.1000" in said
    assert float(re.search(r"test accuracy +(\S+) %", said)[1]) > 90
    what = ["--set", "gratings", "--arch", "mlp", "--width", "16", "--epochs", "1", "--sparse"]
    run(changed, "ER_DST", *what, "--method", "DST", "--growth", "sampled",
        "--update-frequency", "2", "--sparse-compute", "off")  # fmt: skip
    (topology,) = changed.glob("**/topology.csv")
    assert topology.read_text().count("\n") > 3


MEANS = """
import torch
from startsparse.engine.kernels import kernels_for
from startsparse.engine.maps import Space, to_map
x = torch.randn(20, 3, 5, 4, generator=torch.Generator().manual_seed(1))
space = Space(3, 5, 4, border=1)
y = torch.empty(3, 2, 1, 1, 16)
kernels_for(x.dtype).mean_pixels((space, to_map(x, space)), y)
means = y.permute(1, 4, 0, 2, 3).reshape(32, 3)[:20]
torch.testing.assert_close(means, x.mean((2, 3)))
"""


def test_the_kernel_and_the_formula_run(changed, tmp_path):
    """Compiled anew, without optimisation; its types are compared when the library is loaded."""
    cheap = {"STARTSPARSE_CXXFLAGS": "-O0", "STARTSPARSE_CACHE": str(tmp_path)}
    environment = {**os.environ, "PYTHONPATH": str(changed), **cheap}
    subprocess.run([sys.executable, "-c", MEANS], cwd=changed, env=environment, check=True)
    what = ["--set", "gratings", "--arch", "resnet20", "--width", "2", "--epochs", "1"]
    run(changed, "STR", *what, "--conv-type", "PowerER", "--sparse-compute", "on", **cheap)
    assert len(list(changed.glob("**/dense_weights.pt"))) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_the_method_prunes_and_computes_sparsely(tmp_path):
    """4 steps from 0.5 to 0.1, of which 0, 2 and 4 prune; FLOPs follow from moves_masks."""
    known = {}
    exec(METHOD, known)
    asked = options(is_prune=False, er_sparse_init=0.5, er_sampling="exact", sparse_compute="on")
    trainer, _ = begin(tmp_path, asked)
    method = known["Gradual"](4, 2, 0.5, 0.1)
    trainer.run_phases([Phase("train", 2, "constant", method=method)])
    assert sum(counts(trainer.model).values()) == round(0.1 * WEIGHTS)
    assert 0.1 < trainer.ledger.training / trainer.ledger.dense < 0.5
