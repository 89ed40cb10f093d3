"""results.csv: one row per finished run; in a sweep levels.csv too: one row per level of a run.

``run`` is the key: the run folder, relative to the folder of the file where both lie in one tree,
so that a folder of results can be moved and committed together with its runs. Cells stay the text
that was written, so that no name becomes a number. Measured columns come first, the last of them
``seconds``; options follow, by their names in the code.
"""

import csv
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
from filelock import Timeout

from startsparse import locks
from startsparse.atomic import remove_leftovers, replacing
from startsparse.errors import OptionError, UserError
from startsparse.fields import normal
from startsparse.names import CELLS, is_formula
from startsparse.options import Options
from startsparse.places import check_file

LOCK_SECONDS = 60  # to wait for another process, which needs a fraction of a second

# Columns of text, even where every cell looks like a number.
TEXT = {"run", *CELLS}

# Names of options on the command line of a script -> their names in the code and in tables.
OTHER_NAMES = {
    normal(name): field for field, names in Options.other_names.items() for name in names
} | {"data": "set", "global": "global_ranking"}


def read(path: Path) -> pd.DataFrame:
    """All cells as text, "" where there is none. Blank lines do not count.

    Raises:
        UserError: the file cannot be read, or is no table of commas with as many cells in each row.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # a pipe can be read once, as a file
            raise ValueError("it is no file")
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, rows = _cells(file)
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        reason = str(error.strerror)
    else:
        return pd.DataFrame(rows, columns=header, dtype=str)
    raise UserError(f"{path}: cannot be read as a table ({reason})")


def _cells(file: TextIO) -> tuple[list[str], list[list[str]]]:
    """Header and rows. Raises ValueError, which says in which line, unless they fit."""
    reader, header, rows = csv.reader(file, strict=True), [], []
    try:
        for row in filter(None, reader):
            if not header:
                header = row
            elif len(row) == len(header):
                rows.append(row)
            else:
                cells = f"{len(row)} cells instead of {len(header)}"
                raise ValueError(f"line {reader.line_num} has {cells}")
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    if not header:
        raise ValueError("it is empty")
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"two columns are called '{name}'")
    return header, rows


def write(path: Path, table: pd.DataFrame) -> None:
    """Write text cells as CSV that `read` gives back exactly; whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        for row in (list(table.columns), *table.to_numpy().tolist()):
            # Some versions of Python leave a carriage return bare, and then it ends the row.
            quoting = csv.QUOTE_ALL if "\r" in "".join(row) else csv.QUOTE_MINIMAL
            csv.writer(file, lineterminator="\n", quoting=quoting).writerow(row)


def read_runs(path: Path) -> pd.DataFrame:
    """`read` a table that `add` writes; one without rows where there is no file.

    Raises:
        UserError: it cannot be read, or has no column ``run``.
    """
    path = real(path)
    table = read(path) if path.exists() else pd.DataFrame({"run": []}, dtype=str)
    if "run" not in table:
        raise UserError(f"{path}: has no column 'run', so it is no table of runs")
    return table


