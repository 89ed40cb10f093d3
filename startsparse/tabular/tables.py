"""Tables: rows of numbers with a label.

Breast cancer (569 rows) and digits (1797) come with scikit-learn. The census tasks of the package
folktables (Ding et al. 2021, arXiv:2108.04884) are read from the Census Bureau's own files,
``<data root>/<year>/1-Year/psam_p<FIPS code>.csv``, where folktables looks for them too; a missing
file is downloaded. Any other ``.csv`` file with a label column can be named.
"""

import datetime
import io
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
        features: float32 [N, F], as they are in the source.
        labels: int64 [N], 0 to classes - 1.
        feature_names: F of them.
        class_names: one for each class.
    """

    features: Tensor
    labels: Tensor
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The three parts of a table, standardised: (features [N, F], labels [N]) each.

    Attributes:
        mean, scale: float32 [F], of the training part alone.
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
            there are no rows, or all have the same label.
    """
    if name in CENSUS:
        return _census(name, root, state, year)
    if name in TABLES:
        return _bundled(name)
    if name.endswith(".csv"):
        return _file(Path(name), label)
    raise OptionError(f"--table: {name!r} is none of {', '.join(TABLES)}, and no .csv file")


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
        raise UserError(f"{rows} rows are too few for training, validation and test")
    order = torch.randperm(rows, generator=seeding.generator(seed, "split"))
    # Each class is spread evenly over [0, 1), so any interval holds its share of the class.
    position = torch.empty(rows, dtype=torch.float64)
    for one in range(len(table.class_names)):
        members = order[table.labels[order] == one]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # From a shuffled order: ties would otherwise stay in the order of the file.
    order = order[position[order].argsort(stable=True)]
    chosen = order.split([tests, valids, rows - tests - valids])
    std, mean = torch.std_mean(table.features[chosen[2]].double(), dim=0, correction=0)
    # In float64 a constant column may come out as 1e-17 instead of 0.
    std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)
    features = ((table.features.double() - mean) / std).float()
    test_part, valid_part, train_part = ((features[r], table.labels[r]) for r in chosen)
    return Split(train_part, valid_part, test_part, mean.float(), std.float())


def _bundled(name: str) -> Table:
    # Imported here: importing scikit-learn takes a second.
    from sklearn.datasets import load_breast_cancer, load_digits

    bunch = load_breast_cancer() if name == "breast-cancer" else load_digits()
    return _table(bunch.data, bunch.target, bunch.feature_names, bunch.target_names, name)


def _file(path: Path, label: str) -> Table:
    if not label:
        raise OptionError(f"--label: name the column of {path} that is to be learned")
    frame = _read(path)
    if label not in frame:
        raise UserError(f"{path}: has no column '{label}'")
    _not_empty(frame, path)
    features = _numbers(frame.drop(columns=label), path)
    for column in features:
        if features[column].isna().any():
            line = int(features[column].isna().to_numpy().argmax()) + 2
            raise UserError(f"{path}: line {line}, column '{column}': is empty")
    labels, names = pd.factorize(frame[label], sort=True)
    if (labels < 0).any():
        raise UserError(
            f"{path}: line {int((labels < 0).argmax()) + 2}, column '{label}': is empty"
        )
    return _table(features.to_numpy(), labels, features.columns, names, str(path))


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
    frame = _read(path)
    names = list(problem.features)
    if "RELP" not in frame and "RELSHIPP" in frame:  # since 2019, with other codes
        frame = frame.rename(columns={"RELSHIPP": "RELP"})
        names[names.index("RELP")] = "RELSHIPP"
    for column in wanted:
        if column not in frame:
            raise UserError(f"{path}: has no column '{column}', which {name} needs")
    _not_empty(frame, path)
    frame = _numbers(frame[list(dict.fromkeys(wanted))], path)
    features, labels, _ = problem.df_to_numpy(frame)
    classes = {"ACSEmployment": ("not employed", "employed"), "ACSIncome": ("<= 50k", "> 50k")}
    return _table(features, labels, names, classes[name], f"{path}, {name}")


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


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, skipinitialspace=True, low_memory=False)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path}: is empty") from None
    except (OSError, ValueError) as error:  # of pandas and of decoding
        raise UserError(f"{path}: cannot be read as CSV ({reason(error)})") from error


def _not_empty(frame: pd.DataFrame, path: Path) -> None:
    if frame.empty:
        raise UserError(f"{path}: has no rows")


def _numbers(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The frame with all columns as numbers; an empty cell is NaN."""
    for column in frame:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            numbers = pd.to_numeric(frame[column], errors="coerce")
            bad = (numbers.isna() & frame[column].notna()).to_numpy()
            if bad.any():
                cell = frame[column].iloc[int(bad.argmax())]
                where = f"line {int(bad.argmax()) + 2}, column '{column}'"
                raise UserError(f"{path}: {where}: '{cell}' is not a number")
            frame = frame.assign(**{column: numbers})
    return frame


def _table(
    features: np.ndarray, labels: np.ndarray, names: Iterable, classes: Iterable, source: str
) -> Table:
    table = Table(
        torch.from_numpy(np.array(features, np.float64)).float(),
        torch.from_numpy(np.asarray(labels, np.int64)),
        tuple(map(str, names)),
        tuple(map(str, classes)),
    )
    if len(table.labels) == 0:
        raise UserError(f"{source}: no rows are left")
    labels_present = table.labels.unique()
    if len(labels_present) < 2:
        name = table.class_names[int(labels_present[0])]
        raise UserError(f"{source}: all {len(table.labels)} rows have the label {name!r}")
    finite = table.features.isfinite()
    if not finite.all():
        column = table.feature_names[int((~finite).any(0).int().argmax())]
        raise UserError(f"{source}: column '{column}' is not finite")
    return table
