"""tabular.ipynb: it runs from top to bottom, and what it finds is found again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "tabular.ipynb"


def headline(notebook):
    """What the last cell says: name -> accuracy."""
    (cell,) = (c for c in notebook.cells if "headline" in c.metadata.get("tags", []))
    text = "".join(output.text for output in cell.outputs)
    return {name: float(value) for name, value in re.findall(r"^(.*): (0\.\d{4})$", text, re.M)}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A copy as pytest --nbmake leaves it, run in an empty folder, where nothing can be fetched."""
    folder = tmp_path_factory.mktemp("notebook")
    copy = folder / NOTEBOOK.name
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, copy)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--nbmake"]
    done = subprocess.run(
        [*command, "--nbmake-timeout=600", "--overwrite", "-c", os.devnull, str(copy)],
        cwd=folder, env={**os.environ, **nowhere}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return nbformat.read(copy, 4)


def test_what_it_finds(executed):
    found = headline(executed)
    majority = found["majority class"]
    assert majority == pytest.approx(357 / 569, abs=0.01)
    dense, sparse = found["dense, density 1"], found["ER 0.5, pruned to 0.02 with reset"]
    assert dense > 0.95 and sparse > 0.95
    assert abs(dense - sparse) < 0.02
    # layer collapse, and what flow preservation makes of it
    assert found["dense, pruned to 0.005 with reset"] < majority + 0.1
    assert found["the same with flow preservation"] > 0.92


def test_the_outputs_in_the_repository_are_those_of_this_code(executed):
    stored, found = headline(nbformat.read(NOTEBOOK, 4)), headline(executed)
    assert stored.keys() == found.keys() and len(stored) == 5
    for name, value in stored.items():  # other processors round otherwise
        assert found[name] == pytest.approx(value, abs=0.02), name


def test_what_is_stored():
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert not any("execution" in cell.metadata for cell in cells)
    text = NOTEBOOK.read_text()
    assert len(text) < 600_000
    assert not re.search(r"/home/|/root/|/tmp/|site-packages", text)
    # no training loop, pruner or mask code in cells
    source = "\n".join(cell.source for cell in cells)
    assert not re.search(r"^\s*(for|while|def|class) |backward|import torch", source, re.M)
