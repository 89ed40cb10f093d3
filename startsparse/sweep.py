"""Sweeps of any script: many runs over a grid of options and over seeds, and one table.

python -m startsparse.sweep SCRIPT [options] [-- flags for every run]; --help lists the options.
Running it again skips what is finished and resumes what was interrupted.
"""

import dataclasses
import hashlib
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from startsparse import names, results, runs, seeds
from startsparse.commandline import from_flags, named, parse
from startsparse.errors import OptionError, reason, run_script
from startsparse.fields import PATH, default, default_is, flag, normal, shown
from startsparse.fields import names as known_names
from startsparse.filled import filled
from startsparse.jobs import Job, require_distinct
from startsparse.launch import LaunchOptions, launch, read, say_failed, show
from startsparse.numbers import Seed
from startsparse.options import require_distinct as require_distinct_values
from startsparse.places import check_file

Point = dict[str, str]  # option -> value, one of the combinations of a grid

_OURS = ("log_dir", "result_dir")  # options of the sweep itself
_SET = ("seed", "seeds", "resume", "evaluate", *_OURS)  # what flags of runs may not name
_LONGEST = 120  # characters of the name of a run that come from its values


@dataclasses.dataclass
class SweepOptions(LaunchOptions):
    """Runs of a script over all combinations of values, and over seeds."""

    script: Annotated[str, tyro.conf.Positional] = ""
    """Script: a path as ER_DST/main.py, or a module as ER_DST.main; ER_DST alone means the same"""
    grid: Annotated[tuple[str, ...], default_is("none")] = ()
    """Values of options, as in lr=0.1,0.01 er-sparse-init=0.5,0.2; all combinations are run. Names
    with a colon between go together, as in init-density:final-density=0.5:0.05,0.2:0.01. A value
    with spaces, in quotes, gives an option several values"""
    seeds: tuple[Seed, ...] = (1,)
    """Seeds of each combination. {seed} in a value, or in the flags after --, stands for the seed
    of the run, and the name of an option of the grid for its value"""
    log_dir: Annotated[str, PATH] = "runs/sweep"
    """Folder of the run folders, and of the output of each run"""
    result_dir: Annotated[str, PATH] = "results/sweep"
    """Folder of results.csv, which gets one line per finished run"""

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        if not self.script:
            raise OptionError("SCRIPT: name a script, as ER_DST/main.py")
        super().check()
        names.check(self)
        require_distinct_values(self, "seeds")
        if not self.seeds:
            raise OptionError("--seeds: needs at least one value")


def load(script: str) -> ModuleType:
    """The module of a script, which has ``main``, ``OPTIONS`` and ``CONFIGS``.

    Raises:
        OptionError: there is none.
    """
    path = Path(script)
    if path.is_dir() and (path / "main.py").exists():
        path /= "main.py"
    if path.suffix == ".py":
        if not path.exists():
            raise OptionError(f"SCRIPT: {script} does not exist")
        name = f"{path.resolve().parent.name}.{path.stem}"
    else:
        name = script if "." in script else f"{script}.main"
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name, re.ASCII):
        raise OptionError(f"SCRIPT: '{script}' is no script such as ER_DST/main.py or ER_DST.main")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"SCRIPT: {name} cannot be imported ({reason(error)})") from None
    found = Path(str(module.__file__)).resolve()
    if path.suffix == ".py" and found != path.resolve():
        raise OptionError(f"SCRIPT: {script}: Python finds {found} as {name} instead")
    missing = [part for part in ("main", "OPTIONS", "CONFIGS") if not hasattr(module, part)]
    if missing:
        raise OptionError(f"SCRIPT: {name} has no {missing[0]}, so it is no script for a sweep")
    return module


def points(grid: Sequence[str]) -> list[Point]:
    """All combinations of the values of --grid; one without values if there is none.

    Raises:
        OptionError: a word is not NAME=VALUE,VALUE..., or names an option again.
    """
    axes: list[list[Point]] = []
    for word in grid:
        name, equals, values = word.partition("=")
        together = name.split(":")
        if not equals or not all(together):
            raise OptionError(f"--grid: '{word}' is not NAME=VALUE,VALUE,...")
        axis = []
        for value in values.split(","):
            parts = value.split(":") if len(together) > 1 else [value]
            if len(parts) != len(together):
                raise OptionError(f"--grid: '{value}' should be {len(together)} values, for {name}")
            axis.append(dict(zip(together, parts)))
        axes.append(axis)
    seen = [normal(name.lstrip("-")) for axis in axes for name in axis[0]]
    for name in seen:
        if seen.count(name) > 1:
            raise OptionError(f"--grid: {name} is named twice")
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]


