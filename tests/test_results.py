"""results.csv: exact text, one row per run, checked at a run's start and made up for later.

`torture.results` tries the same with many inputs.
"""

import csv
import errno
import json
import os
import re
import shutil

import pytest
import torch
from script_runs import MLP, Crash, newest
from torch import nn

from ER_DST import main as dst
from ER_SLT import main as slt
from ER_SLT.options import SLTOptions
from startsparse import finding, places, report, results, runs
from startsparse.commandline import own_names
from startsparse.errors import OptionError, UserError
from startsparse.options import Options
from startsparse.trainer import Trainer
from STR import main as script
from STR import run_imp


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


# Cells


def test_a_carriage_return_ends_no_row(tmp_path):
    """Python 3.11 writes it without quotes."""
    path = tmp_path / "results.csv"
    results.add(path, [{"run": tmp_path / "a", "name": "x\ry", "other": "\n\r"}])
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["run", "name", "other"], ["a", "x\ry", "\n\r"]]
    assert results.read(path)["name"].tolist() == ["x\ry"]


def test_a_table_with_a_byte_order_mark_and_blank_lines(tmp_path):
    table = results.read(write(tmp_path / "t.csv", "\ufeffrun,x\n\na,007\n\n"))
    assert list(table) == ["run", "x"] and table.to_numpy().tolist() == [["a", "007"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("run,x\na,1,2\n", "line 2 has 3 cells instead of 2"),  # pandas shifts the columns
        ("run,x\na,1\n\n\nb\n", "line 5 has 1 cells instead of 2"),
        ("run,x,x\n", "two columns are called 'x'"),
        ('run\n"a', "line 2: unexpected end of data"),
        ("\n\n", "it is empty"),
    ],
)
def test_what_is_no_table_is_refused_with_its_line(tmp_path, text, reason):
    path = write(tmp_path / "results.csv", text)
    with pytest.raises(UserError) as caught:
        results.add(path, [{"run": tmp_path / "a"}])
    assert str(caught.value) == f"{path}: cannot be read as a table ({reason})"
    assert path.read_text() == text


def test_a_pipe_is_read_and_a_device_is_not(tmp_path):
    ends = os.pipe()
    os.write(ends[1], b"run,x\na,1\n")
    os.close(ends[1])
    assert results.read(tmp_path / f"/dev/fd/{ends[0]}")["x"].tolist() == ["1"]
    os.close(ends[0])
    with pytest.raises(UserError, match=r"^/dev/zero: cannot be read .*\(it is no file\)$"):
        results.read(tmp_path / "/dev/zero")


# Keys


def test_a_run_has_one_row_by_whatever_path(tmp_path):
    path, folder = tmp_path / "out/results.csv", tmp_path / "runs/net/seed-1"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    (tmp_path / "newest").symlink_to(folder)
    for number, run in enumerate((folder, tmp_path / "link/net/seed-1", tmp_path / "newest")):
        results.add(path, [{"run": run, "x": number}])
        assert results.has(path, folder) and results.has(path, run)
    assert results.read(path).to_numpy().tolist() == [["../runs/net/seed-1", "2"]]


def test_runs_behind_a_link_are_those_of_before(tmp_path):
    path, folder = tmp_path / "out/results.csv", tmp_path / "runs/seed-1"
    folder.mkdir(parents=True)
    results.add(path, [{"run": folder, "x": 1}])
    (tmp_path / "runs").rename(tmp_path / "large")
    (tmp_path / "runs").symlink_to(tmp_path / "large")
    results.add(path, [{"run": folder, "x": 2}])
    assert results.read(path).to_numpy().tolist() == [["../large/seed-1", "2"]]


def test_the_row_of_a_run_that_moved_moves_and_that_of_a_copy_stays(tmp_path):
    path, folder = tmp_path / "results.csv", tmp_path / "a/seed-1"
    folder.mkdir(parents=True)
    row = {"x": 1, "name": "net"}
    results.add(path, [{"run": folder, **row}])
    shutil.copytree(folder, tmp_path / "copy")
    results.add(path, [{"run": tmp_path / "copy", **row}])
    assert results.read(path)["run"].tolist() == ["a/seed-1", "copy"]
    (tmp_path / "a").rename(tmp_path / "b")
    results.add(path, [{"run": tmp_path / "b/seed-1", **row, "x": 2}])  # another result
    results.add(path, [{"run": tmp_path / "b/seed-1", **row}])
    assert results.read(path)["run"].tolist() == ["copy", "b/seed-1"]


