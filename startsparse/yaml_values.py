"""YAML files of options: scalars as they are written, one option a line, none twice.

YAML 1.1 reads ``off`` as false, ``007`` as 7 and nothing as null. Here a value stays the text in
the file, and its option decides on the meaning.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from startsparse.errors import OptionError

_OWN = "tag:yaml.org,2002:"
_TAGS = {_OWN + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}


def read_values(path: Path) -> dict[str, str | list[str]]:
    """Option -> its text in the file at ``path``, or the texts of its list.

    Raises:
        OptionError: names the file, and the line.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise OptionError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path}: is not YAML: {reason}") from None
    except RecursionError:
        raise OptionError(f"{path}: is nested too deeply; one 'option: value' a line") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"{path}: should hold one 'option: value' per line")
    _check_tags(path, root)
    values: dict[str, str | list[str]] = {}
    for key, value in root.value:
        line = f"line {key.start_mark.line + 1}"
        _check_tags(path, key, value)
        if not isinstance(key, yaml.ScalarNode):
            raise OptionError(f"{path}: {line}: should be one 'option: value'")
        if key.value in values:
            raise OptionError(f"{path}: {line}: names {key.value} again")
        values[key.value] = _value(value, lambda: f"{path}: {key.value}: should be one value")  # noqa: B023
    return values


def _check_tags(path: Path, *nodes: yaml.Node) -> None:
    """Refuse what other readers of YAML would make objects of, or run."""
    for node in nodes:
        if node.tag not in _TAGS:
            tag = node.tag.replace(_OWN, "!!")
            line = f"line {node.start_mark.line + 1}"
            raise OptionError(f"{path}: {line}: has the tag {tag!r}; write the value alone")


def _value(node: yaml.Node, problem: Callable[[], str]) -> str | list[str]:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(part, yaml.ScalarNode) for part in parts):
        raise OptionError(problem())
    return [part.value for part in parts]


def write_values(values: Mapping[str, Any]) -> str:
    """YAML that `read_values` reads back, whatever the texts are; other programs read it too."""
    return yaml.safe_dump(dict(values), sort_keys=False, width=math.inf)
