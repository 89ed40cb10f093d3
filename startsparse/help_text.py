"""--help in named groups, with the defaults of this YAML file or data set."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry

from startsparse.conditions import Meaning
from startsparse.fields import default, text

FLAGS = ("-h", "--help")


def docstrings(kind: type) -> dict[str, str]:
    """Field -> the string below it in the source; that of a subclass comes first."""
    texts = {}
    for parent in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                words = ast.literal_eval(below.value).split()
                texts[ast.unparse(field.target)] = " ".join(words)
    return texts


def show(kind: type[Meaning], options: Any, registry: ConstructorRegistry) -> NoReturn:
    """Print the options of ``kind``, with the values of ``options`` as defaults, and exit.

    ``groups`` of the class says which fields belong together: title -> fields.
    """
    hints, texts = get_type_hints(kind, include_extras=True), docstrings(kind)
    groups = []
    for title, fields in kind.groups.items():
        typed = []
        for name in fields:
            value, hint = getattr(options, name), None
            if value != default(kind, name):  # a hint in the type describes the option's default
                hint = f"(default: {text(value)})"
            arg = tyro.conf.arg(help=texts[name], help_behavior_hint=hint)
            typed.append((name, Annotated[hints[name], arg], value))
        group = dataclasses.make_dataclass(title.title().replace(" ", ""), typed)
        group.__doc__ = ""  # not its signature
        named = Annotated[group, tyro.conf.arg(name=title)]  # type: ignore[valid-type]  # made here
        groups.append((title.replace(" ", "_"), named, dataclasses.field(default_factory=group)))
    nested = dataclasses.make_dataclass("Options", groups)
    tyro.cli(
        nested,
        args=["--help"],
        description=kind.__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        registry=registry,
    )
    raise AssertionError("tyro exits after --help")
