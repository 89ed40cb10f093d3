"""From a dataclass to a command line with YAML files.

A field's docstring is its help. Values come from, lowest first: the field's default, the YAML file
of ``--config``, the command line. All of them pass the same checks, and every complaint is one line
that names the option, or the file, and exit code 2. Where the users of a script know an option by
another name, its dataclass says so (`called`); inside, options have one name.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from startsparse.errors import OptionError, UserError

T = TypeVar("T")  # a dataclass with `config`, `set`, `resume` and `check()`: startsparse.options


def normal(name: str) -> str:
    """The form in which names are compared: case, dashes and underscores make no difference."""
    return name.lower().replace("_", "-")


def choice(names: Iterable[str], aliases: Mapping[str, str] | None = None) -> Any:
    """The type of an option that takes one of ``names``, or an alias of one."""
    names = tuple(names)
    table = {normal(name): name for name in names}
    table.update({normal(alias): name for alias, name in (aliases or {}).items()})

    def convert(strings: list[str]) -> str:
        if normal(strings[0]) not in table:
            raise ValueError(f"'{strings[0]}' is none of {', '.join(n or repr(n) for n in names)}")
        return table[normal(strings[0])]

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(filter(None, names)) + "}",
        instance_from_str=convert,
        is_instance=lambda value: value in names,
        str_from_instance=lambda value: [value],
    )
    return Annotated[str, spec]


def also(*flags: str) -> Any:
    """Other flags of the same option."""
    return tyro.conf.arg(aliases=flags)


def called(name: str, *others: str) -> Any:
    """The name of an option on the command line and in YAML, if it is not the field's; aliases."""
    return tyro.conf.arg(name=name, aliases=others or None)


