"""From a dataclass to a command line with YAML files.

A field's docstring is its help. Values come from the field's default, the YAML file of
``--config`` and the command line; the later wins. All pass the same checks. Every error is one line
that names the option or the file, with exit code 2. `fields` has what an option's type declares,
such as its names and when it counts.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from startsparse import effects, help_text, paths
from startsparse.errors import OptionError, UserError, about
from startsparse.fields import TEXT, TRUTH, default, flag, names, normal, opposites, shown, truth
from startsparse.numbers import REAL, WHOLE
from startsparse.yaml_values import read_values, write_values

if TYPE_CHECKING:
    from startsparse.options import Options

log = logging.getLogger("startsparse")

T = TypeVar("T")  # a dataclass of options
S = TypeVar("S", bound="Options")  # of a script

# tyro's own messages speak of Python; these speak of the value.
_plain = ConstructorRegistry()
_LISTED = {float: REAL, int: WHOLE, str: TEXT}
"""Of a list's elements by their type, where that declares nothing."""


def _rule(kind: type, spec: PrimitiveConstructorSpec) -> None:
    @_plain.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        return spec if info.type is kind else None


_rule(int, WHOLE)
_rule(float, REAL)
_rule(bool, dataclasses.replace(TRUTH, nargs=(0, 1), metavar="[{True,False}]"))


@_plain.primitive_rule
def _list_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Lists of any length, whose values are each of the element's type; errors name the value."""
    element, *rest = get_args(info.type) or (None,)
    if get_origin(info.type) is not tuple or rest != [...]:
        return None
    specs: tuple = getattr(element, "__metadata__", ())
    spec = next((s for s in specs if isinstance(s, PrimitiveConstructorSpec)), _LISTED.get(element))
    if spec is None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{spec.metavar} [{spec.metavar} ...]]",
        instance_from_str=lambda strings: tuple(spec.instance_from_str([s]) for s in strings),
        is_instance=lambda value: isinstance(value, tuple) and all(map(spec.is_instance, value)),
        str_from_instance=lambda value: [s for v in value for s in spec.str_from_instance(v)],
    )


def parse(
    kind: type[S], configs: Path, argv: Sequence[str] | None = None, base: S | None = None
) -> S:
    """Options from the command line and the YAML file it names.

    Args:
        kind: dataclass of the script.
        configs: folder of the files ``<set>.yaml`` that are read by default, where they exist.
        argv: command line without the program (default: the process's own).
        base: options that the command line overrides, instead of those of a YAML file.

    Raises:
        OptionError: with one line that names the option or the file.
    """
    try:
        return _parse(kind, configs, list(sys.argv[1:] if argv is None else argv), base)
    except BrokenPipeError:  # nobody reads --help
        raise
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise OptionError(about(error)) from None


def _parse(kind: type[S], configs: Path, argv: list[str], base: S | None) -> S:
    alone = glance(kind, argv)
    base = _base(kind, configs, alone, base)
    if any(word in help_text.FLAGS for word in argv):
        help_text.show(kind, base, _plain)
    written = [_own_name(kind, word) for word in argv]
    words = _understood(kind, written)
    if flag(shown(kind)["set"]) in set(words) - set(written):
        log.info("--data: there is no such folder; taken as the set %s", alone.set)
    options = dataclasses.replace(from_flags(kind, words, base), config=base.config)
    with own_names(kind):
        options.check_folders()
        effects.refuse_named(options, named(kind, words))
        effects.settle(options)
        options.check()
    return options


def _base(kind: type[S], configs: Path, alone: S, base: S | None) -> S:
    """The options that the command line overrides; ``alone`` are those of the command line alone.

    These are ``base``, or those of the run to resume, of the YAML file, or the defaults.
    """
    resumed = base is None and alone.resume not in ("", "auto")
    if alone.config and (resumed or base is not None):
        raise OptionError("--config: has no effect, the options saved in the run apply")
    if base is not None:
        return base
    if resumed:
        path = run_folder(alone.resume) / "options.yaml"
        return dataclasses.replace(read_yaml(kind, path), config=str(path))
    path = _config(alone.config, configs) if alone.config else configs / f"{alone.set}.yaml"
    if not alone.config and not path.exists():
        return kind()
    base = dataclasses.replace(read_yaml(kind, path), config=str(path))
    with own_names(kind):
        effects.refuse_file(base, path)
    return base


def _config(name: str, configs: Path) -> Path:
    """The file that --config names: in the working folder, else beside the script."""
    beside = configs.parent / name
    return beside if beside.exists() and not Path(name).exists() else Path(name)


def glance(kind: type[T], argv: Sequence[str]) -> T:
    """The options by the command line alone, without files; ignores --help."""
    words = [_own_name(kind, word) for word in argv if word not in help_text.FLAGS]
    return from_flags(kind, _understood(kind, words), kind())


@contextlib.contextmanager
def own_names(kind: type) -> Iterator[None]:
    """Errors raised inside name options as the command line of ``kind`` does."""
    flags = {flag(field): flag(name) for field, name in shown(kind).items()}
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--[\w-]+", lambda m: flags.get(m[0], m[0]), str(error)),)
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