def add(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows, which may have new columns, to a table that several processes may write.

    They replace older rows of their runs: a run has one result. They replace rows of the same
    content, too, whose run folder is gone: it was moved.

    Args:
        rows: ``run`` is the run folder.

    Raises:
        UserError: the table cannot be read or written; it stays as it was.
    """
    path = real(path)
    folders = {identity(Path(row["run"])) for row in rows}
    rows = [{k: cell(v) for k, v in {**row, "run": key(path, row["run"])}.items()} for row in rows]
    try:
        with locked(path):
            remove_leftovers(path.parent, path.name)
            table = read_runs(path)
            table = _without_moved(without(table, path, folders), path, rows)
            columns = list(table.columns)
            for row in rows:  # a new column goes behind the one that precedes it in the row
                for before, name in itertools.pairwise(row):
                    if name not in columns:
                        columns.insert(columns.index(before) + 1, name)
            added = pd.DataFrame(rows, columns=columns, dtype=str)
            table = pd.concat([table.reindex(columns=columns), added]).fillna("")
            write(path, table)
    except Timeout:
        raise UserError(
            f"{path}: another process has held its lock for {LOCK_SECONDS} seconds"
        ) from None
    except (OSError, NotImplementedError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason})") from None


def has(path: Path, run: Path) -> bool:
    """Whether the table has a row of this run. Raises `UserError` as `read_runs`."""
    path = real(path)
    table = read_runs(path)
    return len(without(table, path, {identity(run)})) < len(table)


def real(path: Path) -> Path:
    """The file that a path means: a link stays when its file is replaced."""
    return Path(os.path.realpath(path))


def key(path: Path, run: Path | str) -> str:
    """The cell ``run`` in the table ``path`` for this run folder."""
    run, here = Path(run).resolve(), real(path).parent
    apart = len(Path(os.path.commonpath([run, here])).parts) == 1
    cell = str(run) if apart else Path(os.path.relpath(run, here)).as_posix()
    return f"./{cell}" if is_formula(cell) else cell


def folder(path: Path, run: str) -> Path:
    """The run folder, absolute, that the cell ``run`` of the table ``path`` means."""
    return Path(os.path.normpath(real(path).parent / run))


def identity(folder: Path | str) -> object:
    """Equal for two paths of one folder, through links or not."""
    try:
        status = os.stat(folder)  # noqa: PTH116 - pathlib is slow with thousands of rows
        return status.st_dev, status.st_ino
    except OSError:
        return os.path.realpath(folder)
    except ValueError:  # a null character
        return str(folder)


def without(table: pd.DataFrame, path: Path, folders: set[object]) -> pd.DataFrame:
    """The rows of the table ``path`` that belong to none of the run folders of this `identity`."""
    here = f"{real(path).parent}/"
    same = [identity(run if run.startswith("/") else here + run) in folders for run in table["run"]]
    return table[~np.array(same, bool)]


def _without_moved(table: pd.DataFrame, path: Path, rows: list[dict[str, str]]) -> pd.DataFrame:
    """The rows but those that equal one of ``rows`` while their run folder is not there."""
    moved: list[int] = []
    places = table.reset_index(drop=True)
    for row in rows:
        names = [name for name in places.columns if name != "run" and name in row]
        if not names or len(names) < len(row) - 1 or not folder(path, row["run"]).is_dir():
            continue
        equal = places
        for name in names:
            equal = equal[equal[name] == row[name]]
        moved += [at for at, run in equal["run"].items() if not folder(path, run).is_dir()]
    return places.drop(index=moved)


def check(path: Path) -> None:
    """Raise `OptionError` unless `add` will be able to add to the table. Leaves nothing behind."""
    check_file("--result-dir", path)
    lock = _lock(real(path))
    if lock.exists():
        check_file("--result-dir", lock)
    try:
        read_runs(path)
    except UserError as error:
        raise OptionError(f"--result-dir: {error}; move it away or name another folder") from None


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside ``path``. Raises filelock.Timeout after `LOCK_SECONDS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locks.locked(_lock(path), "finish a run at the same moment", LOCK_SECONDS):
        yield


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with numbers in columns, not of `TEXT`, whose filled cells are all numbers."""
    table = table.copy()
    for name in table.columns.difference(list(TEXT)):
        values = pd.to_numeric(table[name].where(table[name] != ""), errors="coerce")
        if values.notna().any() and (values.notna() | (table[name] == "")).all():
            table[name] = values
    return table


def column(table: pd.DataFrame, name: str) -> str | None:
    """The column that a name of the command line means, with dashes or underscores, if any."""
    other = OTHER_NAMES.get(normal(name))
    columns = {normal(c): c for c in table.columns}
    return other if other in table else columns.get(normal(name))


def cell(value: Any) -> str:
    """A value as text of a table."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "" if value is None or value != value else str(value)  # NaN is not itself
