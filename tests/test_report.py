"""Tables and pictures of runs: what is averaged, what is told apart, how it looks."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ER_DST.options import DSTOptions
from ER_SLT.options import SLTOptions
from startsparse import masks, models, plots, report, results
from startsparse.commandline import plain_values
from startsparse.errors import OptionError, UserError
from startsparse.fields import normal
from startsparse.options import Options
from STR.options import STROptions

SCRIPTS = (STROptions, DSTOptions, SLTOptions)


def rows_of(*runs):
    """Rows of results.csv: each run is (seed, test accuracy, options that are not the default)."""
    made = []
    for number, (seed, accuracy, fields) in enumerate(runs):
        options = {"name": "net", "seed": seed, "lr": 0.1, "er_sparse_init": 0.2, "start_from": ""}
        row = {"run": f"runs/{number}", "density": 0.2, "test_accuracy": accuracy, "seconds": 1.0}
        made.append({**row, **options, **fields})
    return made


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Run the program on a table; returns the cells of its lines, and what it said besides."""

    def tell(rows, *flags):
        pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
        argv = ["report", str(tmp_path / "results.csv"), "--of", "test_accuracy", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        report.main()
        out, err = capsys.readouterr()
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
        return [lines[0], *lines[2:]], err

    return tell


def test_by_default_a_setting_is_all_options_that_vary(told):
    rows = rows_of(
        (1, 0.9, {}), (2, 0.8, {}), (1, 0.5, {"lr": 0.01}), (2, 0.7, {"lr": 0.01, "name": "b"})
    )  # fmt: skip
    (head, *lines), said = told(rows)
    assert head == ["lr", "runs", "test_accuracy"]
    assert [line[:2] for line in lines] == [["0.1", "2"], ["0.01", "2"]]
    # Student's t for two runs: 12.7062 standard deviations / sqrt(2)
    assert [line[2] for line in lines] == ["0.8500 ± 0.6353", "0.6000 ± 1.2706"]
    assert said == ""


def test_what_differs_within_a_setting_is_added_and_said(told):
    rows = rows_of(
        (1, 0.9, {}), (2, 0.8, {"lr": 0.01}), (1, 0.5, {"er_sparse_init": 0.5}),
        (2, 0.7, {"er_sparse_init": 0.5}),
    )  # fmt: skip
    (head, *lines), said = told(rows, "--by", "er-sparse-init")
    assert head == ["er_sparse_init", "lr", "runs", "test_accuracy"]
    assert [line[:3] for line in lines] == [["0.2", "0.1", "1"], ["0.2", "0.01", "1"],
                                            ["0.5", "0.1", "2"]]  # fmt: skip
    assert said == "note: differs within a setting and is added to --by: lr\n"


def test_what_changes_nothing_is_no_difference(told):
    """Folders and devices, which old tables have, too."""
    rows = rows_of((1, 0.9, {"log_dir": "a", "workers": 1}), (2, 0.8, {"log_dir": "b"}))
    (head, line), said = told(rows)
    assert (head, line[0], said) == (["runs", "test_accuracy"], "2", "")


def test_a_seed_that_repeats_is_named(told):
    rows = rows_of((1, 0.9, {}), (2, 0.8, {}), (1, 0.5, {}))
    for flags in ([], ["--by", "lr"]):
        with pytest.raises(UserError, match=r"^seed 1 repeats in one setting: runs/0, runs/2; "):
            told(rows, *flags)
    assert len(told(rows, "--by", "run")[0]) == 1 + 3


def test_the_seed_in_the_path_of_another_run_is_no_difference(told):
    rows = rows_of(*((s, 0.9, {"start_from": f"r/ERK/seed-{s}"}) for s in (1, 12, 2)),
                   (1, 0.5, {"start_from": "r/ERK/seed-12"}))  # fmt: skip
    (head, *lines), _ = told(rows)
    assert head[0] == "start_from"
    assert [line[:2] for line in lines] == [["r/ERK/seed-{seed}", "3"], ["r/ERK/seed-12", "1"]]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_options_are_known_by_the_names_of_the_script(kind):
    fields = [field.name for field in dataclasses.fields(kind)]
    table = pd.DataFrame(columns=fields)
    for field, name in zip(fields, plain_values(kind())):
        if field != name:
            assert results.OTHER_NAMES[normal(name)] == field
            assert results.column(table, name) == field
            assert results.column(table, name.replace("_", "-")) == field


def test_the_table_has_the_name_that_was_given(told):
    rows = rows_of((1, 0.9, {"set": "digits"}), (1, 0.9, {"set": "mnist"}))
    (head, *lines), _ = told(rows, "--by", "data", "init-density")
    assert head[:3] == ["data", "init_density", "runs"]
    assert [line[:2] for line in lines] == [["digits", "0.2"], ["mnist", "0.2"]]


def test_bad_names_are_named(told):
    rows = rows_of((1, 0.9, {}))
    with pytest.raises(OptionError, match=r"^--by: .*results\.csv has no column 'size'$"):
        told(rows, "--by", "size")
    with pytest.raises(OptionError, match=r"^--by: 'test_accuracy' is averaged, see --of; leave"):
        told(rows, "--by", "test-accuracy")
    with pytest.raises(OptionError, match=r"^--by: 'er-sparse-init' is named twice$"):
        told(rows, "--by", "er_sparse_init", "er-sparse-init")
    with pytest.raises(OptionError, match=r"^--of: the column 'name' of .* does not hold numbers$"):
        told(rows, "--of", "name")
    with pytest.raises(OptionError, match=r"^--of: .*results\.csv has no column 'arch'$"):
        told(rows, "--of", "arch")
    with pytest.raises(OptionError, match=r"^--nosuch: unknown option"):
        told(rows, "--nosuch")
    with pytest.raises(OptionError, match=r"^RESULTS: name a results\.csv$"):
        report.main([])
    with pytest.raises(OptionError, match=r"^--plot: a\.gif should end in \.png, \.pdf, \.svg$"):
        told(rows, "--plot", "a.gif")
    with pytest.raises(OptionError, match=r"^--plot: all runs have one setting; name an axis"):
        told(rows, "--plot", "a.pdf")


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n3,4,5\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_table(told, tmp_path, monkeypatch, content):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(UserError, match=r"bad\.csv: cannot be read as a table \("):
        report.main()


def test_densities_have_significant_digits():
    table = report.summarise(
        pd.DataFrame({"d": [1, 1, 2], "density": [0.00104, 0.00108, 0.2],
                      "test_accuracy": [0.05, 0.05, 0.5], "flops": [2e9, 2e9, 3e12]}),
        ["d"], ["density", "test_accuracy", "flops"],
    )  # fmt: skip
    cells = [line.split(" | ") for line in report.markdown(table, table.columns[2::2]).split("\n")]
    # 12.7062 * 0.00004 / 2
    assert cells[2][2:] == ["0.001060 ± 0.000254", "0.0500 ± 0.0000", "2e+09 ± 0 |"]
    assert cells[3][2:] == ["0.2000", "0.5000", "3e+12 |"]


def test_a_mean_of_too_few_values_is_none():
    table = report.summarise(pd.DataFrame({"x": [0.5, np.nan]}), [], ["x"])
    assert np.isnan(table["x"][0]) and table["runs"][0] == 2


# results.csv


def test_rows_of_two_folders_do_not_replace_each_other(tmp_path, monkeypatch):
    path = tmp_path / "results/results.csv"
    for where in ("a", "b"):
        (tmp_path / where).mkdir()
        monkeypatch.chdir(tmp_path / where)
        results.add(path, [{"run": Path("runs/seed-1"), "x": where}])
    results.add(path, [{"run": tmp_path / "a/runs/seed-1", "x": "again"}])
    table = results.read(path)
    assert table["run"].tolist() == ["../b/runs/seed-1", "../a/runs/seed-1"]
    assert table["x"].tolist() == ["b", "again"]
    # The whole folder is moved.
    (tmp_path / "new").mkdir()
    for where in ("results", "a", "b"):
        (tmp_path / where).rename(tmp_path / "new" / where)
    moved = tmp_path / "new/results/results.csv"
    results.add(moved, [{"run": tmp_path / "new/b/runs/seed-1", "x": "moved"}])
    assert results.read(moved)["x"].tolist() == ["again", "moved"]


def test_names_stay_text(tmp_path):
    path = tmp_path / "results.csv"
    values = ["007", "1e3", "nan", "None", "1.50", "", "a,b", "True"]
    for number, value in enumerate(values):
        results.add(path, [{"run": tmp_path / str(number), "name": value, "x": 0.1, "s": (1, 2)}])
    table = results.numbers(results.read(path))
    assert table["name"].tolist() == values
    assert table["x"].tolist() == [0.1] * 8 and table["s"].tolist() == ["1 2"] * 8


def bad_folder(where, kind):
    path = where / "out/results.csv"
    if kind == "a file in the way":
        (where / "out").write_text("")
    elif kind == "a folder in the way":
        path.mkdir(parents=True)
    else:
        path.parent.mkdir()
        path.write_text({"other columns": "table,x\n1,2\n", "no text": "\0", "empty": ""}[kind])
    return path


@pytest.mark.parametrize(
    "kind", ["a file in the way", "a folder in the way", "other columns", "empty"]
)
@pytest.mark.parametrize("script", ["STR", "ER_DST", "ER_SLT"])
def test_the_table_is_checked_before_training(tmp_path, monkeypatch, kind, script):
    main = __import__(f"{script}.main", fromlist=["main"])
    bad_folder(tmp_path, kind)
    monkeypatch.setattr(main.data, "load", lambda *_, **__: pytest.fail("data loaded"))
    monkeypatch.setattr("startsparse.data.load", lambda *_, **__: pytest.fail("data loaded"))
    name = {"STR": "--set", "ER_DST": "--data", "ER_SLT": "--dataset"}[script]
    with pytest.raises(OptionError, match=r"^--result-dir: .*results\.csv") as caught:
        main.main([name, "digits", "--log-dir", f"{tmp_path}/runs",
                   "--result-dir", f"{tmp_path}/out"])  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (saved.append(f), save(f, *a, **k)))
    return saved


