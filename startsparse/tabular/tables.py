"""Tables: rows of numbers with a label.

Breast cancer (569 rows) and digits (1797) come with scikit-learn. The census tasks of the package
folktables (Ding et al. 2021, arXiv:2108.04884) are read from the Census Bureau's own files,
``<data root>/<year>/1-Year/psam_p<FIPS code>.csv``, where folktables looks for them too; a missing
file is downloaded. Any other ``.csv`` file with a label column can be named; `csv_file` says how it
is read, and `columns` what its cells mean.
"""

import datetime
import io
import math
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from startsparse import seeding
from startsparse.atomic import replacing
from startsparse.data.files import TIMEOUT, reason
from startsparse.errors import OptionError, UserError
from startsparse.tabular import columns, csv_file
from startsparse.tabular.csv_file import Cells, quoted
from startsparse.tabular.standard import standardise

CENSUS = ("ACSEmployment", "ACSIncome")
TABLES = ("breast-cancer", "digits", *CENSUS)
# In the order of their FIPS codes, which leave out five numbers; Puerto Rico has 72.
_NAMES = (
    "AL AK AZ AR CA CO CT DE DC FL GA HI ID IL IN IA KS KY LA ME MD MA MI MN MS MO MT NE NV NH NJ "
    "NM NY NC ND OH OK OR PA RI SC SD TN TX UT VT VA WA WV WI WY"
)
_CODES = (code for code in range(1, 57) if code not in (3, 7, 14, 43, 52))
STATES = {**dict(zip(_NAMES.split(), _CODES)), "PR": 72}
URL = "https://www2.census.gov/programs-surveys/acs/data/pums"


@dataclass(frozen=True)
class Table:
    """A table in memory.

    Attributes:
        features: float64 [N, F], as they are in the source.
        labels: int64 [N], 0 to classes - 1.
        feature_names: F of them.
        class_names: one for each class.
        source: what the table is, for messages.
    """

    features: Tensor
    labels: Tensor
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    source: str = "the table"


@dataclass(frozen=True)
class Split:
    """The three parts of a table, standardised: (float32 features [N, F], labels [N]) each.

    Attributes:
        mean, scale: float64 [F], of the training part alone.
    """

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: Tensor
    scale: Tensor


def load(
    name: str, *, root: Path = Path("data"), state: str = "AL", year: int = 2018, label: str = ""
) -> Table:
    """The table ``name``.

    Args:
        name: one of `TABLES`, or the path of a ``.csv`` file.
        root: folder of the data sets (`startsparse.data.data_root`), for the census.
        state: two letters, for the census.
        year: of the 1-year survey of persons, for the census.
        label: column of the classes, for a file; the others are features.

    Raises:
        OptionError: no such table, state, year or column to learn.
        UserError: a file cannot be fetched or read, a column is missing, a cell is not a number,
            there are no rows, or all have the same label. The message names file, line and column.
    """
    if name in CENSUS:
        return _census(name, root, state, year)
    if name in TABLES:
        return _bundled(name)
    if is_file(name):
        return _file(Path(name), label)
    raise no_table(name)


def no_table(name: str) -> OptionError:
    """The error about a name that is none of a table."""
    return OptionError(f"--tables: {quoted(name)} is none of {', '.join(TABLES)}, and no .csv file")


def is_file(name: str) -> bool:
    """Whether ``name`` is the path of a table of one's own."""
    return name.lower().endswith(".csv")


def split(table: Table, seed: int, *, valid: float = 0.1, test: float = 0.2) -> Split:
    """Three parts with the same share of every class; they depend on ``seed`` alone.

    Features are standardised by mean and standard deviation of the training part. A column that is
    constant there is only centred.

    Args:
        valid, test: shares of all rows; their numbers do not depend on the seed.

    Raises:
        UserError: a part would be empty.
    """
    rows = len(table.labels)
    tests, valids = round(test * rows), round(valid * rows)
    if min(tests, valids, rows - tests - valids) < 1:
        raise UserError(
            f"{table.source}: {rows} rows are too few for training, validation and test"
        )
    order = torch.randperm(rows, generator=seeding.generator(seed, "split"))
    # Each class is spread evenly over [0, 1), so any interval holds its share of the class.
    position = torch.empty(rows, dtype=torch.float64)
    for one in range(len(table.class_names)):
        members = order[table.labels[order] == one]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # From a shuffled order: ties would otherwise stay in the order of the file.
    order = order[position[order].argsort(stable=True)]
    chosen = order.split([tests, valids, rows - tests - valids])
    features, mean, scale = standardise(table.features, chosen[2])
    if not features.isfinite().all():
        column = table.feature_names[int((~features.isfinite()).any(0).int().argmax())]
        raise UserError(
            f"{table.source}: column {quoted(column)}: a value is further from those of the "
            "training rows than float32 can say; leave the row or the column out"
        )
    test_part, valid_part, train_part = ((features[r], table.labels[r]) for r in chosen)
    return Split(train_part, valid_part, test_part, mean, scale)