def test_a_link_to_a_table_stays_one(tmp_path):
    path = tmp_path / "other/table.csv"
    path.parent.mkdir()
    (tmp_path / "results.csv").symlink_to(path)
    results.add(tmp_path / "results.csv", [{"run": tmp_path / "a"}])
    assert (tmp_path / "results.csv").is_symlink()
    assert results.read(path)["run"].tolist() == ["../a"]


def test_no_key_is_a_formula(tmp_path):
    assert results.key(tmp_path / "results.csv", tmp_path / "=a/seed-1") == "./=a/seed-1"
    assert results.folder(tmp_path / "results.csv", "./=a/seed-1") == tmp_path / "=a/seed-1"


# Places


def no_folder(path):
    write(path.parent, "")


def a_folder(path):
    path.mkdir(parents=True)


def a_loop(path):
    path.parent.mkdir()
    path.symlink_to(path.name)


def no_permission(path):
    path.parent.mkdir()
    write(path, "").chmod(0o444)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_folder, "{parent} is no folder"),
        (a_folder, "it is a folder"),
        (a_loop, "it is no regular file"),
        (no_permission, "it is read-only"),
    ],
)
def test_what_stands_in_the_way_of_a_file(tmp_path, monkeypatch, make, reason):
    path = tmp_path / "out/x.csv"
    make(path)
    if make is no_permission:  # an administrator may write all files
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OptionError) as caught:
        places.check_file("--plot", path)
    assert str(caught.value) == f"--plot: cannot write {path}: {reason.format(parent=path.parent)}"


