"""What happened on a pretended GPU: launches and waits, by where and when.

An operation belongs to a *region*: ``step`` (an optimizer step, the batch and the loop around it),
``update`` (what is done around a step because it moves masks), ``look`` (at the sums of
losses, about once a second), ``saving``, ``evaluation``, or ``else``.
"""

import collections
import contextlib
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from unittest import mock

from startsparse.trainer import Trainer
from startsparse.training import Learner

ROOT = Path(__file__).parents[1]
SOURCES = {"startsparse", "STR", "ER_DST", "ER_SLT"}
_REGIONS = {
    "evaluate": "evaluation",
    "save": "saving",
    "require_finite": "saving",
    "_stop_if_bad": "look",
    "look": "look",
    "means": "look",
}
_UPDATES = {"before_step", "after_backward", "after_step"}


class Log:
    """Attributes:
    launches: (region, operation, place) -> number of kernels that CUDA would launch, about.
    waits: (region, kind, place) -> how often the CPU waited for the GPU.
    products: (device, dtype) of each convolution and matrix product.
    steps: for each optimizer step, whether masks moved in it, and its launches by region.
    """

    def __init__(self) -> None:
        self.launches: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.products: set[tuple[str, str]] = set()
        self.steps: list[tuple[bool, collections.Counter[str]]] = []
        self._epoch: FrameType | None = None  # of train_epoch, from its first step on
        self._main, self._last = threading.current_thread(), "else"
        self._lock = threading.Lock()
        self._codes: dict[object, str] = {}  # code -> its file in the project; "": elsewhere

    def launch(self, operation: str, count: int = 1) -> None:
        """Note so many kernels."""
        region, place = self._here()
        with self._lock:
            self.launches[region, operation, place] += count
            if self.steps:
                self.steps[-1][1][region] += count

    def wait(self, kind: str) -> None:
        """Note that the CPU waits until the GPU is done."""
        region, place = self._here()
        with self._lock:
            self.waits[region, kind, place] += 1

    def place(self) -> str:
        """``file:line`` of the innermost frame of the project."""
        return self._here()[1]

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """A dict that gets ``launches`` and ``waits`` of the block at its end."""
        found: dict[str, int] = {}
        before = self.launches.total(), self.waits.total()
        yield found
        found["launches"] = self.launches.total() - before[0]
        found["waits"] = self.waits.total() - before[1]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the steps of `train_epoch` are told apart."""
        with contextlib.ExitStack() as stack:
            for kind in (Learner, Trainer):
                first = self._noting(kind.before_step)
                stack.enter_context(mock.patch.object(kind, "before_step", first))
            yield
        self._epoch = None

    def _noting(self, before_step: Callable) -> Callable:
        """``before_step`` that begins a step, if `train_epoch` calls it."""

        def noted(learner, method, step):
            caller = sys._getframe(1)
            if caller.f_code.co_name == "train_epoch":
                self._epoch = caller
                self.steps.append((bool(method.moves_masks(step)), collections.Counter()))
            return before_step(learner, method, step)

        return noted

    def summary(self) -> dict:
        """As JSON: ``steps``, ``updates`` and, for each region, ``launches`` and ``waits``.

        ``products`` are device -> dtypes that it computed in.
        ``launches`` in a step are the median of the steps that move no mask, those in an update are
        the mean; of other regions the total. ``waits`` are "kind file:line" -> count, in all.
        """
        plain = [counts["step"] for moves, counts in self.steps if not moves]
        moving = [counts["update"] for moves, counts in self.steps if moves]
        total: collections.Counter[str] = collections.Counter()
        for (region, _, _), count in self.launches.items():
            total[region] += count
        launches = dict(total)
        launches["step"] = statistics.median(plain) if plain else 0
        launches["update"] = statistics.mean(moving) if moving else 0
        waits: dict[str, dict[str, int]] = {}
        for (region, kind, place), count in sorted(self.waits.items()):
            waits.setdefault(region, {})[f"{kind} {place}"] = count
        products: dict[str, list[str]] = {}
        for device, dtype in sorted(self.products):
            products.setdefault(device, []).append(dtype)
        counts = {"steps": len(self.steps), "updates": len(moving)}
        return counts | {"launches": launches, "waits": waits, "products": products}

    def _here(self) -> tuple[str, str]:
        """The region and the place of the innermost frame of the project."""
        found, place, frame = "", "", sys._getframe(2)
        while frame and not (found and place):
            code = frame.f_code
            if file := self._file(code):
                place = place or f"{file}:{frame.f_lineno}"
                found = found or self._region(code.co_name, frame)
            frame = frame.f_back
        if threading.current_thread() is not self._main:
            return self._last, place or "?"  # a replica's thread works for the main one
        self._last = found or "else"
        return self._last, place or "?"

    def _file(self, code) -> str:
        if code not in self._codes:
            path = Path(code.co_filename)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in SOURCES
            self._codes[code] = path.relative_to(ROOT).as_posix() if inside else ""
        return self._codes[code]

    def _region(self, function: str, frame: FrameType) -> str:
        if function in _UPDATES and self.steps and self.steps[-1][0]:
            return "update"
        if function == "train_epoch":
            # Before its first step the epoch draws the order of its data.
            return "step" if frame is self._epoch else "else"
        return _REGIONS.get(function, "")