def means(axis, accuracy, ci=0.01, runs=3, **columns):
    made = pd.DataFrame({"x": axis, "test_accuracy": accuracy, "runs": runs, **columns})
    return made.assign(test_accuracy_ci95=ci)


def drawn(axis):
    """x and y of the points, and the texts of the ticks."""
    line = axis.containers[0].lines[0]
    ticks = [label.get_text() for label in axis.get_xticklabels()]
    return np.array(line.get_xdata(), float), np.array(line.get_ydata(), float), ticks


def test_an_axis_with_a_zero(figures, tmp_path):
    plots.plot(
        means([0.008, 0, 0.004], [0.9, 0.8, 0.7]), ["x"], "test_accuracy", tmp_path / "a.png"
    )
    (axis,) = figures[0].axes
    at, y, ticks = drawn(axis)
    assert ticks == ["0", "0.004", "0.008"] and axis.get_xscale() == "linear"
    assert y[np.argsort(at)].tolist() == pytest.approx([80, 70, 90])
    assert np.isfinite(at).all() and len(set(at)) == 3


def test_densities_fall_to_the_right_and_other_numbers_rise(figures, tmp_path):
    table = means([0.2, 0.005], [0.9, 0.8]).rename(columns={"x": "er_init_density"})
    plots.plot(table, ["er_init_density"], "test_accuracy", tmp_path / "a.png")
    plots.plot(means([0.2, 0.005], [0.9, 0.8]), ["x"], "test_accuracy", tmp_path / "b.png")
    density, other = (figure.axes[0] for figure in figures)
    assert density.xaxis_inverted() and not other.xaxis_inverted()
    assert density.get_xscale() == other.get_xscale() == "log"
    assert drawn(density)[2] == ["0.2", "0.005"]
    assert density.get_xlabel() == "density of the random mask (kept / all weights)"
    assert density.get_ylabel() == "test accuracy (%)"


