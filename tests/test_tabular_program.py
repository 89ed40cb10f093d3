"""python -m startsparse.tabular: what it refuses at its start, and what it writes."""

import pandas as pd
import pytest
import torch
from torch import nn

from startsparse import plots, training
from startsparse.console import log
from startsparse.data.rows import Rows
from startsparse.errors import OptionError, UserError
from startsparse.tabular import TabularOptions, experiment, program, report
from startsparse.tabular.options import FILES, alone

QUICK = [
    "--seeds", "1", "--width", "4", "--epochs", "1", "--final-epochs", "1", "--starts", "1",
    "--densities", "0.5", "--reset", "no", "--sparse-compute", "off",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two tables, in which the program runs."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i * i},{i % 7 + 0.5},{'no' if i < 20 else 'yes'}\n" for i in range(40))
    (tmp_path / "t.csv").write_text("a,b,y\n" + rows)
    (tmp_path / "few.csv").write_text("a,y\n1,u\n2,u\n3,v\n5,v\n")
    return tmp_path


@pytest.fixture
def never_trains(monkeypatch):
    monkeypatch.setattr(program.experiment, "run", lambda *_: pytest.fail("trained"))


REFUSED = {
    "no label": (["--tables", "t.csv"], "--label: name the column of t.csv that is to be learned"),
    "a label of no file": (["--label", "y"], "--label: has no effect without a .csv file in --tab"),
    "a state": (["--state", "CA"], "--state: has no effect without ACSEmployment or ACSIncome"),
    "a year": (["--year", "2017"], "--year: has no effect without ACSEmployment or ACSIncome"),
    "an unknown one later": (
        ["--tables", "t.csv", "iris", "--label", "y"],
        "--tables: 'iris' is none of breast-cancer, digits, ACSEmployment, ACSIncome, and no .csv",
    ),
    "a formula": (
        ["--tables", "=1+1.csv", "--label", "y"],
        "--tables: spreadsheets would compute '=1[+]1.csv'; write './=1[+]1.csv'",
    ),
    "two lines": (["--tables", "a\nb.csv", "--label", "y"], r"--tables: 'a\\nb.csv' has a control"),
    "no folder": (["--result-dir", ""], "--result-dir: name a folder"),
    "inside a file": (
        ["--result-dir", "t.csv/x"],
        "--result-dir: cannot write t.csv/x/results.csv",
    ),
    "a device": (["--device", "gpu"], "--device: 'gpu' is none of auto, cpu, cuda, and no GPU su"),
    "no number": (["--device", "cuda:x"], "--device: 'cuda:x' is none of auto, cpu, cuda, and no "),
    "width": (["--width", "1048577"], "--width: 1048577 should be at least 1 and at most 1048576"),
}


@pytest.mark.usefixtures("never_trains")
@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_are_refused(here, argv, message):
    before = sorted(here.iterdir())
    with pytest.raises(OptionError, match=f"^{message}") as caught:
        program.main([*QUICK, *argv])
    assert str(caught.value).isprintable()
    assert sorted(here.iterdir()) == before


LATER = {
    "a second table that is too small": (
        ["--tables", "t.csv", "few.csv", "--label", "y"],
        "few.csv: 4 rows are too few for training, validation and test",
    ),
    "a low density": (
        ["--densities", "0.5", "1e-4"],
        "--densities: 0.0001 leaves no weight of 160; ask for more",
    ),
    "a low start": (["--starts", "1e-4"], "--starts: 0.0001 leaves no weight of 160; ask for more"),
    "memory": (
        ["--width", "1000000"],
        r"--width: 1 networks of 2,000,032,000,000 weights need 37,253 GiB of memory, and",
    ),
}


@pytest.mark.usefixtures("never_trains")
@pytest.mark.parametrize(("argv", "message"), LATER.values(), ids=LATER)
def test_what_cannot_be_trained_is_found_before_training(here, argv, message):
    with pytest.raises(UserError, match=f"^{message}"):
        program.main([*QUICK, *argv])
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("never_trains")
@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_result(here, name):
    (here / "out" / name).mkdir(parents=True)
    with pytest.raises(
        OptionError, match=f"^--result-dir: cannot write out/{name}: it is a folder"
    ):
        program.main([*QUICK, "--result-dir", "out"])


@pytest.mark.usefixtures("never_trains")
@pytest.mark.parametrize("content", [b": :", b"- a\n", b"\xff\xfe\x00", b"lr: x\n", b"odd: 1\n"])
def test_options_of_results_that_cannot_be_read(here, content):
    (here / "out").mkdir()
    (here / "out/results.csv").write_text("start\n")
    (here / "out/options.yaml").write_bytes(content)
    with pytest.raises(
        OptionError, match="^--result-dir: out/options.yaml: .*; name another folde"
    ):
        program.main([*QUICK, "--result-dir", "out"])


