"""A run has its result without a picture; a picture that was asked for is an error in one line."""

import sys

import pandas as pd
import pytest
from script_runs import MLP

from startsparse import plots
from startsparse.errors import UserError
from startsparse.tabular import program


@pytest.fixture(params=["not there", "broken"])
def no_matplotlib(request, monkeypatch):
    """Importing matplotlib fails, as it does where it is missing or broken."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Broken:
        def find_spec(self, name, *_):
            if name.split(".")[0] == "matplotlib":
                raise (ImportError("numpy.core\nfailed") if request.param == "broken" else
                       ModuleNotFoundError("No module named 'matplotlib'"))  # fmt: skip

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def test_a_run_without_matplotlib_has_its_result(no_matplotlib, run, few_images, caplog):
    folder = run(*MLP)
    assert (folder / "summary.json").exists() and not (folder / "curves.png").exists()
    (line,) = [line for line in caplog.messages if "not drawn" in line]
    assert line.startswith(f"warning: {folder}/curves.png: not drawn (pictures need mat")
    assert line.isprintable()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no\nfont")])
def test_a_picture_that_cannot_be_drawn_ends_no_run(error, run, few_images, caplog, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    folder = run(*MLP)
    assert (folder / "summary.json").exists() and not (folder / "curves.png").exists()
    (line,) = [line for line in caplog.messages if "not drawn" in line]
    assert ("No space left on device" if isinstance(error, OSError) else "(no)") in line


def test_a_picture_that_was_asked_for_is_an_error(no_matplotlib, tmp_path):
    means = pd.DataFrame({"a": [1], "test_accuracy": [0.5], "test_accuracy_ci95": [0.1]})
    with pytest.raises(UserError, match="^pictures need matplotlib, which cannot be imported"):
        plots.plot(means, ["a"], "test_accuracy", tmp_path / "plot.png")


def test_an_experiment_on_tables_without_matplotlib_has_its_tables(no_matplotlib, tmp_path, caplog):
    said = []
    argv = [
        "--tables",
        "breast-cancer",
        "--seeds",
        "1",
        "--starts",
        "0.5",
        "--densities",
        "0.5",
        "--width",
        "8",
    ]
    argv += ["--epochs", "1", "--final-epochs", "1", "--result-dir", str(tmp_path)]
    program.main(argv, said.append)
    assert (tmp_path / "table.md").exists() and said
    assert [line for line in caplog.messages if f"{tmp_path}/plot.png: not drawn" in line]
