"""Command lines, YAML files and environments at random, good ones and odd ones."""

import dataclasses
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from hypothesis import strategies as st
from tyro.constructors import PrimitiveConstructorSpec

from ER_DST.options import DSTOptions
from ER_SLT.options import CIFAROptions, SLTOptions
from startsparse import effects
from startsparse.commandline import parse
from startsparse.export.command import ExportOptions
from startsparse.fields import is_flag, names, shown
from startsparse.options import Options
from startsparse.report import ReportOptions
from startsparse.sweep import SweepOptions as GridOptions
from startsparse.tabular.options import TabularOptions
from STR.options import STROptions
from STR.run_imp import SweepOptions
from torture.scripts_tried import Start

MLP = ["--arch", "mlp", "--width", "8", "--set", "digits"]
TABLE = ["--seeds", "1", "--width", "4", "--epochs", "1", "--final-epochs", "1"]

# What command lines begin with, so that most of them train something small.
SCRIPTS: dict[str, tuple[type, list[list[str]]]] = {
    "STR.main": (
        STROptions,
        [
            MLP,
            [*MLP, "--threshold-list", "0.1", "--final-prune-epoch", "1"],
            [*MLP, "--conv-type", "STRConvER"],
        ],
    ),
    "ER_DST.main": (DSTOptions, [[*MLP, "--sparse"], [*MLP, "--sparse", "--method", "DST"]]),
    "ER_SLT.main": (SLTOptions, [MLP]),
    "ER_SLT.cifar_main": (CIFAROptions, [MLP]),
    "STR.run_imp": (SweepOptions, [["--config", "{tmp}/small.yaml", "--set", "digits"]]),
    "startsparse.sweep": (GridOptions, [["STR.main", "--grid", "width=8", "arch=mlp"]]),
    "startsparse.tabular": (TabularOptions, [TABLE]),
    "startsparse.report": (ReportOptions, [["{tmp}/results/results.csv"]]),
    "startsparse.export": (ExportOptions, [["{tmp}/run", "--repeats", "1"]]),
}
OF_OTHER_RUNS = {"config", "resume", "evaluate", "start_from", "target_expt_name"}

WHOLE = ["1", "2", "3", "7", "0", "16", "2147483647"]
BAD_WHOLE = [
    "-1",
    "-7",
    "2147483648",
    "9" * 30,
    "1.5",
    "1e3",
    "0x10",
    "1_0",
    "٣",
    " 4 ",
    "+2",
    "010",
]
REAL = [
    "0.5",
    "0.1",
    "0.3",
    "1",
    "0",
    "0.05",
    "1e-3",
    "1e-6",
    "2",
    "1e10",
    "1e38",
    ".5",
    "5.",
    "1e-400",
]
BAD_REAL = [
    "-1",
    "-0.1",
    "inf",
    "-inf",
    "nan",
    "1e39",
    "1e400",
    "0,5",
    "1/2",
    "1_0.5",
    "½",
    "1e",
    "٣",
]
ODD = ["", " ", "x", "None", "null", "True", "[]", "{}", "0.1 0.2", "a\nb", "\t", "\x1b[31m", "é",
       "\u2028", "😀", "'", '"', "%s", "{0}", "{seed}", "{nosuch}", "$HOME", "=", "a=b", "-", "--",
       "---", "-x", "-1x", "--seed=7", "\udcff", "x" * 300, "é" * 130, "#", "&a", "*a"]  # fmt: skip
PATHS = ["{tmp}", "{tmp}/nosuch", "{tmp}/file", "{tmp}/file/x", "{tmp}/a b, é", "{tmp}/binary",
         "{tmp}/run", "{tmp}/results", "{tmp}/results/results.csv", "{tmp}/loop", "{tmp}/dangling",
         "{tmp}/empty.yaml", "{tmp}/empty.csv", "{tmp}/closed", "{tmp}/closed/x", "{tmp}/table.csv",
         "{tmp}/plot.png", "{tmp}/plot.jpg", "{tmp}/run/checkpoint.pt", "{tmp}/out.safetensors",
         "{tmp}/out.onnx", ".", "..", "../x", "/dev/null", "/dev/full", "/proc/nosuch", "~", "~/x",
         "~nosuch/x", "auto", "0", "0,1", "0,,1", "best.pt", "//", "a//b"]  # fmt: skip
