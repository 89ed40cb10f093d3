"""CSV files of one's own: what is read as it is written, and what is refused, by line."""

import gzip
import os

import numpy as np
import pytest

from startsparse.console import log
from startsparse.errors import UserError
from startsparse.tabular import tables


@pytest.fixture
def load(tmp_path):
    def load(content, label="y"):
        path = tmp_path / "t.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tables.load(str(path), label=label)

    return load


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(log, "warning", lambda line, *values: said.append(line % values))
    return said


ROWS = "1,2.5,u\n-3,.5,v\n5,6e1,u\n7,8,v\n"
PLAIN = f"a,b,y\n{ROWS}"
ALIKE = {
    "\\r\\n": PLAIN.replace("\n", "\r\n"),
    "\\r": PLAIN.replace("\n", "\r"),
    "no last line end": PLAIN.rstrip(),
    "blank lines": "\n  \n" + PLAIN.replace("\n", "\n\n"),
    "byte order mark": "\ufeff" + PLAIN,
    "UTF-16": PLAIN.encode("utf-16"),
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace(",", "|"),
    "quotes": PLAIN.replace("u", '"u"').replace("a", '"a"').replace("2.5", '"2.5"'),
    "spaces": PLAIN.replace(",", " , "),
    "no-break spaces": PLAIN.replace("u", "\xa0u\xa0").replace("b", "b\xa0"),
}


def test_a_comma_in_a_name_between_tabs(load):
    assert load("a\tb,\ty\n1\t2\tu\n3\t4\tu\n5\t6\tv\n7\t8\tv\n").feature_names == ("a", "b,")


@pytest.mark.parametrize("content", ALIKE.values(), ids=ALIKE)
def test_one_table_however_it_is_written(load, content):
    table = load(content)
    assert table.feature_names == ("a", "b")
    assert table.features.tolist() == [[1, 2.5], [-3, 0.5], [5, 60], [7, 8]]
    assert table.class_names == ("u", "v")
    assert table.labels.tolist() == [0, 1, 0, 1]


CLASSES = {
    "missing is a name": (["NA", "None", "nan", "null"], ["NA", "None", "nan", "null"]),
    "spaces around do not count": (["yes", "yes ", " yes", "no", "\xa0no"], ["no", "yes"]),
    "numbers in their order": (["10", "9", "-1"], ["-1", "9", "10"]),
    "as text": (["007", "1e5", "7", "x"], ["007", "1e5", "7", "x"]),
    "truth": (["True", "False"], ["False", "True"]),
}