def test_a_folder_that_a_link_promises(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nosuch")
    with pytest.raises(OptionError, match=r"^--log-dir: .*: .*/link leads nowhere$"):
        places.check_folder("--log-dir", tmp_path / "link/a")


def test_a_name_that_the_file_system_has_not(tmp_path):
    with pytest.raises(OptionError, match=r"^--log-dir: .*: 'é+\.\.\.' is longer than 255 bytes$"):
        places.check_folder("--log-dir", tmp_path / ("é" * 128))
    with pytest.raises(OptionError, match=r"^--log-dir: .*: the path is too long$"):
        places.check_folder("--log-dir", tmp_path.joinpath(*["x" * 200] * 20))


def test_a_disk_that_is_full_or_too_small(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = Options(log_dir=str(tmp_path / "runs"))
    network = nn.Linear(2**18, 4, bias=False)  # 4 MiB, and as much of momentum
    for free, fits in ((24, True), (23, False)):
        usage = shutil._ntuple_diskusage(2**40, 0, free * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if fits:
            finding.check_room_by_rank_0(options, None, network)
        else:
            with pytest.raises(OptionError, match=r"^--log-dir: .* has 23 MiB free, .* needs 24;"):
                finding.check_room_by_rank_0(options, None, network)
    monkeypatch.setattr(places.tempfile, "TemporaryFile", full)
    with pytest.raises(OptionError, match=r"^--log-dir: .*: No space left on device$"):
        finding.check_places_by_rank_0(options, None)


@pytest.mark.parametrize("main", [script.main, dst.main, slt.main], ids=["STR", "ER_DST", "ER_SLT"])
@pytest.mark.parametrize("option", ["--log-dir", "--result-dir"])
def test_a_file_in_the_place_of_a_folder(tmp_path, monkeypatch, main, option):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file", "")
    for value in ("file", "file/below"):
        with pytest.raises(OptionError, match=rf"^{option}: cannot write .*file is no folder$"):
            main([option, value])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_places_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file", "")
    (tmp_path / "out/table.md").mkdir(parents=True)
    argv = ["--config", str(script.CONFIGS / "digits.yaml")]
    for flags, message in (
        (
            ["--log-dir", "file"],
            r"^--log-dir: cannot write file/balanced-0.3-mag-weights-seed-1",
        ),
        (["--result-dir", "file"], r"^--result-dir: cannot write file/levels\.csv: "),
        (["--result-dir", "out"], r"^--result-dir: cannot write out/table\.md: it is a folder$"),
        (["--log-dir", "a\nb"], r"^--log-dir: 'a\\nb' has a control character; take another$"),
    ):
        with pytest.raises(OptionError, match=message):
            run_imp.main([*argv, *flags])


# Late failures


def later(monkeypatch, action):
    """Let ``action`` happen when the test set has been used."""
    test = Trainer.test

    def and_then(trainer):
        result = test(trainer)
        action()
        return result

    monkeypatch.setattr(Trainer, "test", and_then)


@pytest.mark.usefixtures("few_images", "no_pictures")
def test_a_table_that_breaks_while_a_run_trains(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out/results.csv"
    argv = [*MLP, "--log-dir", f"{tmp_path}/runs", "--result-dir", f"{tmp_path}/out"]
    path.parent.mkdir()
    with monkeypatch.context() as patch:
        later(patch, lambda: path.mkdir())
        with pytest.raises(UserError) as caught:
            script.main(argv)
    folder = newest(tmp_path)
    assert str(caught.value) == (
        f"{path}: cannot be read as a table (it is no file); the result is in {folder}"
        f"/summary.json, and --resume {folder} adds it to the table once that can be written"
    )
    accuracy = runs.summary(folder)["test_accuracy"]
    assert f"test accuracy        {100 * accuracy:.2f} %" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"it is no file\)$"):
        script.main([*argv, "--resume", "auto"])
    path.rmdir()
    for said in (True, False):
        script.main([*argv, "--resume", "auto"])
        assert ("row added to" in capsys.readouterr().out) == said
        (row,) = results.read(path).to_dict("records")
        assert results.folder(path, row["run"]) == folder and row["test_accuracy"] == str(accuracy)
        assert list(row)[:2] == ["run", "requested"] and row["er_sparse_init"] == "0.2"


def test_a_sweep_adds_rows_that_are_missing(tmp_path, monkeypatch):
    """And takes the numbers of levels as they are written."""
    options = script.STROptions(name="net", log_dir=str(tmp_path), threshold_list=(0.1,))
    with finding.open_run(options) as run:
        run.write_text(
            "levels.csv", "requested,density,test_accuracy\n0.1,0.1,0.30000000000000004\n"
        )
        run.write_json("summary.json", dict.fromkeys(runs.MEASURED, 1.0) | {"test_accuracy": 0.5})
    options.result_dir, options.resume = str(tmp_path / "out"), "auto"
    run_imp.collect([run_imp.Job("STR.main", [], options)], tmp_path / "out/levels.csv")
    (level,), (row,) = (
        results.read(tmp_path / f"out/{name}.csv").to_dict("records")
        for name in ("levels", "results")
    )
    assert level["test_accuracy"] == "0.30000000000000004" and level["requested"] == "0.1"
    assert row["test_accuracy"] == "0.5" and row["run"] == level["run"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0", "[" * 10**5])
def test_a_damaged_summary_is_named(tmp_path, text):
    write(tmp_path / "summary.json", text)
    message = r"summary\.json: is damaged \(.+\); remove it, and --resume "
    with pytest.raises(UserError, match=message):
        runs.summary(tmp_path)


def test_a_lock_that_nobody_releases(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "LOCK_SECONDS", 0.1)
    path = tmp_path / "results.csv"
    with results.locked(path), pytest.raises(UserError, match=r"has held its lock for 0\.1 second"):
        results.add(path, [{"run": tmp_path / "a"}])


# Names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "should be a name, or names with single slashes") for name in ("/abs", "../x")),
        *((name, "should be a name, or names with single slashes") for name in (".", "a/", "a//b")),
        ("a/../../x", "should be a name, or names with single slashes"),
        ("~", "has a name that begins with ~"),
        ("a/seed-1", "run folders are called seed-1"),
        *((f"{c}SUM(A1)", f"begins with {c}, and spreadsheets would compute it") for c in "=+-@"),
        *((f"a{c}b", "has a control character") for c in "\n\r\t\0\x1b\x7f\x85\u2028"),
        ("a\udc80", "is not UTF-8"),
        ("é" * 128, "is 256 bytes long"),
    ],
)
def test_names_that_are_refused(name, reason):
    with pytest.raises(OptionError) as caught:
        Options(name=name).check()
    assert str(caught.value).startswith("--name: ") and reason in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(OptionError, match=r"^--save-file: "), own_names(SLTOptions):
        SLTOptions(name=name).check()


@pytest.mark.parametrize("name", ["a b", "日本", "a/b", 'x, "y" | $z$', "_a", ".hidden", "007"])
def test_names_that_work_everywhere(tmp_path, name):
    options = Options(name=name, log_dir=str(tmp_path / "runs"), result_dir=str(tmp_path))
    options.check()
    finding.check_places_by_rank_0(options, None)
    with finding.open_run(options) as run:
        run.finish({"test_accuracy": 0.5, "seconds": 1.0})
        run.show("", {"x": 1.0}, 1)
    options.resume = "auto"
    assert finding.find_run_by_rank_0(options) == run.folder
    assert run.folder == tmp_path / "runs/digits" / name / "seed-1"
    report.main([f"{tmp_path}/results.csv", "--of", "test_accuracy", "--by", "name",
                 "--plot", f"{tmp_path}/x.svg"])  # fmt: skip


def test_other_texts_that_are_refused(tmp_path):
    for field, text in (("expt_setup", "=1"), ("expt_setup", "a\nb"), ("log_dir", "a\nb"),
                        ("result_dir", "\0"), ("start_from", "@x"), ("data", "a\rb")):  # fmt: skip
        with pytest.raises(OptionError, match=rf"^--{field.replace('_', '-')}: "):
            script.STROptions(**{field: text}).check()


# What a run began with


def interrupted(main, argv, tmp_path, monkeypatch, when):
    """The folder of a run that stopped at this method of its trainer."""

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, when, crash)
        main([*argv, "--log-dir", f"{tmp_path}/runs", "--result-dir", f"{tmp_path}/out"])
    return newest(tmp_path)


SCRIPTS = {
    "STR": (script.main, [*MLP, "--er-sparse-method", "network", "--er-sparsity-file"]),
    "ER_DST": (dst.main, ["--model", "mlp", "--width", "16", "--epochs", "1", "--method", "DST",
                          "--init-density", "0.2", "--sparse-init", "network", "--ratios-from"]),
    "ER_SLT": (slt.main, ["--model", "mlp", "--width", "16", "--levels", "1", "--epochs", "1",
                          "--er-sparse-method", "network", "--er-sparsity-file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("few_images", "no_pictures")
def test_the_densities_of_a_run_are_those_it_began_with(tmp_path, monkeypatch, name):
    main, argv = SCRIPTS[name]
    with torch.device("meta"):
        model = script.plan(script.STROptions(arch="mlp", width=16), script.data.SHAPES["digits"])[
            0
        ]
    layers = list(script.masks.sparse_layers(model))
    ratios = write(tmp_path / "r.json", json.dumps({x: 0.1 * n for n, x in enumerate(layers, 1)}))
    folder = interrupted(main, [*argv, str(ratios)], tmp_path, monkeypatch, "run_phases")
    table = "random_mask.csv" if name == "ER_SLT" else "density.csv"
    before = results.read(folder / table)["requested"].tolist()
    assert len(set(before)) > 2
    ratios.write_text(json.dumps(dict.fromkeys(layers, 0.5)))
    again = interrupted(main, [*argv, str(ratios), "--resume", "auto"], tmp_path, monkeypatch,
                        "run_phases")  # fmt: skip
    assert again == folder and results.read(folder / table)["requested"].tolist() == before
    (copy,) = folder.glob("sources/*/r.json")
    for change, what in ((lambda: copy.write_text(ratios.read_text()), "has changed"),
                         (copy.unlink, "is gone")):  # fmt: skip
        change()
        with pytest.raises(UserError) as caught:
            main(["--resume", str(folder)])
        assert str(caught.value) == (
            f"--resume: {copy} {what} since the run began; start the run anew"
        )


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("few_images", "no_pictures")
def test_options_edited_after_the_first_checkpoint_are_refused(tmp_path, monkeypatch, name):
    main, argv = SCRIPTS[name]
    folder = interrupted(main, argv[:-3], tmp_path, monkeypatch, "test")
    options = folder / "options.yaml"
    before = options.read_text()
    options.write_text(re.sub(r"(?m)^lr: .*$", "lr: 0.2", before))
    with pytest.raises(UserError, match=r"^--resume: .*/options\.yaml has --lr 0\.2, but the ru"):
        main(["--resume", str(folder)])
    options.write_text(before)
    main(["--resume", str(folder)])
    assert runs.summary(folder)