WORDS = ["a", "density", "test_accuracy", "{tmp}/table.csv", "breast-cancer", "seed", "a/b", "~",
         "{tmp}/abs", "../up", "a b", "=1+1", "a/../b", "."]  # fmt: skip
GRIDS = ["lr", "=", "lr=", "lr=x", "a:b=1", "nosuch=1", "seed=1", "lr=0.1,0.1", "epochs='1", ":=:",
         "set=a/b"]  # fmt: skip
SETS = ["digits", "karate", "modular-addition", "cifar10", "imagenet", "folder", "cora", "mnist"]
WIDTHS = ["0", "1", "2", "5", "33", "-1", "100000", "2147483647", "2147483648"]


def usual_and_bad(kind: type, field: str) -> tuple[list[str], list[str]]:
    """Values of an option, most of which are good, and values that look like good ones."""
    hint, plain = (get_type_hints(kind, include_extras=more)[field] for more in (True, False))
    types = {plain, *get_args(plain)}
    specs = [e for e in get_args(hint)[1:] if isinstance(e, PrimitiveConstructorSpec)]
    metavar = str(specs[0].metavar) if specs else ""
    if field in ("width", "modulus", "image_size", "year"):
        return ["0", "2", "5", "8", "33", "59"], [*WIDTHS, "2018"]
    if field == "repeats":
        return ["0", "1", "2"], ["-1", "2147483648"]
    if field == "set":
        return ["digits", "digits", *SETS], ["nosuch"]
    if metavar.startswith("{") and bool not in types:
        good = metavar.strip("{}").split(",")
        return good, ["nosuch", good[0].upper().replace("-", "_")]
    if bool in types:
        return ["True", "False", "no", "on"], ["0", "maybe", "nosuch"]
    if float in types:
        return REAL, BAD_REAL
    if int in types:
        return WHOLE, BAD_WHOLE
    if field == "grid":
        return ["lr=0.1,0.2", "er-sparse-init:lr=0.5:0.1,0.2:0.2", "epochs=1"], GRIDS
    if field == "time":
        return ["90", "12:00:00", "1-0"], ["1", "soon", "-3", "1:2:3:4", "9" * 30]
    if field in ("name", "expt_setup", "tables", "by", "of", "band"):
        return WORDS[:6], WORDS
    return PATHS, ["nosuch"]


def texts(kind: type, field: str, careful: bool = False) -> st.SearchStrategy[str]:
    """Values of an option: mostly good ones, then odd and bad ones, unless ``careful``."""
    good, bad = usual_and_bad(kind, field)
    usual = st.sampled_from(good)
    return usual if careful else usual | st.sampled_from(good + bad) | st.sampled_from(ODD)


def spelled(name: str) -> st.SearchStrategy[str]:
    """The flag of a name, mostly as --help spells it."""
    usual = "--" + name.lstrip("-").replace("_", "-")
    others = [usual.upper(), "--" + usual[2:].replace("-", "_"), usual[:-1], usual + "s",
              usual[1:], "--no-" + usual[2:], usual + "=", usual.replace("e", "é")]  # fmt: skip
    return st.just(usual) | st.just(usual) | st.just(usual) | st.sampled_from(others)


