"""CSV files as text: every cell as it is written, with the line that it is on.

Nothing is guessed. A file that does not say plainly what its cells are is refused, with the number
of the line as an editor counts it: blank lines and lines inside quotes count.
"""

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from startsparse.console import log
from startsparse.errors import UserError, one_line, reason
from startsparse.names import shortened
from startsparse.reading import read_bytes

SEPARATORS = ",;\t|"
_PACKED = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
    b"\x89HDF": "an HDF5 file",
    b"\xd0\xcf\x11\xe0": "a spreadsheet",
}
# what pandas calls a column without a name when it reads and writes a table again
_NO_NAME = re.compile(r"(Unnamed: \d+)?")


@dataclass(frozen=True)
class Cells:
    """The cells of a CSV file.

    Attributes:
        path: the file.
        columns: name -> cells, without spaces around them; "" where there is nothing else.
        lines: the line, from 1, on which each row begins.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def error(self, row: int, column: str, what: str) -> UserError:
        """An error that names the cell."""
        return UserError(f"{self.path}: line {self.lines[row]}, column {quoted(column)}: {what}")


def quoted(text: str, longest: int = 60) -> str:
    """Text of a file for a message: on one line, cut where it is long, in quotes."""
    return f"'{one_line(shortened(text, longest))}'"


def read(path: Path, names: Collection[str], *, only: bool = False) -> Cells:
    """The cells of a CSV file whose first line names the columns.

    Commas separate cells, or semicolons, tabs or bars if one of ``names`` is a column then. Text
    is UTF-8, with or without a byte order mark, or UTF-16 with one. Cells may be in quotes, and
    lines end in any way. Lines with nothing but spaces do not count. A first column without a name
    that numbers the rows is left out, with a warning.

    Args:
        names: columns that the file should have; a missing one is no error here.
        only: leave out all other columns.

    Raises:
        UserError: the file cannot be read or is empty, a row has more or fewer cells than there are
            columns, or a column has no name or that of another.
    """
    text = _text(path)
    rows = _rows(path, text, _separator(path, text, names))
    line, header = next(rows, (0, []))
    if not header:
        raise UserError(f"{path}: is empty")
    header = [name.strip() for name in header]
    kept = [i for i, name in enumerate(header) if not only or name in names]
    _check_names(path, header, kept)
    lines, picked = [], []
    pick = itemgetter(*kept, kept[0]) if kept else None  # with two it gives a tuple
    for number, row in rows:
        if len(row) != len(header):
            comment = any(first.lstrip().startswith("#") for first in (row[0], header[0]))
            raise UserError(
                f"{path}: line {number} has {_count(row, 'cell')}, but line {line} names "
                f"{_count(header, 'column')}" + ("; comments are not read" if comment else "")
            )
        lines.append(number)
        if pick:
            picked.append(pick(row)[:-1])
    cells = [[cell.strip() for cell in column] for column in zip(*picked)] or [[] for _ in kept]
    columns = dict(zip((header[i] for i in kept), cells))
    return Cells(path, _without_index(path, columns, header), lines)


def _count(cells: list[str], what: str) -> str:
    return f"{len(cells)} {what}" + ("s" if len(cells) > 1 else "")


def counts_up(cells: list[str]) -> bool:
    """Whether cells are the numbers of their rows, from 0 or from 1."""
    return any(
        all(cell == str(number) for number, cell in enumerate(cells, start)) for start in (0, 1)
    )


def _text(path: Path) -> str:
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as CSV ({reason(error)})") from error
    for start, what in _PACKED.items():
        if data.startswith(start):
            raise UserError(f"{path}: is {what}; unpack it, or save it, as CSV")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        what = "cannot be read as UTF-16" if wide else f"byte {data[error.start]:#x} is no UTF-8"
        line = _line(data[: error.start].decode("utf-16" if wide else "latin-1", "ignore"))
        raise UserError(f"{path}: line {line}: {what}; save the table as UTF-8") from None
    if (nul := text.find("\0")) >= 0:
        raise UserError(f"{path}: line {_line(text[:nul])}: has a NUL byte, so it is no text")
    return text


def _line(before: str) -> int:
    return 1 + before.count("\n") + before.count("\r") - before.count("\r\n")


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which a row begins, and its cells; without lines of spaces."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "has a quote that does not close, or text behind one that does"
            if "limit" in str(error):
                what = (
                    f"has a cell of more than {csv.field_size_limit()} characters; is a quote open?"
                )
            raise UserError(f"{path}: line {line} {what}") from None
        if len(row) > 1 or (row and row[0].strip()):
            yield line, row


def _separator(path: Path, text: str, names: Collection[str]) -> str:
    found = []
    for separator in SEPARATORS:
        try:
            _, header = next(_rows(path, text, separator), (0, []))
        except UserError:  # a quote that is none with this separator
            continue
        if len(header) > 1 and {name.strip(" \u00a0") for name in header} & set(names):
            found.append(separator)
    if len(found) > 1:
        raise UserError(
            f"{path}: its first line names columns with {quoted(found[0])} and with "
            f"{quoted(found[1])} between them; put names in quotes"
        )
    return found[0] if found else SEPARATORS[0]


def _check_names(path: Path, header: list[str], kept: list[int]) -> None:
    first: dict[str, int] = {}
    for position in kept:
        name = header[position]
        if position and _NO_NAME.fullmatch(name):
            raise _nameless(path, position, name)
        if name in first:
            raise UserError(
                f"{path}: columns {first[name] + 1} and {position + 1} are both called "
                f"{quoted(name)}; rename one"
            )
        first[name] = position


def _nameless(path: Path, position: int, name: str) -> UserError:
    so = f" of its own ({quoted(name)} is pandas' word for none)" if name else ""
    return UserError(f"{path}: column {position + 1} has no name{so}; name it, or delete it")


def _without_index(
    path: Path, columns: dict[str, list[str]], header: list[str]
) -> dict[str, list[str]]:
    """The columns but for a first one without a name, which must number the rows."""
    name = header[0]
    if name not in columns or not _NO_NAME.fullmatch(name):
        return columns
    if not counts_up(columns[name]):
        raise _nameless(path, 0, name)
    log.warning("warning: %s: column 1 has no name and numbers the rows; it is left out", path)
    return {other: cells for other, cells in columns.items() if other != name}
