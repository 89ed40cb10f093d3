"""{seed} and the like in a command line, which stand for the values of each run."""

import re
from collections.abc import Mapping

from startsparse.errors import OptionError


def filled(word: str, values: Mapping[str, object]) -> str:
    """``word`` with {seed} and the like replaced by the values of the run.

    Raises:
        OptionError: it names something else.
    """

    def value(match: re.Match) -> str:
        if match[1] not in values:
            known = ", ".join(f"{{{name}}}" for name in values)
            raise OptionError(f"'{word}': there is no {match[0]}; choose from {known}")
        return str(values[match[1]])

    return re.sub(r"\{(\w+)\}", value, word)
