"""What an option's Annotated type declares: its names, its values, and when it counts.

Options are fields of a dataclass. The code calls an option by its field. Its type may give it
another name on the command line (`called`), and a class may list further names in ``other_names``.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from startsparse.cached import cached


def normal(name: str) -> str:
    """A name as it is compared: case, dashes and underscores make no difference."""
    return name.lower().replace("_", "-")


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


# --- types ----------------------------------------------------------------------------------------


def choice(
    names: Iterable[str], aliases: Mapping[str, str] | None = None
) -> PrimitiveConstructorSpec[str]:
    """The values of an option: one of ``names``, or an alias of one. Part of its Annotated type."""
    names = tuple(names)
    table = {normal(name): name for name in names}
    table.update({normal(alias): name for alias, name in (aliases or {}).items()})

    def convert(strings: list[str]) -> str:
        if normal(strings[0]) not in table:
            raise ValueError(f"'{strings[0]}' is none of {', '.join(n or repr(n) for n in names)}")
        return table[normal(strings[0])]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(filter(None, names)) + "}",
        instance_from_str=convert,
        is_instance=lambda value: value in names,
        str_from_instance=lambda value: [value],
    )


def also(*flags: str) -> Any:
    """Other flags of the same option."""
    return tyro.conf.arg(aliases=flags)


def called(name: str, *others: str) -> Any:
    """An option's name on the command line and in YAML, instead of the field's; aliases."""
    return tyro.conf.arg(name=name, aliases=others or None)


def default_is(text: str) -> Any:
    """What the help says instead of an empty default."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def truth(strings: list[str]) -> bool:
    """The value of a switch; without a value it is on."""
    word = strings[0].lower() if strings else "true"
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    if word not in words:
        raise ValueError(f"'{strings[0]}' should be True or False")
    return words[word]


TEXT = PrimitiveConstructorSpec(
    nargs=1,
    metavar="STR",
    instance_from_str=lambda strings: strings[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
)
"""The type of a text in a list."""
TRUTH = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{True,False}",
    instance_from_str=truth,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda value: [str(value)],
)
Truth = Annotated[tyro.conf.FlagConversionOff[bool], TRUTH]
"""The type of a switch that is written out: ``--flag False``."""


PATH, SOURCE = "path", "path of another run"
"""Parts of the Annotated type of an option that names a file or folder; see `paths`."""


# --- when an option counts ------------------------------------------------------------------------


class Condition(NamedTuple):
    """What has to hold for an option to have an effect."""

    when: Callable[[Any], bool]
    """Of the options; never raises."""

    otherwise: str
    """The reason, to end "--option has no effect ..."; ``{o.field}`` stands for a value."""

    excused_by: str = ""
    """A field: if it is named with an empty value, options at their defaults may be named too."""


class Counts(tuple):
    """The `Condition`s of an option; a message gives the first that fails."""


def counts(*conditions: Condition) -> Counts:
    """An option has an effect where all of these hold. Part of its Annotated type."""
    return Counts(conditions)


# --- names ----------------------------------------------------------------------------------------


def field_names(kind: type) -> list[str]:
    """The options of a dataclass, as its code calls them."""
    return [field.name for field in dataclasses.fields(kind)]


@cached
def extras(kind: type) -> dict[str, tuple]:
    """Field -> annotations of its Annotated type."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hints[name])[1:] for name in field_names(kind)}


@cached
def shown(kind: type) -> dict[str, str]:
    """Field -> its name on the command line, without dashes in front."""
    return {
        field: next((extra.name for extra in annotations if getattr(extra, "name", None)), field)
        for field, annotations in extras(kind).items()
    }


@cached
def names(kind: type) -> dict[str, str]:
    """Every name of an option on the command line, normalised -> field."""
    table = {normal(name): field for field, name in shown(kind).items()}
    for field, annotations in extras(kind).items():
        for extra in annotations:
            for alias in getattr(extra, "aliases", None) or ():
                table[normal(alias.lstrip("-"))] = field
    for field, others in getattr(kind, "other_names", {}).items():
        for other in others:
            table.setdefault(normal(other), field)
    return table


@cached
def opposites(kind: type) -> dict[str, str]:
    """no-NAME of every bare flag, normalised -> field; for no-bn-decay it is bn-decay."""
    table = {}
    for name, field in names(kind).items():
        if is_flag(kind, field):
            opposite = name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"
            if opposite not in names(kind):
                table[opposite] = field
    return table


def is_flag(kind: type, field: str) -> bool:
    """Whether the option needs no value."""
    return isinstance(default(kind, field), bool) and TRUTH not in extras(kind)[field]


def default(kind: type, field: str) -> Any:
    """The default of an option."""
    return getattr(kind, field)


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    return shlex.join(map(str, value if isinstance(value, tuple) else [value]))