def test_one_seed_has_no_bar_and_that_of_two_does_not_stretch_the_axis(figures, tmp_path):
    table = means([0.1, 0.2, 0.5], [0.95, 0.96, 0.97], [np.nan, 0.9, 0.02], [1, 2, 3])
    plots.plot(table, ["x"], "test_accuracy", tmp_path / "a.png")
    (axis,) = figures[0].axes
    bars = axis.containers[0].lines[2][0].get_segments()
    heights = [np.ptp(np.array(bar)[:, 1]) if len(bar) else np.nan for bar in bars]
    assert np.isnan(heights[0]) and heights[1:] == pytest.approx([90 + 4, 4])
    assert 90 < axis.get_ylim()[0] < 95 and axis.get_ylim()[1] == 101


@pytest.mark.parametrize("numbers", [[0.5], ["a"]])
def test_a_single_point(figures, tmp_path, numbers):
    plots.plot(means(numbers, [0.5], np.nan, 1), ["x"], "test_accuracy", tmp_path / "a.svg")
    low, high = figures[0].axes[0].get_xlim()
    assert low < drawn(figures[0].axes[0])[0][0] < high


def test_a_setting_as_a_band(figures, tmp_path):
    """In each panel that of its own row, and no point; no column of the axis for it."""
    table = means(
        [1, 0.5, 0.2, 1, 0.5], [0.8, 0.7, 0.6, 0.5, 0.4], [0.02, 0.01, 0.01, np.nan, 0.01], name=""
    )
    table["name"] = ["dense", "ERK", "ERK", "dense", "ERK"]
    table["set"] = ["cora"] * 3 + ["citeseer"] * 2
    by = ["x", "name", "set"]
    plots.plot(table, by, "test_accuracy", tmp_path / "a.png", band="dense")
    left, right = figures[0].axes
    (span,) = left.patches
    assert span.get_xy()[1] == pytest.approx(78) and span.get_height() == pytest.approx(4)
    assert not right.patches  # of a single run
    for axis, middle, points in ((left, 80, [70, 60]), (right, 50, [40])):
        assert drawn(axis)[1].tolist() == pytest.approx(points) and len(axis.containers) == 1
        horizontal = [line for line in axis.lines if len(set(line.get_ydata())) == 1]
        assert middle in [line.get_ydata()[0] for line in horizontal]
        assert drawn(axis)[2] == ["0.5", "0.2"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ERK", "dense"]
    assert left.get_ylim() == pytest.approx((39 - 2.15, 82 + 2.15))


def test_a_band_that_is_none_is_named(told, tmp_path):
    rows = rows_of((1, 0.9, {}), (1, 0.5, {"lr": 0.01}))
    with pytest.raises(OptionError, match=r"^--band: goes with --plot$"):
        told(rows, "--band", "dense")
    with pytest.raises(OptionError, match=r"^--band: no setting is called 'dense'"):
        told(rows, "--by", "lr", "name", "--band", "dense", "--plot", str(tmp_path / "a.png"))


def test_five_options_are_told_apart(figures, tmp_path):
    table = means([1, 1, 2, 2], [0.1, 0.2, 0.3, 0.4], a="a", b="b", c=["c", "d"] * 2, d=[1, 2] * 2)
    plots.plot(table, ["x", "a", "b", "c", "d"], "test_accuracy", tmp_path / "a.png")
    assert len(figures[0].axes[0].containers) == 2


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_the_suffix_is_the_format(told, tmp_path, suffix, start):
    rows = rows_of((1, 0.9, {}), (1, 0.5, {"lr": 0.01}))
    told(rows, "--plot", str(tmp_path / f"a{suffix}"))
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)


