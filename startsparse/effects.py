"""Options that have no effect in a run, by the conditions under which each counts.

Naming one on the command line is an error. So is setting one in a YAML file in which it has no
effect. An option of the file that the command line switches off returns to its default, so that
options.yaml, names and tables carry only what counted.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from startsparse.errors import OptionError
from startsparse.fields import Condition, Counts, default, extras, flag


def conditions(kind: type) -> dict[str, Counts]:
    """Field -> when it counts; fields that always count are left out."""
    table = {
        field: [extra for extra in annotations if isinstance(extra, Counts)]
        for field, annotations in extras(kind).items()
    }
    return {field: annotations[-1] for field, annotations in table.items() if annotations}


def idle(options: Any) -> dict[str, Condition]:
    """Field -> the condition that fails, for each option that has no effect."""
    failing = {}
    for field, table in conditions(type(options)).items():
        condition = next((c for c in table if not c.when(options)), None)
        if condition is not None:
            failing[field] = condition
    return failing


def settle(options: Any) -> None:
    """Put options that have no effect back to their defaults, but those in ``derived``."""
    kind = type(options)
    while changed := [
        field
        for field in idle(options)
        if field not in options.derived and getattr(options, field) != default(kind, field)
    ]:
        for field in changed:
            setattr(options, field, default(kind, field))


def refuse_named(options: Any, named: Iterable[str]) -> None:
    """Raise `OptionError` for a field of the command line that has no effect, default or not."""
    failing, named = idle(options), set(named)
    for field in (field for field in failing if field in named):
        excuse = failing[field].excused_by
        excused = excuse in named and not getattr(options, excuse)
        if not (excused and getattr(options, field) == default(type(options), field)):
            raise OptionError(_sentence(field, failing[field], options))


def refuse_file(options: Any, path: Path) -> None:
    """Raise `OptionError` for a value of a YAML file that has no effect as the file stands."""
    settled = copy.copy(options)
    settle(settled)
    settled.derive()
    for field, condition in idle(options).items():
        if getattr(options, field) not in (default(type(options), field), getattr(settled, field)):
            raise OptionError(f"{path}: {_sentence(field, condition, options)}")


def differing(options: Any) -> Mapping[str, Any]:
    """Field -> value, for each option that differs from a run without arguments and file."""
    plain = type(options)()
    plain.derive()
    return {f: v for f, v in vars(options).items() if v != getattr(plain, f)}


def _sentence(field: str, condition: Condition, options: Any) -> str:
    return f"{flag(field)}: has no effect {condition.otherwise.format(o=options)}"
