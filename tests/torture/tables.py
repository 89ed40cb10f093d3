"""CSV files of one's own: read as they were meant, or refused by the line."""

import csv
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st
from standardised import assert_close, exact

from startsparse.console import log
from startsparse.errors import UserError
from startsparse.tabular import csv_file, tables
from torture.promises import promise


class Written(NamedTuple):
    """A table and how its file is written.

    Attributes:
        columns: name -> cells; the last column, "label", is to be learned.
        values: the numbers that the cells of each feature mean.
        gaps: number of blank lines before each row.
    """

    columns: dict[str, list[str]]
    values: list[list[float]]
    separator: str
    quoting: int
    end: str
    encoding: str
    padding: str
    gaps: list[int]

    def rows(self) -> list[list[str]]:
        """Cells, the header first."""
        return list(map(list, zip(*([name, *cells] for name, cells in self.columns.items()))))

    def write(self, path: Path, rows: list[list[str]]) -> list[int]:
        """Write the file; returns the line of each row, from 1."""
        text, lines = "", []
        for gap, row in zip(self.gaps, rows):
            text += gap * self.end
            lines.append(1 + len(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")) - 1)
            buffer = io.StringIO(newline="")
            csv.writer(buffer, delimiter=self.separator, quoting=self.quoting).writerow(row)
            text += buffer.getvalue().removesuffix("\r\n") + self.end
        path.write_bytes(text.encode(self.encoding))
        return lines


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
NAMES = st.builds(lambda first, rest: (first + rest).strip(), st.sampled_from("c=+-@#'\"ä"), TEXT)
CLASSES = st.one_of(
    NAMES,
    st.sampled_from(["NA", "None", "nan", "null", "True", "0", "1.0", "1", "1e5", "007", "inf"]),
)
OFFSETS = st.sampled_from([0.0, 1.0, -1.7e9, 1.7e18, 1e15, 1e300, 1e-300])
SPREADS = st.sampled_from([1.0, 50.0, 1e-3, 1e15, 1e300, 1e-300])
FORMS = st.sampled_from([repr, "{:.25e}".format, "{:+.17g}".format])


@st.composite
def numbers(draw: Any, rows: int) -> tuple[list[str], list[float]]:
    """Cells, and what they mean."""
    if draw(st.integers(0, 5)) == 0:
        truths = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        return list(map(str, truths)), list(map(float, truths))
    unit = st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1, allow_subnormal=False))
    offset, spread = draw(OFFSETS), draw(SPREADS)
    drawn = draw(st.lists(unit, min_size=rows, max_size=rows))
    values = [offset + spread * x for x in drawn]
    form = draw(FORMS)
    texts = [form(value) for value in values]
    return texts, [float(text) for text in texts]


@st.composite
def written(draw: Any) -> Written:
    """A table that can be read."""
    names = draw(st.lists(CLASSES, min_size=2, max_size=4, unique=True))
    more = draw(st.lists(st.sampled_from(names), min_size=4, max_size=12))
    labels = draw(st.permutations([*names, *names, *more]))
    features = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    cells = [draw(numbers(len(labels))) for _ in features]
    separator, padding = draw(st.sampled_from(",;\t|")), draw(st.sampled_from(["", " ", "\u00a0"]))
    return Written(
        columns={**{n: texts for n, (texts, _) in zip(features, cells)}, "label": labels},
        values=[values for _, values in cells],
        separator=separator,
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        end=draw(st.sampled_from(["\n", "\r\n", "\r"])),
        encoding=draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])),
        padding=padding,
        gaps=draw(st.lists(st.integers(0, 2), min_size=len(labels) + 1, max_size=len(labels) + 1)),
    )


@promise(
    "A CSV file is read as it was meant, whatever its separators, quotes, line ends and encoding; "
    "numbers are standardised to the last bits of float32",
    written(),
    cases=500,
    sample=15,
)
def a_table_is_read_as_it_was_meant(table, folder):
    path = folder / "t.csv"
    padded = [[f"{table.padding}{cell}{table.padding}" for cell in row] for row in table.rows()]
    table.write(path, padded)
    with patch.object(log, "disabled", True):
        found = tables.load(str(path), label="label")
    *features, label = table.columns
    assert found.feature_names == tuple(features)
    assert np.array_equal(found.features.numpy(), np.array(table.values).T)
    assert [found.class_names[one] for one in found.labels] == table.columns[label]
    _check_split(found)


