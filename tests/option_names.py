"""The options of each script and their values, as --help shows them."""

from typing import get_args, get_type_hints

import ER_DST.main
import ER_SLT.main
import STR.main
from ER_DST.options import DSTOptions
from ER_SLT.options import SLTOptions
from startsparse.fields import normal
from STR.options import STROptions

SCRIPTS = {
    "STR": (STROptions, STR.main.CONFIGS),
    "ER_DST": (DSTOptions, ER_DST.main.CONFIGS),
    "ER_SLT": (SLTOptions, ER_SLT.main.CONFIGS),
}


def shown_names(kind):
    """Name on the command line -> field, and the values of a choice."""
    names, choices = {}, {}
    for field, hint in get_type_hints(kind, include_extras=True).items():
        extras = get_args(hint)[1:]
        name = next((e.name for e in extras if getattr(e, "name", None)), field)
        names[normal(name)] = field
        for extra in extras:
            if str(getattr(extra, "metavar", "")).startswith("{"):
                choices[normal(name)] = {normal(v) for v in extra.metavar.strip("{}").split(",")}
    return names, choices
