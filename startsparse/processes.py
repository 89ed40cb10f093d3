"""Several processes that train one network on CPUs, as torchrun starts them.

Each runs the whole script. All draw the same weights and masks, since randomness is derived; each
has its share of every batch (`data.batches.parts`), and `average_gradients` makes of its gradients
those of the whole batch, so that weights stay the same everywhere. Files are written, and what may
come out differently is found, by the first process for all (`by_first`).

In a process that is alone all of this does nothing.
"""

import contextlib
import datetime
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from startsparse import errors

P = ParamSpec("P")
T = TypeVar("T")

_rank, _count = 0, 1
_store: dist.Store | None = None


class LostError(errors.UserError):
    """Another process of the run is gone."""


def rank() -> int:
    """Number of this process, from 0."""
    return _rank


def count() -> int:
    """Number of processes."""
    return _count


def run_script(main: Callable[[], int | None]) -> None:
    """`errors.run_script`, in one of several processes if torchrun started them."""
    start()
    errors.run_script(main, _say_once)


def start() -> None:
    """Find the other processes, if torchrun started any; only the first one logs."""
    global _rank, _count, _store
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return
    _store, _rank, _count = next(dist.rendezvous("env://"))
    # A process that ends is noticed at once; the others may wait while the first one downloads.
    patience = datetime.timedelta(days=1)
    dist.init_process_group("gloo", None, patience, _count, _rank, _store)
    logging.getLogger("startsparse").disabled = _rank > 0


def _say_once(line: str) -> None:
    """Say why this process stops, unless another one has said why all do."""
    if _count == 1:
        errors.say(line)
        return
    with contextlib.suppress(dist.DistError):  # the process that said it is gone
        if _store.add("stopping", 1) == 1:
            errors.say(line)
            _store.set("said", "")
        else:  # not before: torchrun kills all others when one ends
            _store.wait(["said"], datetime.timedelta(seconds=10))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process is the only one."""
    global _rank, _count
    before = _rank, _count
    _rank, _count = 0, 1
    try:
        yield
    finally:
        _rank, _count = before


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, which alone calls it, when it has returned."""
    if _count == 1:
        return make()
    made = [None]
    if _rank == 0:
        with alone():
            made = [make()]
    with _talking():
        dist.broadcast_object_list(made)
    return made[0]


def by_first(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a call that all processes make is made by the first (`from_first`)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return from_first(lambda: function(*args, **kwargs))

    return call


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process does what is within before the others, which find it done."""
    if _rank > 0:
        from_first(lambda: None)
    try:
        yield
    finally:  # errors too may come again in the others
        if _rank == 0:
            from_first(lambda: None)


def align(model: nn.Module) -> None:
    """Weights, masks and running statistics as the first process has them.

    Statistics of BatchNorm are of each process's own share until then, as with DataParallel.
    """
    if _count > 1:
        model.load_state_dict(from_first(model.state_dict))


def add_up(sums: Tensor) -> Tensor:
    """Replace ``sums`` by the sum over the processes."""
    if _count > 1:
        with _talking():
            dist.all_reduce(sums)
    return sums


@torch.no_grad()
def average_gradients(
    parameters: Sequence[nn.Parameter], examples: int, stop: bool = False
) -> bool:
    """Make the gradients those of the whole batch: means weighted by the examples of each process.

    One message per step: all gradients, the number of examples and ``stop``. The gradients are
    views of it afterwards, in the memory format of their parameters.

    Args:
        parameters: of the same shapes in the same order in all processes.
        examples: of this process's share; 0: its gradients are left out, and it may have none.
        stop: whether this process was asked to stop.

    Returns:
        Whether any process was.
    """
    if _count == 1:
        return stop
    sizes = [parameter.numel() for parameter in parameters]
    message = torch.empty(sum(sizes) + 2, dtype=parameters[0].dtype)
    message[-2], message[-1] = examples, stop
    views = [
        part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
        for part, parameter in zip(message.split([*sizes, 2]), parameters)
    ]
    for view, parameter in zip(views, parameters):
        if examples and parameter.grad is not None:
            torch.mul(parameter.grad, examples, out=view)
        else:
            view.zero_()
    add_up(message)
    total, stops = message[-2:].tolist()
    message.div_(total)
    for view, parameter in zip(views, parameters):
        parameter.grad = view
    return stops > 0


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo raises
        # [file:line] reason. Advice ...
        reason = str(error).rpartition("] ")[2].partition(". ")[0].strip()
        raise LostError(f"another process of this run is gone ({reason})") from None