@st.composite
def option(draw: Callable, kind: type, idle: frozenset[str] = frozenset()) -> list[str]:
    """An option with its value, and perhaps misspelled, without one, or with two.

    Args:
        idle: options that have no effect; if there are any, all goes well with the others.
    """
    careful = bool(idle)
    field = draw(st.sampled_from(sorted({*shown(kind)} - idle)))
    known = sorted(n for n, of in names(kind).items() if of == field) or [field]
    name = draw(st.just(shown(kind)[field]) | st.sampled_from(known))
    word = draw(spelled(name)) if not careful else "--" + name.lstrip("-").replace("_", "-")
    if isinstance(getattr(kind, field), tuple):
        return [word, *draw(st.lists(texts(kind, field, careful), max_size=3))]
    bare = isinstance(getattr(kind, field), bool) and is_flag(kind, field)
    value = draw(texts(kind, field, careful))
    how = draw(st.integers(0, 11))
    if bare and (careful or how < 8):
        return [word]
    if how == 0 and not careful:
        return [word]
    if how == 1 and not careful:
        return [word, value, value]
    return [f"{word}={value}"] if how < 5 else [word, value]


def lines(
    kind: type, first: list[str], careful: bool = False, most: int = 6
) -> st.SearchStrategy[list[str]]:
    """Command lines that begin with ``first``; if not ``careful``, some end so, or lack it."""
    idle = frozenset(OF_OTHER_RUNS) if careful else frozenset()
    if careful and issubclass(kind, Options):
        idle |= effects.idle(parse(kind, Path("/nosuch"), first)).keys()
    options = st.lists(option(kind, idle), max_size=most).map(lambda found: [*chain(*found)])
    begun = options.map(lambda words: [*first, *words])
    return (
        begun if careful else begun | begun | options.map(lambda words: [*words, *first]) | options
    )


ENVIRONMENTS: list[dict] = [
    {"without": ["HOME"]},
    {"environment": {"HOME": "{tmp}/nosuch"}},
    {"environment": {"HOME": "{tmp}/closed"}, "unprivileged": True},
    {"environment": {"HOME": ""}},
    {"environment": {"HOME": "{tmp}/file"}},
    {"environment": {"TMPDIR": "{tmp}/nosuch"}},
    {"environment": {"TMPDIR": "{tmp}/closed"}, "unprivileged": True},
    {"environment": {"COLUMNS": "0"}},
    {"environment": {"COLUMNS": "-3", "LINES": "abc"}},
    {"environment": {"COLUMNS": "abc"}},
    {"environment": {"COLUMNS": "100000"}},
    {"environment": {"CUDA_VISIBLE_DEVICES": "abc"}},
    {"environment": {"CUDA_VISIBLE_DEVICES": ""}},
    {"environment": {"CUDA_VISIBLE_DEVICES": "-1,7"}},
    {"environment": {"OMP_NUM_THREADS": "0"}},
    {"environment": {"OMP_NUM_THREADS": "abc"}},
    {"environment": {"OMP_NUM_THREADS": "-1"}},
    {"environment": {"STARTSPARSE_CACHE": "{tmp}/file", "CXX": "nosuch"}},
    {"environment": {"STARTSPARSE_CACHE": "{tmp}/closed", "CXX": "nosuch"}, "unprivileged": True},
    {"environment": {"STARTSPARSE_CACHE": "", "CXX": "nosuch"}},
    {"environment": {"STARTSPARSE_DATA": "{tmp}/nosuch"}},
    {"environment": {"STARTSPARSE_DATA": "{tmp}/file"}},
    {"environment": {"CXX": "nosuch -O1"}},
    {"environment": {"CXX": ""}},
    {"environment": {"PATH": ""}},
    {"environment": {"TERM": "dumb", "NO_COLOR": "1"}},
    {"environment": {"MPLBACKEND": "nosuch"}},
    {"environment": {"MPLCONFIGDIR": "{tmp}/file"}},
    {"environment": {"PYTHONWARNINGS": "nosuch"}},
    {"environment": {"USER": "", "LOGNAME": ""}},
    {"encoding": "ascii"},
    {"encoding": "latin-1"},
    {"umask": 0o077},
    {"umask": 0},
    {"umask": 0o777, "unprivileged": True},
    {"closed": [0]},
    {"closed": [1]},
    {"closed": [2]},
    {"closed": [0, 1, 2]},
    {"unprivileged": True, "where": "closed"},
    {"unprivileged": True, "where": "gone"},
    {"where": "a b, é"},
]


