"""Options that have no effect in a run: found by the table of when each counts.

One that the command line names is an error, as is one that a YAML file sets though nothing in it
makes it count. What the command line switches off goes back to its default, so that options.yaml,
names and tables only carry what counted.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from startsparse.errors import OptionError
from startsparse.fields import Condition, Counts, default, extras, flag


def conditions(kind: type) -> dict[str, Counts]:
    """Field -> when it counts, of the options that do not always."""
    table = {
        field: [extra for extra in found if isinstance(extra, Counts)]
        for field, found in extras(kind).items()
    }
    return {field: found[-1] for field, found in table.items() if found}


def idle(options: Any) -> dict[str, Condition]:
    """Field -> the condition that fails, of the options that have no effect."""
    failing = {}
    for field, table in conditions(type(options)).items():
        condition = next((c for c in table if not c.when(options)), None)
        if condition is not None:
            failing[field] = condition
    return failing


def settle(options: Any) -> None:
    """Put options that have no effect back to their defaults."""
    kind = type(options)
    while changed := [f for f in idle(options) if getattr(options, f) != default(kind, f)]:
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
    """Field -> value, of the options that are not as they are without any argument or file."""
    plain = type(options)()
    plain.derive()
    return {f: v for f, v in vars(options).items() if v != getattr(plain, f)}


def _sentence(field: str, condition: Condition, options: Any) -> str:
    return f"{flag(field)}: has no effect {condition.otherwise.format(o=options)}"