def plan(options: SweepOptions, extra: list[str]) -> list[Job]:
    """The runs of a sweep.

    Args:
        extra: flags for every run.

    Raises:
        OptionError: with one line that names the option.
    """
    module = load(options.script)
    kind, configs = module.OPTIONS, module.CONFIGS
    _refuse(kind, options, extra)
    jobs = []
    for point, seed in itertools.product(points(options.grid), options.seeds):
        values: dict[str, object] = {"seed": seed}
        values |= {normal(name).replace("-", "_"): value for name, value in point.items()}
        own = [filled(word, values) for word in [*extra, *_flags(kind, point)]]
        words = {"seed": str(seed)} | {name: getattr(options, name) for name in _OURS}
        if point:
            words["name"] = _name(kind, point, own)
        argv = [*own, *(f"{flag(shown(kind)[k])}={v}" for k, v in words.items())]
        argv += ["--resume", "auto"]
        jobs.append(Job(module.__name__, argv, parse(kind, configs, argv)))
    _require_names(jobs)
    require_distinct(jobs)
    return jobs


def _refuse(kind: type, options: SweepOptions, extra: list[str]) -> None:
    """Raise `OptionError` for options that the sweep sets, or that are named at two places."""
    varied = {
        known_names(kind)[key]: name
        for word in options.grid
        for name in word.partition("=")[0].split(":")
        if (key := normal(name.lstrip("-"))) in known_names(kind)
    }
    fixed = named(kind, extra)
    for field in (*_SET, "name"):
        if field in varied:
            raise OptionError(f"--grid: {varied[field]} is set by the sweep")
    for field in _SET:
        if field in fixed:
            where = f"{flag(field)} belongs before --" if field in (*_OURS, "seeds") else (
                "the sweep sets it")  # fmt: skip
            raise OptionError(f"'{flag(field)}' after --: {where}")
    for field, name in varied.items():
        if field in fixed:
            raise OptionError(f"--grid: {name} is named after -- too")


def _flags(kind: type, point: Point) -> Iterator[str]:
    """The command line of a point of the grid."""
    for name, value in point.items():
        word, field = flag(name.lstrip("-")), known_names(kind).get(normal(name.lstrip("-")))
        if field and isinstance(default(kind, field), tuple):
            yield from (word, *_split(value))
        else:
            yield f"{word}={value}"


def _split(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise OptionError(f"--grid: '{value}': {reason(error)}") from None


def _name(kind: type, point: Point, own: list[str]) -> str:
    """The name of a run: that of the flags, and what the grid varies."""
    text = "-".join(f"{name.lstrip('-')}-{value}" for name, value in point.items())
    text = re.sub(r"[\s/]+", "_", text)
    if len(text.encode()) > _LONGEST:
        text = f"{text[: _LONGEST // 4]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    first = from_flags(kind, [w for w in own if w not in ("-h", "--help")], kind()).name
    return f"{first}-{text}" if first else text


def _require_names(jobs: Sequence[Job]) -> None:
    """Raise `OptionError` if two runs would have one folder."""
    seen = set()
    for job in jobs:
        key = (job.log, job.options.config)
        if key in seen:
            raise OptionError(f"--grid: two runs are called {job.title}; name values apart")
        seen.add(key)


def check_places(jobs: Sequence[Job], table: Path) -> None:
    """Raise `OptionError` unless the files of the sweep can be written."""
    results.check(table)
    for job in jobs:
        check_file("--log-dir", job.log)


def collect(jobs: Sequence[Job], table: Path) -> str:
    """The table of the finished runs, as Markdown; adds rows that results.csv lacks.

    Raises:
        UserError: it cannot be read or written.
    """
    done = []
    for job in jobs:
        if job.folder and (summary := runs.summary(job.folder)):
            runs.add_missing_row_by_rank_0(job.options, job.folder, summary)
            done.append(job.folder)
    return seeds.table(table, done, type(jobs[0].options)) if done else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit code, 1 if a run failed."""
    options, extra = read(SweepOptions, argv)
    jobs = plan(options, extra)
    if show(jobs, options, ["-m", jobs[0].module]):
        return 0
    path = Path(options.result_dir) / "results.csv"
    check_places(jobs, path)
    failed = launch(jobs, options)
    if text := collect(jobs, path):
        print(text)
    return say_failed(failed)


if __name__ == "__main__":
    run_script(main)