def test_a_picture_that_cannot_be_written(told, tmp_path):
    (tmp_path / "file").write_text("")
    rows = rows_of((1, 0.9, {}), (1, 0.5, {"lr": 0.01}))
    path = tmp_path / "file/a.png"
    with pytest.raises(OptionError, match=r"^--plot: cannot write .*a\.png: .*file is no folder"):
        told(rows, "--plot", str(path))
    with pytest.raises(UserError, match=r"file/a\.png: cannot be written \("):
        plots.plot(means([0.2], [0.9]), ["x"], "test_accuracy", path)


def test_a_picture_shows_dollars_and_underscores(figures, told, tmp_path):
    rows = rows_of((1, 0.9, {"name": "$\\frac$"}), (1, 0.5, {"name": "_a"}))
    told(rows, "--by", "seed", "name", "--plot", str(tmp_path / "a.png"))
    (legend,) = figures[0].legends
    figures[0].canvas.draw()
    assert [text.get_text() for text in legend.get_texts()] == ["\\$\\frac\\$", " _a"]


def test_characters_that_the_font_lacks_are_one_line(told, tmp_path):
    rows = rows_of((1, 0.9, {"name": "日本"}), (1, 0.5, {"name": "b"}))
    _, said = told(rows, "--by", "name", "--plot", str(tmp_path / "a.png"))
    assert said == f"warning: {tmp_path}/a.png: the font of pictures has no 日 本\n"


def test_names_in_a_table_are_one_line(told):
    (_, *lines), _ = told(rows_of((1, 0.9, {"name": "a\n\x1b|b"}), (1, 0.5, {})), "--by", "name")
    assert [line[0] for line in lines] == ["a\\n\\x1b\\", "net"]  # the bar is escaped, too


def test_infinite_values_are_shown(told):
    (_, *lines), said = told(rows_of((1, np.inf, {}), (2, 0.5, {})))
    assert lines == [["2", "inf"]] and said == ""


