"""Columns of a CSV file as numbers and classes; a cell that is neither is refused by its line."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from decimal import Decimal
from fractions import Fraction

import numpy as np

from startsparse.console import log
from startsparse.errors import UserError
from startsparse.tabular.csv_file import Cells, counts_up, quoted

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_OTHER = re.compile(r"[^0-9eE.+-]")
_NOT_ZERO = re.compile(r"[+-]?[0.]*[1-9]")
_TRUTH = {"true": 1.0, "false": 0.0}
_MISSING = {"na", "n/a", "nan", "null", "none", "nil", "?", "-", ".", "#n/a", "<na>", "missing"}
_MANY = 20  # classes, from which on a column may be one of numbers or names instead


def number(text: str) -> float | None:
    """The number that a cell is, rounded to float64; None if it is none, or beyond float64."""
    found = _floats([text])
    return None if found is None else float(found[0])


def _floats(texts: list[str]) -> np.ndarray | None:
    """float64 [N], or None if a text is no number, or beyond float64."""
    if _OTHER.search("".join(texts)):  # float takes more than numbers: 1_000, nan, digits of Arabic
        return None
    try:
        found = np.array(list(map(float, texts)), np.float64)
    except ValueError:
        return None
    zeros = {texts[row] for row in np.flatnonzero(found == 0)}
    beyond = np.isinf(found).any() or any(map(_NOT_ZERO.match, zeros))
    return None if beyond else found


def numbers(cells: Cells, column: str, *, empty: float | None = None) -> np.ndarray:
    """A column as float64 [N]. Cells are numbers, or all are true or false, which are 1 and 0.

    Args:
        empty: value of an empty cell; None: such a cell is an error.

    Raises:
        UserError: a cell is no number; or float64 cannot hold what the numbers differ in, as with
            2^53 and 2^53 + 1.
    """
    texts = cells.columns[column]
    blank = np.array([not text for text in texts])
    filled = texts if empty is None else [text or "0" for text in texts]
    if next(filter(None, texts), "").lower() in _TRUTH:
        for row, text in enumerate(texts):
            if text.lower() not in _TRUTH:
                what = f"{quoted(text)} is neither true nor false" if text else "is empty"
                raise cells.error(row, column, what)
        return np.array([_TRUTH[text.lower()] for text in texts])
    found = _floats(filled)
    if found is None:
        row = next(row for row, text in enumerate(filled) if number(text) is None)
        raise cells.error(row, column, _not_a_number(texts[row]))
    _check_rounding(cells, column, found[~blank])
    return found if empty is None else np.where(blank, empty, found)


def _not_a_number(text: str) -> str:
    if not text:
        return "is empty"
    if _NUMBER.fullmatch(text):
        return f"{quoted(text)} is beyond the numbers of float64"
    hint = ""
    if text.lower() in _MISSING:
        hint = "; fill in missing values, or delete the row"
    elif _NUMBER.fullmatch(text.replace(",", "")):
        hint = "; decimals have a point, and thousands no mark"
    return f"{quoted(text)} is not a number{hint}"


def _check_rounding(cells: Cells, column: str, found: np.ndarray) -> None:
    """Raise where float64 loses more than a millionth of what the numbers of a column differ in.

    Texts that numbers of float64 are written as, with any number of digits, lose nothing.
    """
    with np.errstate(over="ignore"):
        if not len(found) or np.abs(found).max() <= 2.0**32 * np.ptp(found):
            return
    exact = {text: Fraction(Decimal(text)) for text in set(cells.columns[column]) if text}
    lost = [abs(v - Fraction(float(text))) for text, v in exact.items() if not _of_float64(text)]
    if lost and max(lost) * 2**20 > max(exact.values()) - min(exact.values()) > 0:
        raise UserError(
            f"{cells.path}: column {quoted(column)}: its numbers differ by less than float64 can "
            "tell; subtract what they have in common, or leave it out"
        )


def _of_float64(text: str) -> bool:
    """Whether a number of float64, written with as many digits, is ``text``."""
    digits = len("".join(map(str, Decimal(text).as_tuple().digits)).lstrip("0"))
    return Decimal(f"{float(text):.{max(digits, 1) - 1}e}") == Decimal(text)


def classes(cells: Cells, column: str) -> tuple[np.ndarray, list[str]]:
    """Labels int64 [N] and the names of the classes: by number if all are numbers, else as text.

    A class is what is written: ``NA`` and ``None`` are names like others, and ``1`` and ``1.0`` are
    two. A warning names classes that look alike.

    Raises:
        UserError: a cell is empty, a class has one row, or the column seems to be no classes.
    """
    texts = cells.columns[column]
    if "" in texts:
        raise cells.error(texts.index(""), column, "is empty")
    rows = Counter(texts)
    values = {name: number(name) for name in rows}
    by_number = None not in values.values()
    names = sorted(rows, key=lambda name: (values[name] if by_number else 0, name))
    fractions = by_number and any(value % 1 for value in values.values() if value)
    alone = [name for name in names if rows[name] == 1]
    if len(names) > _MANY and (2 * len(alone) > len(names) or (fractions and len(names) > 100)):
        raise UserError(
            f"{cells.path}: column {quoted(column)} has {len(names)} different values in "
            f"{len(texts)} rows; --label names a column of classes, not of numbers or names"
        )
    if alone and len(names) > 1:
        row = min(map(texts.index, alone))
        what = f"no other row is of the class {quoted(texts[row])}; each needs two or more"
        raise cells.error(row, column, what)
    _warn_of_likeness(cells, names)
    index = {name: label for label, name in enumerate(names)}
    return np.array([index[text] for text in texts], np.int64), names


def _warn_of_likeness(cells: Cells, names: Iterable[str]) -> None:
    before: dict[str, str] = {}
    for name in names:
        value = number(name)
        plain = "".join(c for c in unicodedata.normalize("NFKC", name) if c.isprintable())
        key = " ".join(plain.casefold().strip("'\"").split()) if value is None else str(value)
        if key in before:
            log.warning(
                "warning: %s: %s and %s are two classes",
                cells.path,
                quoted(before[key]),
                quoted(name),
            )
        before[key] = name


def check_names(cells: Cells, features: Collection[str]) -> None:
    """Raise `UserError` where the first line has numbers, and so seems to name no columns.

    Names that count up by one are names, as those of pandas.
    """
    if not features or any(number(name) is None for name in features):
        return
    values = list(map(float, features))
    counting = len(values) > 1 or values[0] in (0, 1)
    if not counting or values != [values[0] + i for i in range(len(values))]:
        raise UserError(
            f"{cells.path}: the first line should name the columns, but has numbers, as "
            f"{quoted(next(iter(features)))}; put a line of names, as x1, above it"
        )


def warn_of_leaks(cells: Cells, features: Collection[str]) -> None:
    """Warn of columns that number the rows, and of rows that are copies of others."""
    rows = len(cells.lines)
    for name in features:
        if rows >= 10 and counts_up(cells.columns[name]):
            log.warning(
                "warning: %s: column %s numbers the rows; networks learn their order",
                cells.path,
                quoted(name),
            )
    copies = rows - len(set(zip(*cells.columns.values())))
    if copies * 10 > rows:
        log.warning(
            "warning: %s: %d of %d rows are copies of others; training and test part share rows",
            cells.path,
            copies,
            rows,
        )