def default_is(text: str) -> Any:
    """What the help says instead of an empty default."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def _truth(strings: list[str]) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if strings[0].lower() not in words:
        raise ValueError(f"'{strings[0]}' should be True or False")
    return words[strings[0].lower()]


TRUTH = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{True,False}",
    instance_from_str=_truth,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda value: [str(value)],
)
Truth = Annotated[tyro.conf.FlagConversionOff[bool], TRUTH]
"""The type of a switch that is written out: ``--anneal False``."""


# tyro's own messages speak of Python; these speak of the value.
_plain = ConstructorRegistry()


def _number(kind: type, what: str) -> None:
    def convert(strings: list[str]) -> Any:
        try:
            return kind(strings[0])
        except ValueError:
            raise ValueError(f"'{strings[0]}' is not {what}") from None

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=convert,
        is_instance=lambda value: type(value) in (kind, int),
        str_from_instance=lambda value: [str(value)],
    )

    @_plain.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        return spec if info.type is kind else None


_number(int, "a whole number")
_number(float, "a number")


def parse(kind: type[T], configs: Path, argv: Sequence[str] | None = None) -> T:
    """Options from the command line and the YAML file it names.

    Args:
        kind: dataclass of the script.
        configs: folder of the files that are read by default: ``<set>.yaml``, or ``demo.yaml``, if
            there, where nothing is given at all.
        argv: command line without the program (default: the process's own).

    Raises:
        OptionError: with one line that names the option or the file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv and (configs / "demo.yaml").exists():
        argv = ["--config", str(configs / "demo.yaml")]
    given = from_flags(kind, argv, kind())
    path = Path(given.config) if given.config else configs / f"{given.set}.yaml"
    if given.resume not in ("", "auto"):
        # A run is continued with the options it was started with.
        path = run_folder(given.resume) / "options.yaml"
    if given.config or given.resume not in ("", "auto") or path.exists():
        options = from_flags(kind, argv, read_yaml(kind, path))
        options.config = str(path)
    else:
        options = given
    with own_names(kind):
        options.check()
    return options


@contextlib.contextmanager
def own_names(kind: type) -> Iterator[None]:
    """Errors raised inside name options as the command line of ``kind`` does."""
    shown = {flag(field): flag(name) for field, name in _shown(kind).items()}
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--[\w-]+", lambda m: shown.get(m[0], m[0]), str(error)),)
        raise


def run_folder(resume: str) -> Path:
    """The run folder that ``--resume PATH`` means: the path itself, or the folder of that file."""
    path = Path(resume)
    if not path.exists():
        raise OptionError(f"--resume: {path} does not exist; name a run folder or auto")
    return path if path.is_dir() else path.parent


def read_yaml(kind: type[T], path: Path) -> T:
    """Options of a YAML file: field names with dashes or underscores, one value or list each."""
    return from_values(kind, read_values(path), path)


def read_values(path: Path) -> dict[str, Any]:
    """What a YAML file of options holds, by the names of the script that it is of."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise OptionError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path}: is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise OptionError(f"{path}: should hold one 'option: value' per line")
    return content


def from_values(kind: type[T], content: Mapping[str, Any], path: Path) -> T:
    """Options by their names on the command line, as ``path`` holds them: `plain_values`."""
    fields = _fields(kind)
    argv = []
    for key, value in content.items():
        name = fields.get(normal(str(key)))
        if name is None:
            raise OptionError(f"{path}: unknown option '{key}'{_near(str(key), fields, '')}")
        argv += _as_flags(kind, name, value, path)
    try:
        return from_flags(kind, argv, kind())
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def plain_values(options: Any) -> dict[str, Any]:
    """All options by their names on the command line, with underscores; tuples as lists."""
    shown = _shown(type(options))
    values = {shown[k].replace("-", "_"): v for k, v in dataclasses.asdict(options).items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def write_yaml(options: Any) -> str:
    """All options as YAML that ``--config`` reads back."""
    return yaml.safe_dump(plain_values(options), sort_keys=False)


def _as_flags(kind: type, name: str, value: Any, path: Path) -> list[str]:
    default, shown = getattr(kind(), name), _shown(kind)[name]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise OptionError(f"{path}: {shown}: '{value}' should be true or false")
        if TRUTH in _extras(kind)[name]:
            return [flag(shown), str(value)]
        return [flag(shown) if value else flag("no_" + shown)]
    if isinstance(default, tuple):
        return [flag(shown), *map(str, value if isinstance(value, list) else [value])]
    if isinstance(value, list | dict):
        raise OptionError(f"{path}: {shown}: should be one value")
    return [f"{flag(shown)}={value}"]


def _extras(kind: type) -> dict[str, tuple]:
    """Field -> what its Annotated type says besides the type."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint)[1:] for name, hint in hints.items()}


def _shown(kind: type) -> dict[str, str]:
    """Field -> its name on the command line, without dashes."""
    return {
        field: next((extra.name for extra in extras if getattr(extra, "name", None)), field)
        for field, extras in _extras(kind).items()
    }


def _fields(kind: type) -> dict[str, str]:
    """Every name of an option on the command line, normalised -> field."""
    names = {}
    for field, extras in _extras(kind).items():
        names[normal(_shown(kind)[field])] = field
        for extra in extras:
            for alias in getattr(extra, "aliases", None) or ():
                names[normal(alias.lstrip("-"))] = field
    return names


def _near(name: str, fields: Mapping[str, str], dashes: str) -> str:
    near = difflib.get_close_matches(normal(name.lstrip("-")), fields, n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else "; --help lists the options"


def from_flags(kind: type[T], argv: list[str], default: T) -> T:
    """Values of ``argv`` over those of ``default``: tyro, its boxed messages as one line each.

    Raises:
        OptionError: names the option.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, rest = tyro.cli(
                kind,
                args=[_dashed(token) for token in argv],
                default=default,
                return_unknown_args=True,
                registry=_plain,
                description="",
            )
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise OptionError(_one_line(errors.getvalue())) from None
    if rest:
        token = rest[0].partition("=")[0]
        if token.startswith("-"):
            raise OptionError(f"{token}: unknown option{_near(token, _fields(kind), '--')}")
        raise OptionError(f"'{token}': a value without an option that takes it")
    return options


def _dashed(token: str) -> str:
    """``--batch_size=3`` -> ``--batch-size=3``; the value is left alone."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def _one_line(box: str) -> str:
    rows = [row.strip("│ ") for row in box.splitlines()[1:]]
    text = " ".join(row for row in rows[: next((i for i, r in enumerate(rows) if "──" in r), None)])
    # Aliases come first, the name itself is last: -b/--batch-size
    text = re.sub(r"^Missing value for argument '(?:\S*/)?(--[^']*)'.*", r"\1: needs a value", text)
    text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # of an optional number
    return re.sub(r"^Error parsing (?:\S*/)?(--[\w-]+).*?:", r"\1:", text)