@pytest.mark.parametrize("curves", ["", "epoch,train_accuracy\n1,0.5\n", "a\n", '"'])
def test_curves_of_damaged_runs(told, tmp_path, curves):
    (tmp_path / "runs/0").mkdir(parents=True)
    (tmp_path / "runs/0/epochs.csv").write_text(curves)
    with pytest.raises(UserError, match=r"runs/0/epochs\.csv:? (cannot be read|has no column)"):
        told(rows_of((1, 0.9, {})), "--curves", str(tmp_path / "a.png"))


@pytest.mark.parametrize(("density", "scale"), [(0.2, "linear"), (0.004, "log")])
def test_small_densities_of_a_run_can_be_read(figures, tmp_path, density, scale):
    epochs = pd.DataFrame({"epoch": [1, 2], "train_loss": [1, 0.5], "valid_loss": [1.1, 0.6],
                           "train_accuracy": [0.5, 0.9], "valid_accuracy": [0.4, 0.8],
                           "density": [1, density]})  # fmt: skip
    layers = pd.DataFrame({"layer": ["a", "b", "total"], "density": [density, 0, density],
                           "requested": [density, 0, density]})  # fmt: skip
    plots.plot_run_by_rank_0(epochs, layers, tmp_path / "curves.png")
    _, _, over_epochs, per_layer = figures[0].axes
    for axis in (over_epochs, per_layer):
        assert axis.get_yscale() == scale
        assert axis.get_ylabel() == "density (kept / all weights)"
        assert axis.get_ylim()[0] < density < axis.get_ylim()[1]


def test_curves_of_one_setting_and_two_seeds(figures, tmp_path):
    table = means([1, 2], [0.5, 0.6], runs=2).rename(columns={"x": "epoch"})
    for what in ("train", "valid"):
        table[f"{what}_accuracy"], table[f"{what}_accuracy_ci95"] = table["test_accuracy"], 0.4
    plots.plot_curves(table, [], tmp_path / "a.pdf")
    assert not any(band.get_paths() for band in figures[0].axes[0].collections)


# The table that a run prints


@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize("arch", ["resnet20", "resnet50"])
def test_the_density_table_fits_80_columns(arch, computes):
    model = models.build(
        arch, classes=1000, channels=3, size=224, width=0, imagenet=arch == "resnet50"
    )
    table = masks.density_table(model)
    table["requested"] = table["density"] = 0.0001234
    if computes:
        table["computes"], table["times_faster"] = "sparse", 12.345
        table.loc[1, ["computes", "times_faster"]] = ["", 0.5]
    text = masks.density_text(table).splitlines()
    assert max(map(len, text)) <= 80
    shown = [line.split()[0] for line in text[1:]]
    assert shown == table["layer"].tolist()  # in full
    assert "0.0001234" in text[1]
    assert not computes or ("12.3x" in text[1] and "(0.5x)" in text[2])


def test_layers_of_long_names_stay_apart():
    table = masks.density_table(models.build("resnet20", classes=10, channels=3, size=32, width=0))
    table["layer"] = ["encoder." * 9 + name for name in table["layer"]]
    text = masks.density_text(table).splitlines()
    assert max(map(len, text)) <= 80
    assert len({line.split()[0] for line in text}) == len(table) + 1


def test_the_options_name_what_the_table_calls_text():
    names = {field.name for kind in SCRIPTS for field in dataclasses.fields(kind)}
    assert results.TEXT - {"run"} <= names
    assert {field.name for field in dataclasses.fields(Options)} >= {"seed", "name"}


def test_differences_are_paired_by_seed():
    """By hand: 1 and 3 for the seeds that both have; 12.706 is Student's t for one degree."""
    one = pd.DataFrame({"seed": [3, 1, 2], "test_accuracy": [9.0, 5.0, 7.0]})
    other = pd.DataFrame({"seed": [1, 2, 4], "test_accuracy": [4.0, 4.0, 0.0]})
    value, half = report.paired(one, other)
    assert value == 2
    assert half == pytest.approx(12.706 * 2**0.5 / 2**0.5, rel=1e-4)
    assert all(map(np.isnan, report.paired(one, other[2:])))


@pytest.mark.parametrize(
    ("mean", "cell"), [(3.7, "4"), (0.034, "0.03"), (0.0, "0"), (2e6, "2e+06")]
)
def test_no_digit_after_the_point(mean, cell):
    assert report._cell(mean, float("nan"), 0, fixed=False) == cell
