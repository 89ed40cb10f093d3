"""results.csv, its report, and the names of runs."""

import contextlib
import csv
import gzip
import io
import multiprocessing
import os
import shutil
import sys

import pandas as pd
import pytest
from hypothesis import strategies as st
from script_runs import few_digits

from ER_DST import main as dst
from ER_SLT import main as slt
from startsparse import data, finding, plots, report, results, runs
from startsparse.errors import UserError
from startsparse.trainer import Trainer
from STR import main as str_
from torture.promises import promise

# What a cell can hold: all of Unicode that UTF-8 has, and what programs like to change.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text("\r\n\t\0 ,;\"'=+-@|\ufeff", max_size=6),
    st.sampled_from(
        ["007", "1e5", "NA", "None", "nan", "1.50", "True", "01/02", "0.1" * 9, "12345678901234567"]
    ),
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["name", "x", "y z", "ü,"]), TEXTS, min_size=1), max_size=6
)


def _add(path, numbered):
    for number, row in numbered:
        results.add(path, [{"run": path.parent / str(number), **row}])


@promise("Cells of results.csv survive appends by any number of processes",
         st.tuples(ROWS, st.integers(1, 3)), cases=1000, sample=30)  # fmt: skip
def cells_survive(given, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # slow, and for the loss of power only
        _try_cells(*given, folder)


def _try_cells(rows, processes, folder):
    path, numbered = folder / "results.csv", list(enumerate(rows))
    if processes > 1:
        fork = multiprocessing.get_context("fork")
        parts = [numbered[i::processes] for i in range(processes)]
        workers = [fork.Process(target=_add, args=(path, part)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    else:
        _add(path, numbered)
    if not rows:
        return
    for table in (results.read(path), pd.read_csv(path, dtype=str, keep_default_na=False)):
        assert sorted(table["run"]) == sorted(map(str, range(len(rows))))
    table = results.read(path).set_index("run")
    for number, row in numbered:
        assert table.loc[str(number)].to_dict() == {name: row.get(name, "") for name in table}


# --- the report of odd files ----------------------------------------------------------------------

TABLE = "run,density,valid_accuracy,test_accuracy,seconds,name,seed,lr\n" + "".join(
    f"runs/{seed}-{lr},0.2,0.9,0.8,1.0,net,{seed},{lr}\n" for seed in (1, 2) for lr in (0.1, 0.2)
)


def _replaced(old, new):
    return TABLE.replace(old, new).encode()


ODD = {
    "as it is": TABLE.encode(),
    "0 bytes": b"",
    "blank": b"\n \n",
    "header only": TABLE.partition("\n")[0].encode(),
    "one column": b"run\nx\ny\n",
    "one number": b"1",
    "all empty": _replaced("0.2,0.9,0.8", ",,"),
    "NaN": _replaced("0.8", "nan"),
    "inf": _replaced("0.8", "inf"),
    "text in numbers": _replaced("0.8", "high"),
    "one text in numbers": TABLE.replace("0.8", "high", 1).encode(),
    "comma for point": _replaced("0.8", '"0,8"'),
    "columns twice": _replaced("valid_accuracy", "test_accuracy"),
    "no name of a column": _replaced(",name,", ",,"),
    "semicolons": _replaced(",", ";"),
    "tabs": _replaced(",", "\t"),
    "byte order mark": b"\xef\xbb\xbf" + TABLE.encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "Latin-1": TABLE.replace("net", "nét").encode("latin-1"),
    "gzip": gzip.compress(TABLE.encode()),
    "random bytes": bytes(range(256)) * 20,
    "zeros": bytes(5000),
    "open quote": TABLE.encode() + b'"abc',
    "quote within": _replaced("net", 'n"e"t'),
    "CR": _replaced("\n", "\r"),
    "CR LF": _replaced("\n", "\r\n"),
    "short row": TABLE.encode() + b"x,0.2\n",
    "long row": TABLE.encode() + b"x," * 99 + b"\n",
    "rows one longer": _replaced(",0.1\n", ",0.1,\n").replace(b",0.2\n", b",0.2,\n"),
    "half a row": TABLE.encode()[:-30],
    "dollars": _replaced("net", "$\\frac$"),
    "underscore": _replaced("net", "_net"),
    "newline in a name": _replaced("net", '"n\net"'),
    "control character": _replaced("net", "n\x1b[31m\0et"),
    "huge number": _replaced("0.8", "9" * 400),
    "long cell": _replaced("net", "n" * 200_000),
    "seed that repeats": _replaced("2-0", "1-0") + b"runs/1-0.1,0.2,0.9,0.8,1.0,net,1,0.1\n",
    "seed of text": _replaced(",1,0", ",one,0"),
    "no seed": _replaced("seed", "other"),
    "JSON": b'{"run": 1}',
    "a folder": None,
    "a link to itself": None,
    "nothing": None,
    "a device": None,
    "below a file": None,
}
FLAGS = [
    *([], ["--by", "lr"], ["--by", "lr", "name"], ["--by", "nosuch"], ["--by", "run"]),
    *(["--of", "density"], ["--of", "arch"], ["--of", "name"], ["--of", "run", "seed"]),
    *(["--plot", "x.png"], ["--by", "lr", "name", "--plot", "x.pdf"], ["--plot", "x.bmp"]),
    *(["--plot", "/nosuch\0/x.png"], ["--by", "lr", "--plot", "/proc/x.png"]),
    *(["--curves", "c.svg"], ["--curves", "x.csv"], ["--plot", "results.csv/x.png"]),
    *(["--digits", "-3"], ["--digits", "1000"], ["--digits", "x"], ["--nosuch"], ["--of"]),
    *(["--by", "lr", "name", "--band", "net", "--plot", "x.svg"], ["--band", "net"]),
    ["--by", "name", "--plot", "x.png"],
]


def _file(kind, folder):
    path = folder / "results.csv"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "below a file":
        path.write_bytes(b"")
        return path / "results.csv"
    elif kind != "nothing":
        path.write_bytes(ODD[kind])
    return path


@promise("The report of any file is a table, or one line",
         st.tuples(st.sampled_from(sorted(ODD)), st.sampled_from(FLAGS)), cases=1000,
         sample=40)  # fmt: skip
def a_report(given, folder):
    kind, flags = given
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", str(_file(kind, folder)), *flags])
        patch.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                report.main()
            except UserError as error:
                assert error.exit_code in (1, 2)
                assert str(error).isprintable() and len(str(error)) < 1000
                assert not [path for path in folder.iterdir() if path.suffix != ".csv"]
                return
    assert out.getvalue().startswith("| ")
    for line in err.getvalue().splitlines():
        assert line.startswith("note: ")


# --- results.csv is damaged while a run trains ----------------------------------------------------

TRAIN = ["--width", "4", "--batch-size", "64", "--sparse-compute", "off", "--epochs", "1"]
SCRIPTS = {
    "STR": (str_.main, ["--set", "digits", "--arch", "mlp", *TRAIN]),
    "ER_DST": (dst.main, ["--set", "digits", "--model", "mlp", *TRAIN]),
    "ER_SLT": (slt.main, ["--dataset", "DIGITS", "--model", "mlp", "--levels", "1", *TRAIN]),
}


def _folder(path):
    path.unlink()
    path.mkdir()


def _no_folder(path):
    shutil.rmtree(path.parent)
    path.parent.write_text("")


def _no_lock(path):
    lock = path.with_name(f".{path.name}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()


def _with(content):
    return lambda path: path.write_bytes(content)


DAMAGE = {
    "empty": _with(b""),
    "half a row": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "random bytes": _with(bytes(range(256))),
    "semicolons": lambda path: path.write_bytes(path.read_bytes().replace(b",", b";")),
    "no column run": lambda path: path.write_bytes(path.read_bytes().replace(b"run,", b"ran,")),
    "UTF-16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder in its place": _folder,
    "a file in the place of its folder": _no_folder,
    "a folder in the place of its lock": _no_lock,
    "a full disk": None,
}


def _refused(main, argv):
    """The message of a script that ends with an error."""
    try:
        main(argv)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def _full(*_):
    raise OSError(28, os.strerror(28))


@promise("A run whose results.csv is damaged meanwhile prints its result, and adds its row later",
         st.tuples(st.sampled_from(sorted(SCRIPTS)), st.sampled_from(sorted(DAMAGE))), cases=33,
         sample=3)  # fmt: skip
def a_damaged_table(given, folder):
    script, damage = given
    main, argv = SCRIPTS[script]
    path = folder / "out/results.csv"
    results.add(path, [{"run": folder / "other", "name": "007"}])
    before = path.read_bytes()
    argv = [*argv, "--log-dir", f"{folder}/runs", "--result-dir", f"{folder}/out"]
    test = Trainer.test

    def damaged(trainer):
        result = test(trainer)
        if damage == "a full disk":
            within.setattr(results, "write", _full)
        else:
            DAMAGE[damage](path)
        return result

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SETS, "digits", few_digits(128, 32))
        patch.setattr(plots, "plot_run_by_rank_0", lambda *_: None)
        with pytest.MonkeyPatch.context() as within, contextlib.redirect_stdout(out):
            within.setattr(Trainer, "test", damaged)
            message = _refused(main, argv)
        assert "results.csv" in message and "--resume" in message and message.isprintable()
        assert "test accuracy" in out.getvalue()
        (run,) = folder.glob("runs/*/*/seed-1")
        assert runs.summary(run)["test_accuracy"] >= 0
        shutil.rmtree(path.parent, ignore_errors=True)
        if path.parent.is_file():
            path.parent.unlink()
        path.parent.mkdir()
        path.write_bytes(before)
        for _ in range(2):  # the second finds the row
            with contextlib.redirect_stdout(out):
                main([*argv, "--resume", "auto"])
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            assert [row["name"] for row in rows] == ["007", ""]
            assert results.folder(path, rows[1]["run"]) == run
            assert float(rows[1]["test_accuracy"]) == runs.summary(run)["test_accuracy"]


# --- names ----------------------------------------------------------------------------------------

PARTS = ["..", ".", "", "a", "~", "seed-1", "seed-2-2", "b c", ".x"]
NAMES = st.one_of(
    st.text(max_size=20),
    st.text("./~ab\\ \n\0$_%=+-@,;\"'|é日", max_size=8),
    st.text("é", min_size=90, max_size=300),
    st.lists(st.sampled_from(PARTS), max_size=4).map("/".join),
)


@promise("A run of any name lies inside its log folder, or is refused in one line",
         st.tuples(NAMES, st.sampled_from(["name", "log_dir", "result_dir", "expt_setup"])),
         cases=1000, sample=60)  # fmt: skip
def a_name(given, folder):
    text, field = given
    options = str_.STROptions(log_dir=f"{folder}/runs", result_dir=f"{folder}/out")
    setattr(options, field, f"{folder}/x/{text}" if field.endswith("dir") else text)
    try:
        options.check()
        finding.check_places_by_rank_0(options, None)
    except UserError as error:
        assert error.exit_code == 2 and "\n" not in str(error) and len(str(error)) < 1000
        assert not list(folder.iterdir())
        return
    with finding.open_run(options) as run:
        inside = run.folder.relative_to(options.log_dir).parts
        assert ".." not in inside and len(inside) >= 3
        run.finish({"test_accuracy": 0.5, "seconds": 1.0})
        options.resume = "auto"
        assert finding.find_run_by_rank_0(options) == run.folder
    path = runs.results_csv(options)
    (row,) = results.read(results.real(path)).to_dict("records")
    assert row["name"] == options.name and row["expt_setup"] == options.expt_setup
    assert results.folder(path, row["run"]).samefile(run.folder)
    assert not row["run"].startswith(("=", "+", "-", "@"))
