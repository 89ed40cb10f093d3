"""Results that several processes write, run folders, and the tables made of them."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from startsparse import finding, plots, report, results
from startsparse.console import log
from startsparse.errors import UserError
from startsparse.options import Options


def write(path, start):
    for i in range(start, start + 10):
        results.add(path, [{"run": path.parent / f"r{i}", "value": i}])


def test_processes_share_results_csv(tmp_path):
    path = tmp_path / "results.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(path, 10 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(pd.read_csv(path)["value"]) == list(range(30))


def test_a_run_has_one_line_and_new_columns_are_added(tmp_path):
    path = tmp_path / "results.csv"
    results.add(path, [{"run": tmp_path / "a", "x": 1, "z": 0}])
    results.add(path, [{"run": tmp_path / "b", "x": 2, "y": 3, "z": 0}])
    results.add(path, [{"run": tmp_path / "a", "x": 5}])
    table = pd.read_csv(path).set_index("run")
    assert list(table) == ["x", "y", "z"]
    assert table["x"].to_dict() == {"b": 2, "a": 5}
    assert table.loc["b", "y"] == 3
    assert np.isnan(table.loc["a", "y"])


def test_a_run_belongs_to_one_process(tmp_path):
    options = Options(log_dir=str(tmp_path))
    run = finding.open_run(options)
    code = (
        "from startsparse import finding, runs; from startsparse.options import Options; "
        f"finding.open_run(Options(log_dir={str(tmp_path)!r}), runs.Path({str(run.folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: --resume" in done.stderr
    assert "is in use by another process" in done.stderr
    with pytest.raises(UserError, match="in use"):
        finding.open_run(options, run.folder)


def test_a_closed_run_is_anyones(tmp_path):
    options = Options(log_dir=str(tmp_path))
    with finding.open_run(options) as run:
        run.show("levels", {"density": 0.1}, step=1)
        log.info("within")
    log.info("after")
    with finding.open_run(options, run.folder):
        log.info("again")
    said = [line.split()[-1] for line in (run.folder / "log.txt").read_text().splitlines()]
    assert said == ["within", "again"]


def test_mean_and_confidence_interval_by_hand(tmp_path):
    rows = pd.DataFrame(
        {
            "name": ["a", "a", "a", "b"],
            "test_accuracy": [0.9, 0.92, 0.94, 0.5],
            "seed": [1, 2, 3, 1],
        }
    )
    table = report.summarise(rows, ["name"], ["test_accuracy"]).set_index("name")
    assert table.loc["a", "test_accuracy"] == pytest.approx(0.92)
    # t(0.975, 2 degrees of freedom) = 4.30265; standard deviation 0.02
    assert table.loc["a", "test_accuracy_ci95"] == pytest.approx(4.30265 * 0.02 / 3**0.5, rel=1e-5)
    assert np.isnan(table.loc["b", "test_accuracy_ci95"])
    rows.to_csv(tmp_path / "results.csv")
    done = subprocess.run(
        [sys.executable, "-m", "startsparse.report", tmp_path / "results.csv", "--by", "name",
         "--of", "test_accuracy"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "| name | runs | test_accuracy |",
        "| --- | --- | --- |",
        "| a | 3 | 0.9200 ± 0.0497 |",
        "| b | 1 | 0.5000 |",
    ]


def test_the_picture_is_a_picture(tmp_path):
    epochs = pd.DataFrame({"epoch": [1, 2], "train_loss": [1, 0.5], "valid_loss": [1.1, 0.6],
                           "train_accuracy": [0.5, 0.9], "valid_accuracy": [0.4, 0.8],
                           "density": [0.2, 0.2]})  # fmt: skip
    layers = pd.DataFrame({"layer": ["a", "total"], "density": [0.2, 0.2], "requested": [0.2, 0.2]})
    plots.plot_run_by_rank_0(epochs, layers, tmp_path / "curves.png")
    from PIL import Image

    with Image.open(tmp_path / "curves.png") as picture:
        pixels = torch.from_numpy(np.array(picture.convert("L")))
    assert pixels.shape[0] > 500
    assert 0.01 < (pixels < 200).double().mean() < 0.5


def test_no_point_hides_another_and_no_interval_is_cut(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    means = pd.DataFrame(
        [(density, start, 0.97, 0.01 if density > 0.1 else 0.6)
         for density in (0.5, 0.2, 0.1) for start in "abc"],
        columns=["density", "start", "test_accuracy", "test_accuracy_ci95"],
    )  # fmt: skip
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    plots.plot(means, ["density", "start"], "test_accuracy", tmp_path / "plot.png")
    (axis,) = figures[0].axes
    places = np.array([bars.lines[0].get_xdata() for bars in axis.containers])
    assert (np.diff(places, axis=0) < 0).all()  # side by side, in order
    assert (places.min(0)[:-1] > places.max(0)[1:]).all()  # each near its own density
    assert axis.get_ylim()[0] <= 37
