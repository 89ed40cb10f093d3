"""The state of a run as a checkpoint holds it: whether everything in it is as a run writes it."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from startsparse.checkpoint import tensor_fault
from startsparse.errors import UserError
from startsparse.fields import flag
from startsparse.optimizers import kept
from startsparse.options import Options
from startsparse.phases import Phase, Position
from startsparse.reading import is_number
from startsparse.runs import computed


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of plain value."""

    words: str
    fits: Callable[[Any], bool]


COUNT = Kind("a whole number from 0 on", lambda v: type(v) is int and v >= 0)
NUMBER = Kind("a number", is_number)
AMOUNT = Kind("a finite number from 0 on", lambda v: is_number(v) and 0 <= v < math.inf)
SHARE = Kind("a share", lambda v: is_number(v) and not (v < 0 or v > 1))  # NaN: of no examples
TEXT = Kind("a text", lambda v: type(v) is str)
CELL = Kind("a cell of a table", lambda v: v is None or type(v) in (str, bool, int, float))
SUMS = Kind(
    "four sums", lambda v: torch.is_tensor(v) and v.shape == (4,) and v.dtype == torch.float64
)
ANY = Kind("anything", lambda _: True)

CANDIDATE = {"epoch": COUNT, "valid_accuracy": SHARE, "density": SHARE}
ROW = {"phase": TEXT, **CANDIDATE}

# What a value is: a `Kind`; a dict of names, of which ... stands for any other; a list of one kind.
STATE: dict[Any, Any] = {
    "model": {...: ANY},
    "optimizer": {"state": {...: {...: ANY}}, "param_groups": [{"params": [COUNT], ...: ANY}]},
    "position": {field.name: COUNT for field in dataclasses.fields(Position)},
    "sums": SUMS,
    "history": [{**ROW, ...: CELL}],
    "tables": {...: [{...: CELL}]},
    "best": {...: NUMBER},
    "rivals": [CANDIDATE],
    "ledger": {"training": AMOUNT, "dense": AMOUNT, "counted": AMOUNT},
    "compute": {"computes": [TEXT], "density": AMOUNT},
    "clock": {"cpu_seconds": AMOUNT, "seconds": AMOUNT},
    "images": TEXT,
    ...: ANY,  # of a later version
}


def check(
    state: Mapping[str, Any],
    path: Path,
    optimizer: torch.optim.Optimizer,
    options: Options,
    steps: int,
) -> None:
    """Raise `UserError` for the first thing in a checkpoint that no run of these options writes.

    Args:
        state: of `checkpoint.load`; its model is checked by `checkpoint.load_model`.
        optimizer: that is to continue from the state.
        options: of the run; `check_trained` compares them with those in the checkpoint.
        steps: of an epoch.
    """
    if set(state) == {"model"}:
        raise UserError(f"{path}: holds weights only, as best.pt does, and not the state of a run")
    if not {"ledger", "clock"} <= state.keys():
        raise UserError(f"{path}: an older version wrote it; start the run anew")
    fault = _fault(state, STATE, "")
    if not fault:
        fault = _epochs_fault(state["history"], state["best"], state["rivals"])
    if not fault and state["position"]["step"] >= steps:
        fault = f"'position' is step {state['position']['step'] + 1} of {steps}"
    if not fault:
        fault = _optimizer_fault(
            state["optimizer"], optimizer, kept(options.optimizer, options.momentum)
        )
    if not fault and "options" in state:  # older versions kept none
        fault = _fault(state["options"], {...: ANY}, "options")
    if fault:
        raise UserError(f"{path}: is no state of this run: {fault}")


def check_trained(options: Options, trained: Mapping[str, Any], folder: Path) -> None:
    """Raise `UserError` for the first option that is not as in ``trained``, of a checkpoint.

    Then options.yaml has changed since the checkpoint was written.
    """
    for name, value in computed(options).items():
        if name in trained and trained[name] != value:
            raise UserError(
                f"--resume: {folder}/options.yaml has {flag(name)} {value}, but the run was "
                f"trained with {trained[name]}; put that back, or start another run with --config"
            )


def check_place(position: Position, epochs: int, phases: Sequence[Phase], path: Path) -> None:
    """Raise `UserError` unless a run of ``phases`` can stand at ``position`` after ``epochs``."""
    last = min(position.phase, len(phases) - 1)
    before = sum(phase.epochs for phase in phases[:last])
    if position.phase > last or position.epoch > phases[last].epochs:
        raise UserError(f"{path}: is no state of this run: it stands behind the end of the run")
    if epochs != before + position.epoch:
        raise UserError(
            f"{path}: is no state of this run: 'history' has {epochs} epochs, its position is "
            f"behind {before + position.epoch}"
        )


def _fault(value: Any, kind: Any, name: str) -> str:
    """Where ``value`` is not of a kind, see `STATE`; "" if it is."""
    if isinstance(kind, Kind):
        return "" if kind.fits(value) else f"'{name}' should be {kind.words}"
    parts: Mapping[Any, Any]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"'{name}' should be a list"
        parts, kinds = dict(enumerate(value)), {...: kind[0]}
    else:
        if not isinstance(value, dict):
            return f"'{name}' should have named parts"
        parts, kinds = value, kind
    for part in kinds:
        if part is not ... and part not in parts:
            return f"there is no '{_joined(name, part)}'"
    for part, inside in parts.items():
        if part not in kinds and ... not in kinds:
            return f"there is a '{_joined(name, part)}'"
        if fault := _fault(inside, kinds.get(part, kinds.get(...)), _joined(name, part)):
            return fault
    return ""


def _epochs_fault(history: list[dict], best: dict, rivals: list[dict]) -> str:
    """What of the epochs and candidates does not agree; "" if all does."""
    if [row["epoch"] for row in history] != list(range(1, len(history) + 1)):
        return "'history' does not count the epochs from 1"
    if best and (fault := _fault(best, CANDIDATE, "best")):
        return fault
    for row in [*rivals, *[best] * bool(best)]:
        if not 0 < row["epoch"] <= len(history):
            return f"'history' has no epoch {row['epoch']}, a candidate of which is kept"
        if any(row[name] != history[row["epoch"] - 1][name] for name in CANDIDATE):
            return f"'history' has another epoch {row['epoch']} than the candidate"
    return ""


def _joined(name: str, part: Any) -> str:
    return f"{name}.{part}" if name else str(part)


def _optimizer_fault(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, names: Collection[str]
) -> str:
    """What of a state does not fit the optimizer: groups, names, shapes; "" if all fits."""
    now = optimizer.state_dict()
    if len(state["param_groups"]) != len(now["param_groups"]):
        return f"'optimizer' has {len(state['param_groups'])} groups of parameters"
    for saved, group in zip(state["param_groups"], now["param_groups"]):
        if saved["params"] != group["params"]:
            return "'optimizer' has other parameters"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if names and state["state"] and parameter.requires_grad and index not in state["state"]:
            return f"'optimizer' has nothing of parameter {index}"
    for index, values in state["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or set(values) != set(names):
            return f"'optimizer' has something else of parameter {index} than {names}"
        for name, value in values.items():
            one = isinstance(value, torch.Tensor) and value.dim() == 0
            expected = torch.zeros(()) if one else parameters[index]
            if fault := tensor_fault(value, expected):
                return f"'optimizer': '{name}' of parameter {index} {fault}"
    return ""
