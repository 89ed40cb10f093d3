"""Command lines, YAML files and environments at random, for each script and command."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import get_args, get_type_hints

import yaml
from hypothesis import strategies as st
from tyro.constructors import PrimitiveConstructorSpec

from ER_DST.options import DSTOptions
from ER_SLT.options import CIFAROptions, SLTOptions
from startsparse.export.command import ExportOptions
from startsparse.fields import is_flag, names, shown
from startsparse.report import ReportOptions
from startsparse.tabular.options import TabularOptions
from STR.options import STROptions
from STR.run_imp import SweepOptions
from torture.promises import promise
from torture.scripts_tried import Start, check, run

MLP = ["--arch", "mlp", "--width", "8", "--set", "digits"]
TABLE = ["--seeds", "1", "--width", "4", "--epochs", "1", "--final-epochs", "1"]

# what a command line begins with, so that most of them train something small
SCRIPTS: dict[str, tuple[type, list[str]]] = {
    "STR.main": (STROptions, MLP),
    "ER_DST.main": (DSTOptions, [*MLP, "--sparse"]),
    "ER_SLT.main": (SLTOptions, MLP),
    "ER_SLT.cifar_main": (CIFAROptions, MLP),
    "STR.run_imp": (SweepOptions, ["--config", "configs/digits.yaml", "--set", "digits"]),
    "startsparse.tabular": (TabularOptions, TABLE),
    "startsparse.report": (ReportOptions, ["{tmp}/results/results.csv"]),
    "startsparse.export": (ExportOptions, ["{tmp}/run", "--repeats", "1"]),
}

WHOLE = ["0", "1", "2", "3", "7", "16", "2147483647"]
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
REAL = ["0", "1", "0.5", "0.1", "0.3", "1e-3", "1e-6", "2", "1e10", "1e38", ".5", "5.", "1e-400"]
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
SETS = ["digits", "karate", "modular-addition", "cifar10", "imagenet", "folder", "cora", "mnist"]
WIDTHS = ["0", "1", "2", "5", "33", "-1", "100000", "2147483647", "2147483648"]


# --- strategies -----------------------------------------------------------------------------------


def texts(kind: type, field: str) -> st.SearchStrategy[str]:
    """Values of an option: mostly good ones, then odd and bad ones."""
    hint, *_ = [get_type_hints(kind, include_extras=True)[field]]
    plain = get_type_hints(kind)[field]
    types = {plain, *get_args(plain)}
    specs = [e for e in get_args(hint)[1:] if isinstance(e, PrimitiveConstructorSpec)]
    metavar = str(specs[0].metavar) if specs else ""
    if field in ("width", "modulus", "image_size", "year"):
        good = [*WIDTHS, "59", "2018"]
    elif field == "repeats":
        good = ["0", "1", "2", "-1"]
    elif field == "set":
        good = SETS
    elif metavar.startswith("{") and bool not in types:
        good = [*metavar.strip("{}").split(","), "nosuch"]
        good += [good[0].upper().replace("-", "_")]
    elif bool in types:
        good = ["True", "False", "no", "on", "0", "maybe"]
    elif float in types:
        return st.sampled_from(REAL) | st.sampled_from(REAL + BAD_REAL) | odd()
    elif int in types:
        return st.sampled_from(WHOLE) | st.sampled_from(WHOLE + BAD_WHOLE) | odd()
    elif field in ("name", "expt_setup", "tables", "by", "of", "band"):
        good = ["a", "a/b", "{tmp}/abs", "../up", "seed", "density", "test_accuracy", "a b", "=1+1",
                "{tmp}/table.csv", "breast-cancer", "digits", "~", "a/../b", ".", "run"]  # fmt: skip
    else:
        return st.sampled_from(PATHS) | st.sampled_from(PATHS) | odd()
    return st.sampled_from(good) | st.sampled_from(good) | odd()


def odd() -> st.SearchStrategy[str]:
    """Values that no option expects."""
    return st.sampled_from(ODD)


def spelled(name: str) -> st.SearchStrategy[str]:
    """The flag of a name, mostly as --help spells it."""
    usual = "--" + name.lstrip("-").replace("_", "-")
    others = [usual.upper(), usual.replace("-", "_").replace("__", "--", 1), usual[:-1], usual + "s",
              usual[1:], "--no-" + usual[2:], usual + "=", usual.replace("e", "é")]  # fmt: skip
    return st.just(usual) | st.just(usual) | st.just(usual) | st.sampled_from(others)


@st.composite
def option(draw: Callable, kind: type) -> list[str]:
    """An option with its value, or without one, or with one too many."""
    field = draw(st.sampled_from(sorted(shown(kind))))
    known = sorted(n for n, of in names(kind).items() if of == field) or [field]
    word = draw(spelled(draw(st.just(shown(kind)[field]) | st.sampled_from(known))))
    value = draw(texts(kind, field))
    if isinstance(getattr(kind, field, None), tuple):
        return [word, *draw(st.lists(texts(kind, field), max_size=3))]
    bare = isinstance(getattr(kind, field, None), bool) and is_flag(kind, field)
    how = draw(st.integers(0, 11))
    if how == 0 or (bare and how < 8):
        return [word]
    if how == 1:
        return [word, value, value]
    return [f"{word}={value}"] if how < 5 else [word, value]


def lines(kind: type, first: list[str], most: int = 5) -> st.SearchStrategy[list[str]]:
    """Command lines."""
    options = st.lists(option(kind), max_size=most).map(lambda found: sum(found, []))
    begun = options.map(lambda words: [*first, *words])
    return begun | begun | begun | options.map(lambda words: [*words, *first]) | options


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
    {"environment": {"STARTSPARSE_CACHE": "{tmp}/file"}},
    {"environment": {"STARTSPARSE_CACHE": "{tmp}/closed"}, "unprivileged": True},
    {"environment": {"STARTSPARSE_CACHE": ""}},
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
    {"encoding": "utf-16"},
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
    """Command lines in the usual environment, and in others."""
    kind, first = SCRIPTS[module]
    usual = lines(kind, first).map(lambda argv: Case(Start(module, argv)))
    other = st.tuples(lines(kind, first, most=2), st.sampled_from(ENVIRONMENTS)).map(
        lambda both: _in_environment(module, *both)
    )
    if kind not in (STROptions, DSTOptions, SLTOptions):
        return usual | usual | other
    files = st.tuples(lines(kind, first, most=1), texts_of_yaml(kind)).map(
        lambda both: Case(Start(module, [*both[0], "--config", "{tmp}/x.yaml"]), text=both[1])
    )
    return usual | files | other


def _in_environment(module: str, argv: list[str], settings: dict) -> Case:
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
            "0x10", "010", "yes", "off", "2026-01-01", "*a", "|\n  x\n  y", ">", "? x", "\t3"])))  # fmt: skip
    text = "\n".join(rows) + draw(
        st.sampled_from(["", "\n", "\n---\na: 1\n", "\n...\n", "\n<<: *a\n"])
    )
    before = draw(
        st.sampled_from(["", "", "", "\ufeff", "%YAML 1.1\n---\n", "- ", "\t", "# é\n", "{"])
    )
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))
    return (before + text).encode(encoding, "replace")


# --- the promises ---------------------------------------------------------------------------------


@functools.cache
def _template() -> Path:
    """A folder with files of every kind, and a finished run."""
    folder = Path(mkdtemp())
    (folder / "w").mkdir()
    argv = [*MLP, "--epochs", "1", "--warmup-length", "0", "--log-dir", "{tmp}/runs"]
    start = Start("STR.main", [*argv, "--result-dir", "{tmp}/results"], whole=True)
    ended = run(start, folder, folder / "w")
    assert ended.code == 0, ended
    (run_folder,) = (folder / "runs").glob("*/*/seed-1")
    run_folder.rename(folder / "run")
    shutil.rmtree(folder / "runs")
    (folder / "file").write_text("x\n")
    (folder / "a b, é").mkdir()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty.yaml").touch()
    (folder / "empty.csv").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nosuch")
    (folder / "table.csv").write_text(
        "a,b,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(40))
    )
    return folder


def _try(case: Case, folder: Path) -> None:
    shutil.copytree(_template(), folder, symlinks=True, dirs_exist_ok=True)
    where = folder / case.where
    where.mkdir(exist_ok=True)
    closed = folder / "closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o500)
    if case.text is not None:
        (folder / "x.yaml").write_bytes(case.text)
    try:
        check(run(case.start, folder, where), case.start)
    finally:
        closed.chmod(0o700)


def _enter(module: str, what: str, sample: int) -> None:
    """The promise of one script."""

    def tried(case: Case, folder: Path) -> None:
        _try(case, folder)

    tried.__name__ = module.replace(".", "_")
    text = f"{what}: any command line, file and environment trains a step or ends with one line"
    promise(text, cases(module), cases=1000, sample=sample)(tried)


_enter("STR.main", "STR/main.py", 5)
_enter("ER_DST.main", "ER_DST/main.py", 4)
_enter("ER_SLT.main", "ER_SLT/main.py", 4)
_enter("ER_SLT.cifar_main", "ER_SLT/cifar_main.py", 2)
_enter("STR.run_imp", "STR/run_imp.py", 3)
_enter("startsparse.tabular", "startsparse.tabular", 3)
_enter("startsparse.report", "startsparse.report", 4)
_enter("startsparse.export", "startsparse.export", 3)


@promise(
    "A run of an epoch ends well in any environment, or with one line",
    st.tuples(st.sampled_from(["STR.main", "ER_DST.main", "ER_SLT.main"]), st.sampled_from(ENVIRONMENTS)),
    cases=200,
    sample=2,
)  # fmt: skip
def a_whole_run(both, folder):
    module, settings = both
    argv = [*SCRIPTS[module][1], "--epochs", "1", "--warmup-length", "0"]
    argv += ["--levels", "1"] if module == "ER_SLT.main" else []
    case = _in_environment(module, argv, settings)
    case.start.whole = True
    _try(case, folder)