def _check_split(table: tables.Table) -> None:
    """Standardised values against exact ones; the first column is replaced by the row's number."""
    rows, seed = len(table.labels), 1
    numbered = table.features.clone()
    numbered[:, 0] = torch.arange(rows)
    order = tables.split(tables.Table(numbered, table.labels, *_names(table)), seed)
    places = [x[:, 0] * order.scale[0] + order.mean[0] for x, _ in _parts(order)]
    places = [part.round().long().tolist() for part in places]
    try:
        split = tables.split(table, seed)
    except UserError as error:  # the columns hold what float32 cannot
        assert "is further from those of the training rows than float32" in str(error)
        worst = max(abs(exact(c, places[0])).max() for c in table.features.T.tolist())
        assert worst > 3e38
        return
    for column, values in enumerate(table.features.T.tolist()):
        wanted = exact(values, places[0])
        for part, (found, labels) in zip(places, _parts(split)):
            assert labels.tolist() == table.labels[part].tolist()
            assert_close(found[:, column].numpy(), wanted[part])


def _names(table: tables.Table) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return table.feature_names, table.class_names


def _parts(split: tables.Split) -> tuple:
    return split.train, split.valid, split.test


DAMAGE = {
    "a cell too many": (lambda row: [*row, "0"], "line {} has "),
    "a cell too few": (lambda row: row[1:], "line {} has "),
    "an empty cell": (lambda row: ["", *row[1:]], "line {}, column {}: is empty"),
    "an empty class": (lambda row: [*row[:-1], " "], "line {}, column 'label': is empty"),
    **{
        cell: (lambda row, cell=cell: [cell, *row[1:]], f"line {{}}, column {{}}: '{cell}' is ")
        for cell in ("abc", "NaN", "-inf", "1_0", "1e999", "1,5", "\u0661", "1e-999", "0x1", "- 1")
    },
}


@promise(
    "A malformed row of a CSV file is one line that names the file and the row's line in it",
    st.tuples(written(), st.sampled_from(sorted(DAMAGE)), st.integers(0, 10**6)),
    cases=500,
    sample=15,
)
def a_malformed_row_is_named(value, folder):
    table, kind, which = value
    rows, path = table.rows(), folder / "t.csv"
    row = 1 + which % (len(rows) - 1)
    change, message = DAMAGE[kind]
    rows[row] = change(rows[row])
    line = table.write(path, rows)[row]
    try:
        with patch.object(log, "disabled", True):
            tables.load(str(path), label="label")
    except UserError as error:
        said, name = str(error), csv_file.quoted(next(iter(table.columns)))
        assert said.startswith(f"{path}: {message.format(line, name)}") and said.isprintable(), said
    else:
        raise AssertionError("it was read")


@st.composite
def damaged(draw: Any) -> bytes:
    """Bytes, or those of a table with some replaced, put in or left out."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    with TemporaryDirectory() as folder:
        table = draw(written())
        table.write(path := Path(folder, "t.csv"), table.rows())
        content = path.read_bytes()
    bits = st.one_of(
        st.binary(max_size=3),
        st.sampled_from(
            [b'"', b",", b"\r", b"\n", b"\0", b"label", b" ", b"\xff\xfe", b"1e400", b";"]
        ),
    )
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 3)))
        content = content[:start] + draw(bits) + content[end:]
    return content


@promise(
    "Whatever bytes a .csv file holds, it is a table whose parts are finite, or one line names it",
    damaged(),
    cases=1000,
    sample=25,
)
def any_bytes_are_a_table_or_a_line(content, folder):
    path = folder / "t.csv"
    path.write_bytes(content)
    try:
        with patch.object(log, "disabled", True):
            table = tables.load(str(path), label="label")
            split = tables.split(table, 1)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable(), str(error)
        return
    assert all(features.isfinite().all() for features, _ in _parts(split))
    assert sum(len(labels) for _, labels in _parts(split)) == len(table.labels)