def _bundled(name: str) -> Table:
    # Imported here: importing scikit-learn takes a second.
    from sklearn.datasets import load_breast_cancer, load_digits

    bunch = load_breast_cancer() if name == "breast-cancer" else load_digits()
    # As float32, which all results on them began from; it holds all digits of these numbers.
    features = bunch.data.astype(np.float32)
    return _table(features, bunch.target, bunch.feature_names, bunch.target_names, name)


def _file(path: Path, label: str) -> Table:
    if not label:
        raise OptionError(f"--label: name the column of {path} that is to be learned")
    cells = csv_file.read(path, [label])
    if label not in cells.columns:
        raise UserError(f"{path}: has no column {quoted(label)}; it has {_names(cells)}")
    names = [name for name in cells.columns if name != label]
    if not names:
        raise UserError(f"{path}: has no column but {quoted(label)}")
    columns.check_names(cells, names)
    _not_empty(cells)
    features = np.stack([columns.numbers(cells, name) for name in names], axis=1)
    labels, classes = columns.classes(cells, label)
    columns.warn_of_leaks(cells, names)
    return _table(features, labels, names, classes, str(path))


def _names(cells: Cells, most: int = 5) -> str:
    names = [quoted(name) for name in cells.columns]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _census(name: str, root: Path, state: str, year: int) -> Table:
    try:
        import folktables
    except ImportError:
        raise UserError(f"{name} needs the package folktables: pip install folktables") from None
    state = state.upper()
    if state not in STATES:
        raise OptionError(f"--state: {state!r} is none of {', '.join(STATES)}")
    if not 2014 <= year < datetime.date.today().year or year == 2020:
        raise OptionError(
            f"--year: {year} has no 1-year survey; choose from 2014 to last year, except 2020"
        )
    path = root / str(year) / "1-Year" / f"psam_p{STATES[state]:02}.csv"
    if year < 2017:
        path = path.with_name(f"ss{year % 100}p{state.lower()}.csv")
    if not path.exists():
        _fetch(f"{URL}/{year}/1-Year/csv_p{state.lower()}.zip", path)
    problem = getattr(folktables, name)
    # PWGTP, the weight of a person, is in the filter of ACSIncome.
    wanted = [*problem.features, problem.target, *(["PWGTP"] if name == "ACSIncome" else [])]
    cells = csv_file.read(path, {*wanted, "RELSHIPP"}, only=True)
    # The column of the relationship has this name and other codes since 2019.
    names = {n: "RELSHIPP" if n == "RELP" and n not in cells.columns else n for n in wanted}
    for name_now in names.values():
        if name_now not in cells.columns:
            raise UserError(f"{path}: has no column '{name_now}', which {name} needs")
    _not_empty(cells)
    frame = pd.DataFrame(
        {n: columns.numbers(cells, now, empty=math.nan) for n, now in names.items()}
    )
    features, labels, _ = problem.df_to_numpy(frame)
    classes = {"ACSEmployment": ("not employed", "employed"), "ACSIncome": ("<= 50k", "> 50k")}
    shown = [names[column] for column in problem.features]
    return _table(features, labels, shown, classes[name], f"{path}, {name}")


def _fetch(url: str, path: Path) -> None:
    """Download the file named like ``path`` from the zip archive ``url``, whole or not at all."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            archive = io.BytesIO(answer.read())
        with zipfile.ZipFile(archive) as files:
            content = files.read(path.name)
        with replacing(path) as part:
            part.write_bytes(content)
    except (OSError, HTTPException, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: missing, and fetching it from {url} failed ({reason(error)}): put it there "
            "yourself, or choose a table that needs no file, such as breast-cancer"
        ) from error


def _not_empty(cells: Cells) -> None:
    if not cells.lines:
        raise UserError(f"{cells.path}: has no rows")


def _table(
    features: np.ndarray, labels: np.ndarray, names: Iterable, classes: Iterable, source: str
) -> Table:
    table = Table(
        torch.from_numpy(np.array(features, np.float64)),
        torch.from_numpy(np.asarray(labels, np.int64)),
        tuple(map(str, names)),
        tuple(map(str, classes)),
        source,
    )
    if len(table.labels) == 0:
        raise UserError(f"{source}: no rows are left")
    labels_present = table.labels.unique()
    if len(labels_present) < 2:
        name = table.class_names[int(labels_present[0])]
        raise UserError(f"{source}: all {len(table.labels)} rows have the label {quoted(name)}")
    return table