def from_values(kind: type[T], content: Mapping[str, Any], path: Path) -> T:
    """Options from a mapping, name on the command line -> value, that ``path`` holds.

    Values are texts or lists of texts, as of `read_values`, or Python values, as of `plain_values`.
    """
    argv: list[str] = []
    seen: dict[str, str] = {}
    for key, value in content.items():
        field = names(kind).get(normal(key))
        if field is None:
            raise OptionError(f"{path}: unknown option '{key}'{_near(key, kind, '')}")
        if field in seen:
            raise OptionError(f"{path}: names {key} again, after {seen[field]}")
        seen[field] = key
        argv += _as_flags(kind, field, value, path)
    try:
        return from_flags(kind, _understood(kind, argv), kind())
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def plain_values(options: Any) -> dict[str, Any]:
    """All options by their names on the command line, with underscores; tuples as lists."""
    flags = shown(type(options))
    values = {flags[k].replace("-", "_"): v for k, v in dataclasses.asdict(options).items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def write_yaml(options: Any) -> str:
    """All options as YAML that ``--config`` reads back."""
    return write_values(plain_values(options))


def _as_flags(kind: type, field: str, value: Any, path: Path) -> list[str]:
    name, usual = shown(kind)[field], default(kind, field)
    if isinstance(usual, tuple):
        parts = value if isinstance(value, list) else [value] * (value != "")
        words = list(map(str, parts))
        for word in words:
            if re.match(r"-(?![0-9.])", word):  # would be read as another option
                raise OptionError(f"{path}: {name}: a value cannot begin with a dash, as '{word}'")
        return [flag(name), *words]
    if isinstance(value, list | dict):
        raise OptionError(f"{path}: {name}: should be one value")
    if isinstance(usual, bool):
        try:
            value = truth([str(value)])
        except ValueError:
            raise OptionError(f"{path}: {name}: '{value}' should be true or false") from None
    if usual is None and str(value).lower() in ("", "~", "null", "none"):
        return []
    return [f"{flag(name)}={value}"]


def _near(name: str, kind: type, dashes: str) -> str:
    near = difflib.get_close_matches(normal(name.lstrip("-")), names(kind), n=1)
    if not near:
        return "; --help lists the options"
    return f"; did you mean {dashes}{normal(shown(kind)[names(kind)[near[0]]])}?"


def named(kind: type, argv: Sequence[str]) -> set[str]:
    """The fields that a command line names."""
    words = [normal(word.partition("=")[0].lstrip("-")) for word in argv if word.startswith("-")]
    known = {**opposites(kind), **names(kind)}
    return {known[word] for word in words if word in known}


def from_flags(kind: type[T], argv: Sequence[str], base: T) -> T:
    """Parse ``argv`` over the values of ``base`` by tyro, whose boxed messages become one line.

    Raises:
        OptionError: names the option.
    """
    for word in argv:
        _require_text(word)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, rest = tyro.cli(
                kind,
                args=[_own_name(kind, word) for word in argv],
                default=base,
                return_unknown_args=True,
                registry=_plain,
                config=(tyro.conf.FlagConversionOff,),
                description="",
            )
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise OptionError(_one_line(errors.getvalue())) from None
    if "--" in argv:
        raise OptionError("'--': has no meaning here; all options come before it")
    if rest:
        word = rest[0].partition("=")[0]
        if word.startswith("-"):
            raise OptionError(f"{word}: unknown option{_near(word, kind, '--')}")
        raise OptionError(f"'{word}': a value without an option that takes it")
    return paths.settled(options)


def _require_text(word: str) -> None:
    """Raise `OptionError` for a word that no file can name or hold."""
    encoding = sys.getfilesystemencoding()
    try:
        word.encode(encoding)
    except UnicodeEncodeError:
        raise OptionError(f"{word!a}: is not {encoding.upper()} text") from None
    if "\0" in word:
        raise OptionError(f"{word!a}: contains a NUL character")


def _understood(kind: type, argv: list[str]) -> list[str]:
    return kind.understood(argv) if hasattr(kind, "understood") else argv


def _own_name(kind: type, word: str) -> str:
    """``--batch_size=3`` -> ``--batch-size=3``, ``--no-x`` -> ``--x=False``, aliases -> names."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    key = normal(name[2:])
    if key in names(kind):
        return flag(shown(kind)[names(kind)[key]]) + equals + value
    if key in opposites(kind) and not equals:
        return flag(shown(kind)[opposites(kind)[key]]) + "=False"
    return name.replace("_", "-") + equals + value


def _one_line(box: str) -> str:
    rows = [row.strip("│ ") for row in box.splitlines()[1:]]
    text = " ".join(row for row in rows[: next((i for i, r in enumerate(rows) if "──" in r), None)])
    # Aliases come first, the name itself is last: -b/--batch-size
    text = re.sub(r"^Missing value for argument '(?:\S*/)?(--[^']*)'.*", r"\1: needs a value", text)
    text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # of an optional number
    return re.sub(r"^Error parsing (?:\S*/)?(--[\w-]+).*?:", r"\1:", text)
