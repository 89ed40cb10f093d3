"""results.csv: one row per finished run; in a sweep levels.csv too: one row per level of a run.

``run`` is the key: the run folder, relative to the folder of the file where both lie in one tree,
so that a folder of results can be moved and committed together with its runs. Cells stay the text
that was written, so that no name becomes a number. Measured columns come first, the last of them
``seconds``; options follow, by their names in the code.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from startsparse.atomic import replacing
from startsparse.errors import OptionError, UserError
from startsparse.fields import normal
from startsparse.options import Options

# Columns of text, even where every cell looks like a number.
TEXT = {"run", "name", "expt_setup", "er_sparsity_file", "start_from", "target_expt_name"}

# Names of options on the command line of a script -> their names in the code and in tables.
OTHER_NAMES = {
    normal(name): field for field, names in Options.other_names.items() for name in names
} | {"data": "set", "global": "global_ranking"}


def read(path: Path) -> pd.DataFrame:
    """All cells as text, "" where there is none. Raises `UserError` if the file cannot be read."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a table ({reason})") from None
    return table


def read_runs(path: Path) -> pd.DataFrame:
    """`read` a table that `add` writes; one without rows where there is no file.

    Raises:
        UserError: it cannot be read, or has no column ``run``.
    """
    table = read(path) if path.exists() else pd.DataFrame({"run": []}, dtype=str)
    if "run" not in table:
        raise UserError(f"{path}: has no column 'run', so it is no table of runs")
    return table


def add(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows, which may have new columns, to a table that several processes may write.

    Args:
        rows: ``run`` is the run folder. They replace older rows of it: a run has one result.
    """
    rows = [{k: cell(v) for k, v in {**row, "run": key(path, row["run"])}.items()} for row in rows]
    with locked(path):
        table = read_runs(path)
        table = without(table, path, {folder(path, row["run"]) for row in rows})
        columns = list(table.columns)
        for row in rows:  # a new column goes behind the one that precedes it in the row
            for before, name in itertools.pairwise(row):
                if name not in columns:
                    columns.insert(columns.index(before) + 1, name)
        table = pd.concat([table, pd.DataFrame(rows, dtype=str)]).reindex(columns=columns)
        with replacing(path) as temporary:
            table.fillna("").to_csv(temporary, index=False)


def key(path: Path, run: Path | str) -> str:
    """The cell ``run`` in the table ``path`` for this run folder."""
    run, here = Path(run).resolve(), path.parent.resolve()
    apart = len(Path(os.path.commonpath([run, here])).parts) == 1
    return str(run) if apart else Path(os.path.relpath(run, here)).as_posix()


def folder(path: Path, run: str) -> Path:
    """The run folder, absolute, that the cell ``run`` of the table ``path`` means."""
    return (path.parent.resolve() / run).resolve()


def without(table: pd.DataFrame, path: Path, folders: set[Path]) -> pd.DataFrame:
    """The rows of the table ``path`` that belong to none of these run folders."""
    return table[~table["run"].map(lambda run: folder(path, run)).isin(folders)]


def check(path: Path) -> None:
    """Raise `OptionError` unless `add` will be able to add to the table. Leaves nothing behind."""
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            read_runs(path)
    except OSError as error:
        raise OptionError(f"--result-dir: cannot write {path}: {error.strerror}") from None
    except UserError as error:
        raise OptionError(f"--result-dir: {error}; move it away or name another folder") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise OptionError(f"--result-dir: {path} may not be written")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
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