@dataclasses.dataclass
class Case:
    """A start, the folder it begins in, and a YAML file for --config {tmp}/x.yaml."""

    start: Start
    where: str = "w"
    text: bytes | None = None


def cases(module: str) -> st.SearchStrategy[Case]:
    """Good and odd command lines, with files and in other environments; half of them are good."""
    kind, firsts = SCRIPTS[module]
    good = st.one_of([lines(kind, first, careful=True) for first in firsts])
    short = lines(kind, firsts[0], careful=True, most=2)
    ways = {
        "good": good.map(lambda argv: Case(Start(module, argv))),
        "odd": lines(kind, firsts[0]).map(lambda argv: Case(Start(module, argv))),
        "elsewhere": st.tuples(short, st.sampled_from(ENVIRONMENTS)).map(
            lambda both: in_environment(module, *both)
        ),
    }
    if issubclass(kind, Options):
        ways["file"] = st.tuples(short, texts_of_yaml(kind)).map(
            lambda both: Case(Start(module, [*both[0], "--config", "{tmp}/x.yaml"]), text=both[1])
        )
    return st.sampled_from([*ways, "good", "good"]).flatmap(ways.__getitem__)


def in_environment(module: str, argv: list[str], settings: dict) -> Case:
    settings = dict(settings)
    where = settings.pop("where", "w")
    return Case(Start(module, argv, **settings), where)


@st.composite
def texts_of_yaml(draw: Callable, kind: type) -> bytes:
    """YAML files of options, and texts that are none."""
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        field = draw(st.sampled_from(sorted(shown(kind))))
        name = draw(st.sampled_from(sorted(n for n, of in names(kind).items() if of == field)))
        values = draw(st.lists(texts(kind, field), max_size=3))
        value = values[0] if values else ""
        quoted = yaml.safe_dump(value.encode("utf-8", "replace").decode(), width=1000).partition(
            "\n"
        )
        rows.append(f"{name}: " + draw(st.sampled_from([
            value, quoted[0], json.dumps(value), json.dumps(values), f"[{value}]", f"&a {value}",
            f"!!int {value}", f"!!python/object:os.system {value}", f"'{value}'", f"{value} # x",
            f"\n  - {value}", f"\n  {name}: {value}", "~", "null", ".inf", ".NaN", "1:30", "1_000",
            "0x10", "010", "yes", "off", "2026-01-01", "|\n  x\n  y", "\t3"])))  # fmt: skip
    text = "\n".join(rows) + draw(
        st.sampled_from(["", "\n", "\n---\na: 1\n", "\n...\n", "\n<<: *a\n"])
    )
    before = draw(
        st.sampled_from(["", "", "", "\ufeff", "%YAML 1.1\n---\n", "- ", "\t", "# é\n", "{"])
    )
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))
    return (before + text).encode(encoding, "replace")


@st.composite
def values(draw: Callable, kind: type) -> tuple[list[str], dict[str, str | list[str]]]:
    """Options as a command line, and as what a YAML file holds."""
    argv, content = [], {}
    fields = st.sampled_from(
        sorted({*shown(kind)} - {"config", "resume", "evaluate", "start_from"})
    )
    for field in draw(st.lists(fields, min_size=1, max_size=4, unique=True)):
        name = shown(kind)[field]
        flag = "--" + name.replace("_", "-")
        if isinstance(getattr(kind, field), tuple):
            content[name] = draw(st.lists(st.sampled_from(REAL + BAD_REAL[2:]), max_size=3))
            argv += [flag, *content[name]]
        else:
            content[name] = draw(texts(kind, field))
            argv.append(f"{flag}={content[name]}")
    return argv, content