@pytest.mark.parametrize(("cells", "names"), CLASSES.values(), ids=CLASSES)
def test_classes_are_what_is_written(load, cells, names):
    table = load("a,y\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(2 * cells)))
    assert list(table.class_names) == names
    found = [table.class_names[label] for label in table.labels]
    assert found == [cell.strip() for cell in 2 * cells]


@pytest.mark.parametrize("pair", [("Yes", "yes"), ("1", "1.0"), ("é", "e\u0301"), ("a", "a\u200b")])
def test_classes_that_look_alike_are_two_and_named(load, warnings, pair):
    table = load("a,y\n" + "".join(f"{i * i},{name}\n" for i, name in enumerate(2 * pair)))
    assert sorted(table.class_names) == sorted(pair)
    (line,) = warnings
    assert "are two classes" in line and line.isprintable()


def test_numbers_to_the_last_bit(load):
    cells = ["0.1", "1e-5", "+3.", ".25", "9007199254740991", "1.7976931348623157e308", "5e-324"]
    table = load("a,y\n" + "".join(f"{cell},{i % 2}\n" for i, cell in enumerate(cells)))
    assert table.features[:, 0].tolist() == [float(cell) for cell in cells]
    # as float64 is written, with 16, 17 and 25 digits; 1e15 + 0, 1/8 and 1
    numbers = [1e15, 1e15 + 0.125, 1e15 + 1, 1e15]
    for form in (repr, "{:.17g}".format, "{:.25e}".format):
        cells = map(form, numbers)
        table = load("a,y\n" + "".join(f"{cell},{i % 2}\n" for i, cell in enumerate(cells)))
        assert table.features[:, 0].tolist() == numbers
    long = load(f"a,y\n1{5000 * '0'}e-5000,0\n1,0\n1.0,1\n1,1\n")  # int() refuses 5000 digits
    assert long.features[:, 0].tolist() == [1, 1, 1, 1]
    truth = load("a,y\nTrue,0\nfalse,1\nTRUE,0\nFalse,1\n")
    assert truth.features[:, 0].tolist() == [1, 0, 1, 0]


def test_columns_that_number_the_rows(load, warnings):
    rows = [f"{i},{i * i / 3},{i % 2}" for i in range(12)]
    table = load("\n".join([",a,y", *rows]))
    assert table.feature_names == ("a",)
    assert "column 1 has no name and numbers the rows; it is left out" in warnings.pop()
    assert load("\n".join(["Unnamed: 0,a,y", *rows])).feature_names == ("a",)
    warnings.clear()
    assert load("\n".join(["id,a,y", *rows])).feature_names == ("id", "a")
    assert "column 'id' numbers the rows" in warnings.pop() and not warnings
    assert load("\n".join(["age,a,y", *reversed(rows)])).feature_names == ("age", "a")
    assert not warnings


def test_copies_of_rows(load, warnings):
    load("a,y\n" + "1,u\n2,v\n3,u\n4,v\n" * 2)
    assert "4 of 8 rows are copies of others" in warnings.pop()


def test_names_that_are_numbers(load):
    assert load("0,1,y\n1,2,u\n3,4,u\n5,6,v\n7,8,v\n").feature_names == ("0", "1")
    with pytest.raises(UserError, match="the first line should name the columns, but has numbers"):
        load("5.1,3.5,u\n1,2,u\n3,4,v\n3,5,v", label="u")


def lines(*cells, header="a,y"):
    return "\n".join([header, *cells]) + "\n"


REFUSED = {
    "a cell too many in all rows": (
        "age,hours,y\n27,20,0,0\n28,21,1,1\n",
        "line 2 has 4 cells, but line 1 names 3 columns",
    ),
    "a cell too few": (lines("1,u", "2"), "line 3 has 1 cell, but line 1 names 2 columns"),
    "after blank lines": ("\n\na,y\n\n1,u\n \nx,v\n", "line 7, column 'a': 'x' is not a number"),
    "after a cell of two lines": (
        lines('1,"u\nw"', '2,"u\r\nw"', "x,v"),
        "line 6, column 'a': 'x' is not a number",
    ),
    "in a row of two lines": (lines("1,u", 'x,"v\nw"'), "line 3, column 'a': 'x' is not a number"),
    "after \\r": ("a,y\r1,u\r2,u\rx,v\r", "line 4, column 'a': 'x' is not a number"),
    "a comment": (lines("1,u", "# note"), "line 3 has 1 cell, .* comments are not read"),
    "an empty cell": (lines("1,u", ",v"), "line 3, column 'a': is empty"),
    "a cell of spaces": (lines("1,u", '"  ",v'), "line 3, column 'a': is empty"),
    "an empty class": (lines("1,u", '2,""'), "line 3, column 'y': is empty"),
    "no column of that name": (lines("1,u", header="a,Y"), "has no column 'y'; it has 'a', 'Y'"),
    "no other column": ("y\nu\nv\n", "has no column but 'y'"),
    "a column without a name": (lines("1,2,u", header="a,,y"), "column 2 has no name; name it"),
    "two indices of pandas": (
        lines("0,0,2,u", header=",Unnamed: 0,a,y"),
        r"column 2 has no name of its own \('Unnamed: 0' is pandas' word for none\); name it",
    ),
    "an index with gaps": (lines("1,2,u", "3,4,u", header=",a,y"), "column 1 has no name; name it"),
    "a name twice": (
        lines("1,2,u", header="a, a,y"),
        "columns 1 and 2 are both called 'a'; rename one",
    ),
    "an open quote": (lines("1,u", '2,"v', "3,u"), "line 3 has a quote that does not close"),
    "text behind a quote": (lines('1,"u"v'), "line 2 has a quote that does not close, or text beh"),
    "a quote open for pages": (lines('1,"' + "2,u\n" * 50_000), "line 2 has a cell of more than"),
    "missing": (lines("1,u", "NA,v"), "line 3, column 'a': 'NA' is not a number; fill in missing"),
    "a decimal comma": ("a;y\n1,5;u\n", "line 2, column 'a': '1,5' is not a number; decimals have"),
    "thousands": (lines('"1,500",u'), "line 2, column 'a': '1,500' is not a number; decimals have"),
    "infinite": (lines("1,u", "inf,v"), "line 3, column 'a': 'inf' is not a number"),
    "underscores": (lines("1_000,u"), "line 2, column 'a': '1_000' is not a number"),
    "other digits": (lines("\u0661,u"), "line 2, column 'a': '\u0661' is not a number"),
    "hexadecimal": (lines("0x10,u"), "line 2, column 'a': '0x10' is not a number"),
    "a date": (lines("2020-01-01,u"), "line 2, column 'a': '2020-01-01' is not a number"),
    "truth among numbers": (lines("1,u", "True,v"), "line 3, column 'a': 'True' is not a number"),
    "too large": (lines("1,u", "1e400,v"), "line 3, column 'a': '1e400' is beyond the numbers of"),
    "too small": (lines("1,u", "1e-400,v"), "line 3, column 'a': '1e-400' is beyond the numbers"),
    "a huge exponent": (lines("1e-999999999,u"), "line 2, column 'a': .* is beyond the numbers of"),
    "beyond float64's digits": (
        lines("9007199254740992,u", "9007199254740993,v"),
        "column 'a': its numbers differ by less than float64 can tell",
    ),
    "beyond its digits, by half": (
        lines("9007199254740992,u", "9007199254740995,v", "9007199254741000,u"),
        "column 'a': its numbers differ by less than float64 can tell",
    ),
    "neither true nor false": (lines("True,u", "1,v"), "line 3, column 'a': '1' is neither true"),
    "empty, not false": (lines(",u", "True,v"), "line 2, column 'a': is empty"),
    "two separators": ("y;a,y\n1;2\n", "its first line names columns with ',' and with ';'"),
    "numbers to predict": (
        lines(*(f"{i},{i / 7}" for i in range(50))),
        "column 'y' has 50 different values in 50 rows; --label names a column of classes",
    ),
    "one row of a class": (
        lines("1,u", "2,v", "3,u"),
        "line 3, column 'y': no other row is of the class 'v'",
    ),
    "one class": (lines("1,u", "2,u"), "all 2 rows have the label 'u'"),
    "one row": (lines("1,u"), "all 1 rows have the label 'u'"),
    "no rows": (lines(), "has no rows"),
    "nothing": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "a name of two lines": (lines("x,u", header='"a\nb",y'), r"line 3, column 'a\\nb': 'x' is not"),
    "latin-1": ("größe,y\n1,u\n".encode("latin-1"), "line 1: byte 0xf6 is no UTF-8; save"),
    "half of UTF-16": (PLAIN.encode("utf-16")[:-1], "line 5: cannot be read as UTF-16; save"),
    "NUL": ("a,y\n1,u\n2\0,v\n", "line 3: has a NUL byte, so it is no text"),
    "gzip": (gzip.compress(PLAIN.encode()), "is a gzip file; unpack it"),
    "a spreadsheet": (b"PK\x03\x04xyz", "is a zip archive or a spreadsheet; unpack it"),
    "Parquet": (b"PAR1xyz", "is a Parquet file; unpack it"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(load, tmp_path, content, message):
    with pytest.raises(UserError, match=f"^{tmp_path}/t.csv: {message}") as caught:
        load(content)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name, why in (
        ("folder", "Is a directory"), ("pipe", "is a pipe or a device"), ("none", "No such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}.csv: cannot be read as CSV \({why}"):
            tables.load(str(tmp_path / f"{name}.csv"), label="y")


def test_a_wide_table(load):
    names = [f"x{i}" for i in range(20_000)]
    header = ",".join([*names, "y"])
    table = load(
        lines(
            *(",".join(map(str, [*range(i, i + 20_000), i % 2])) for i in range(4)), header=header
        )
    )
    assert table.features.shape == (4, 20_000)
    assert np.array_equal(table.features[3], np.arange(3, 20_003))