def test_results_of_other_options_are_named_as_on_the_command_line(here, monkeypatch):
    program.main([*QUICK, "--result-dir", "out"])
    monkeypatch.setattr(program.experiment, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(
        OptionError, match="is of a run with --form batched, not loop; name another"
    ):
        program.main([*QUICK, "--result-dir", "out", "--form", "loop"])
    with pytest.raises(
        OptionError, match="is of a run with --seeds 1, not 1 2; name another folder"
    ):
        program.main([*QUICK, "--result-dir", "out", "--seeds", "1", "2"])


def test_equal_commands_write_equal_bytes(here):
    argv = [*QUICK, "--tables", "t.csv", "breast-cancer", "--label", "y", "--starts", "1", "0.5"]
    for out in ("one", "two"):
        program.main([*argv, "--result-dir", out])
    for name in FILES:
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes(), name


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no\nfont")])
def test_a_picture_that_fails_costs_a_line(here, monkeypatch, error):
    def fail(*_):
        raise error

    said = []
    monkeypatch.setattr(log, "warning", lambda line, *values: said.append(line % values))
    monkeypatch.setattr(plots, "save", fail)
    program.main([*QUICK, "--result-dir", "out"])
    assert len(pd.read_csv(here / "out/results.csv")) == 2
    (line,) = said
    assert line.startswith("warning: out/plot.png: not drawn (no") or "No space left" in line
    assert line.isprintable()


@pytest.mark.usefixtures("never_trains")
def test_two_runs_do_not_write_into_one_folder(here):
    with alone(here / "out"), pytest.raises(OptionError, match="another run writes into out; wait"):
        program.main([*QUICK, "--result-dir", "out"])


def test_a_table_that_cannot_be_written_is_printed(here, monkeypatch):
    def fail_later(path, text):
        if path.name == "table.md":
            raise OSError(28, "No space left on device")
        path.write_text(text)

    said = []
    monkeypatch.setattr(program, "write_text", fail_later)
    with pytest.raises(OSError, match="No space left"):
        program.main([*QUICK, "--result-dir", "out"], say=said.append)
    assert said[0].startswith("| table |") and len(pd.read_csv(here / "out/results.csv")) == 2


def rows_at(accuracy, **more):
    return pd.DataFrame([{
        "start": 1.0, "reset": False, "flow": False, "requested": 0.1, "density": 0.1, "seed": 1,
        "test_accuracy": accuracy, "majority": 72 / 114, "cut": False, "empty_layers": "", **more,
    }])  # fmt: skip


def test_a_network_at_the_majority_class_has_collapsed():
    """0.6315789 of float32 is below 72 / 114, so such a network was not counted."""
    member = experiment.make_member(
        experiment.tables.load("breast-cancer"), TabularOptions(width=4), 1.0, False, False, 1
    )
    row = experiment.measure(member, 1.0)
    assert row["majority"] == 72 / 114 and member.test.labels.bincount().tolist() == [42, 72]
    assert len(report.collapses(rows_at(72 / 114))) == 1
    assert not report.collapses(rows_at(73 / 114))


def test_outputs_that_are_not_finite_say_nothing():
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    rows = Rows(
        torch.full((4, 1), 1e38),
        torch.tensor([0, 0, 1, 1]),
        batch_size=4,
        device=torch.device("cpu"),
    )
    network[1].weight.data.fill_(1e38)
    with pytest.raises(training.NonFiniteLoss, match="the loss on rows that were not trained on"):
        experiment.accuracy(network, rows)


ODD = ["=1+1", "a|b", "two\nlines", "$x_1^$", "ünïcode", "a,b", "tab\t", "x" * 200]


def test_odd_names_in_tables_and_pictures(tmp_path):
    rows = pd.concat([rows_at(0.9, table=name) for name in ODD])
    lines = report.markdown(rows).splitlines()
    assert len(lines) == 2 + len(ODD)
    assert lines[3].startswith(r"| a\|b | dense") and lines[4].startswith(r"| two\nlines | dense")
    figure = report.accuracy_plot(rows)
    plots.save(figure, tmp_path / "a.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "=1+1: no reset" and titles[3] == "$x_1^$: no reset"
    picture = report.mask_picture({"$m": torch.ones(3, len(ODD), dtype=torch.bool)}, ODD)
    plots.save(picture, tmp_path / "b.png")
    ticks = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    assert ticks[:7] == ["=1+1", "a|b", r"two\nlines", "$x_1^$", "ünïcode", "a,b", r"tab\t"]
    assert ticks[7] == "..." + "x" * 77
