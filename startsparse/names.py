"""Names that a user gives: they become folders, cells of tables, and words of pictures."""

import dataclasses
import os
import re
import unicodedata
from typing import Any

from startsparse.errors import OptionError
from startsparse.fields import flag

LONGEST = 200  # bytes of a part; files are called after it, and 255 are possible
FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet computes
CELLS = {"name", "expt_setup", "er_sparsity_file", "start_from", "target_expt_name"}
"""Options whose text is a cell of a table, also where it looks like a number."""


def check(options: Any) -> None:
    """Raise `OptionError` for a text of ``options`` that no table could hold as it is."""
    for field in dataclasses.fields(options):
        value, option = getattr(options, field.name), flag(field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                check_characters(option, text)
        if field.name in CELLS:
            check_cell(option, value)


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet would compute the text of a cell instead of showing it."""
    return cell.startswith(FORMULA)


def check_characters(option: str, text: str) -> None:
    """Raise `OptionError` for text that would break a line, a terminal or a UTF-8 file."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            outside = unicodedata.category(character) == "Cs"
            what = "is not UTF-8" if outside else "has a control character"
            raise OptionError(f"{option}: {shortened(ascii(text))} {what}; take another")


def check_cell(option: str, text: str) -> None:
    """Raise `OptionError` for text that a spreadsheet would not show as it is."""
    if is_formula(text):
        raise OptionError(
            f"{option}: '{shortened(text)}' begins with {text[0]}, and spreadsheets would compute "
            "it; begin with another character"
        )


def check_name(option: str, name: str) -> None:
    """Raise `OptionError` unless a run may have this name; "" is the default's.

    A slash makes folders. No name leads out of the folder of the runs, into the folder of another
    run, or to two names of one folder.
    """
    check_cell(option, name)
    for part in name.split("/") if name else ():
        if part in ("", ".", ".."):
            raise OptionError(
                f"{option}: '{shortened(name)}' should be a name, or names with single slashes "
                "between, which make folders inside --log-dir"
            )
        if part.startswith("~"):
            raise OptionError(f"{option}: '{shortened(name)}' has a name that begins with ~")
        if re.fullmatch(r"seed-\d+(-\d+)?", part):
            raise OptionError(f"{option}: '{shortened(name)}': run folders are called {part}")
        if len(os.fsencode(part)) > LONGEST:
            length = f"{len(os.fsencode(part))} bytes long, and at most {LONGEST} are possible"
            raise OptionError(f"{option}: '{shortened(part)}' is {length}")


def shortened(text: str, length: int = 60) -> str:
    """The text, or the beginning of a longer one."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
