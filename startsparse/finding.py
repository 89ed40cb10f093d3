"""Which folder a run has: a new one, or that of the run to resume; and whether it can be written.

<log-dir>/<config>/<name>/seed-<seed>; `runs` says what it holds.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from startsparse import beginning, effects, machine, results
from startsparse.beginning import DIGESTS, SOURCES
from startsparse.commandline import read_values, read_yaml, run_folder
from startsparse.errors import OptionError, UserError
from startsparse.fields import flag
from startsparse.names import check_characters
from startsparse.optimizers import kept
from startsparse.options import Options
from startsparse.places import check_folder, check_room
from startsparse.processes import by_rank_0
from startsparse.runs import FREE, Run, results_csv


@by_rank_0
def find_run_by_rank_0(options: Options) -> Path | None:
    """The folder of the run that --resume names; None for a new run.

    Raises:
        OptionError: it does not exist, or was started with other options.
    """
    if not options.resume:
        return None
    folder = _resumed(options)
    if folder is None and options.evaluate:
        raise OptionError(f"--evaluate: there is no run in {_base(options)} yet")
    if folder is not None and not read_values(path := folder / "options.yaml"):
        raise OptionError(f"--resume: {path} is empty; put back what the run wrote there")
    if folder is not None:
        saved = read_yaml(type(options), folder / "options.yaml")
        saved.resume = str(folder)  # its copies of files of other runs are there
        effects.settle(saved)
        saved.derive()
        check_same(options, saved, f"the run in {folder} was started")
        if not (folder / "summary.json").exists():
            _check_sources(folder)
    return folder


def open_run(options: Options, folder: Path | None = None) -> Run:
    """The run in ``folder``, or a new one."""
    if folder is not None:
        return Run(folder, options)
    return Run(_create_by_rank_0(options, machine.environment()), options)


def next_folder(options: Options) -> Path:
    """The folder that a new run gets, unless another process is faster."""
    return beginning.free_folder(_base(options))


def source(options: Options, name: str) -> Path:
    """The path that option ``name`` points to; for a resumed run, its copy in the run folder."""
    folder = _resumed(options) if options.resume else None
    return beginning.copy_or_original(folder, options, name)


@by_rank_0
def check_places_by_rank_0(options: Options, folder: Path | None) -> None:
    """Raise `OptionError` unless a run can write its files, before training rather than after it.

    Args:
        folder: of the run to resume; None: a new one.
    """
    if folder is None:
        check_folder("--log-dir", _base(options))
    else:
        check_folder("--resume", folder)
    table = results_csv(options)
    results.check(table)
    check_characters("--log-dir", results.key(table, folder or _base(options)))


@by_rank_0
def check_room_by_rank_0(options: Options, folder: Path | None, model: nn.Module) -> None:
    """Raise `OptionError` unless the disk has room for the checkpoints of a run.

    These are two of weights and optimizer, as one replaces the other, and two of weights, for the
    best epoch; a run to resume has one of each.

    Args:
        folder: of the run to resume; None: a new one.
        model: the network, with or without data.
    """
    if options.evaluate:
        return
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters())
    # Steps are counted in one number each; the rest is as large as the parameter.
    states = [name for name in kept(options.optimizer, options.momentum) if name != "step"]
    whole = weights + len(states) * trained
    places = "--log-dir" if folder is None else "--resume"
    check_room(places, folder or _base(options), (whole + weights) * (2 if folder is None else 1))


def check_same(options: Options, saved: Options, what: str) -> None:
    """Raise `OptionError` for the first option that is neither `FREE` nor as in ``saved``.

    ``what`` starts the message: "the run in ... was started".
    """
    for name, value in dataclasses.asdict(saved).items():
        if name not in FREE and getattr(options, name) != value:
            raise OptionError(f"{flag(name)}: {getattr(options, name)}, but {what} with {value}")


def _check_sources(folder: Path) -> None:
    """Raise `UserError` unless the run's copies of files of other runs are as it made them."""
    path = folder / SOURCES / DIGESTS
    if not path.exists():
        return
    try:
        digests = dict(json.loads(path.read_text(encoding="utf-8")))
        for name, digest in digests.items():
            copy = folder / SOURCES / name
            if not copy.exists() or beginning.digest(copy) != digest:
                what = "has changed" if copy.exists() else "is gone"
                raise UserError(f"--resume: {copy} {what} since the run began; start the run anew")
    except (OSError, ValueError, TypeError):
        raise UserError(f"--resume: {path} is damaged; start the run anew") from None


def _resumed(options: Options) -> Path | None:
    return _newest(options) if options.resume == "auto" else run_folder(options.resume)


def _base(options: Options) -> Path:
    config = Path(options.config).stem if options.config else options.set
    name = options.name or options.default_name()
    return Path(options.log_dir) / config / name / f"seed-{options.seed}"


def _newest(options: Options) -> Path | None:
    """The last of seed-1, seed-1-2, seed-1-3 ... that has these options' seed; None without any.

    The seed comes from options.yaml, which tells seed-1-2 and seed-12 apart.
    """
    base, runs = _base(options), []
    for path in base.parent.glob("seed-*/options.yaml"):
        if str(read_values(path).get("seed")) == str(options.seed):
            number = path.parent.name.removeprefix(base.name).removeprefix("-")
            runs.append((int(number) if number.isdecimal() else 1, path.parent))
    return max(runs)[1] if runs else None


@by_rank_0
def _create_by_rank_0(options: Options, environment: dict[str, Any]) -> Path:
    return beginning.create(_base(options), options, environment)
