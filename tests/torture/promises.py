"""A promise is a check that holds for every input of a hypothesis strategy.

A module of this package decorates its checks with `promise`. `make torture` tries all of them with
all their cases and prints a table; `make test` tries a sample of each.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

Check = Callable[[Any, Path], None]


@dataclasses.dataclass
class Promise:
    """A check and how often it is tried.

    Attributes:
        text: what is promised, as docs/reliability.md says it.
        inputs: what is tried.
        cases: number of inputs that `make torture` tries; fewer if there are not so many.
        sample: number of inputs that `make test` tries; 0: they take too long for it.
        check: raises if the promise is broken; takes an input and an empty folder.
    """

    text: str
    inputs: SearchStrategy[Any]
    cases: int
    sample: int
    check: Check

    @property
    def name(self) -> str:
        """The module and the check."""
        return f"{self.check.__module__.rpartition('.')[2]}.{self.check.__name__}"


@dataclasses.dataclass
class Outcome:
    """What came of a promise."""

    promise: Promise
    tried: int = 0
    faults: list[tuple[Any, BaseException]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


PROMISES: list[Promise] = []


def promise(
    text: str, inputs: SearchStrategy[Any], *, cases: int, sample: int
) -> Callable[[Check], Check]:
    """Decorator: enter a check into `PROMISES`."""

    def enter(check: Check) -> Check:
        PROMISES.append(Promise(text, inputs, cases, sample, check))
        return check

    return enter


def all_promises() -> list[Promise]:
    """`PROMISES` after all modules of this package were imported."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        importlib.import_module(f"torture.{path.stem}")
    return PROMISES


def try_out(promise: Promise, cases: int, begin: int = 0) -> Outcome:
    """Try a promise with ``cases`` inputs, always the same for one ``begin``; count its faults."""
    outcome, start = Outcome(promise), time.monotonic()

    @seed(begin)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(promise.inputs)
    def one(value: Any) -> None:
        outcome.tried += 1
        try:
            with TemporaryDirectory() as folder:
                promise.check(value, Path(folder).resolve())
        except UnsatisfiedAssumption:
            raise
        except Exception as error:
            outcome.faults.append((value, error))

    one()
    outcome.seconds = time.monotonic() - start
    return outcome
