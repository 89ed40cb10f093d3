"""Several processes that train one network on CPUs, as torchrun starts them.

Each runs the whole script. All draw the same weights and masks, since randomness is derived. Each
trains on its part of every batch (`data.batches.parts`), and `all_average_gradients` turns its
gradients into those of the whole batch, so that all have the same weights. Rank 0 writes the files,
and decides for all where processes could differ (`by_rank_0`).

Collectives are functions that every process must call, in the same order: one that calls alone
waits for ever. Their names begin with ``all_`` or end in ``_by_rank_0``; all methods of `runs.Run`
and `candidates.Candidates` are collectives, too.

In a single process all of this does nothing.
"""

import contextlib
import dataclasses
import datetime
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from startsparse import errors, stopping

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass
class World:
    """The processes of this run, as this one sees them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        store: keys that they read and write without a collective; None in a single process.
    """

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None


_world = World()


class LostError(errors.UserError):
    """Another process of the run is gone."""


def rank() -> int:
    """Number of this process, from 0."""
    return _world.rank


def world_size() -> int:
    """Number of processes."""
    return _world.size


def run_script(main: Callable[[], int | None]) -> None:
    """`errors.run_script`, in one of several processes if torchrun started them."""
    start()
    errors.run_script(main, _say_once)


def start() -> None:
    """Find the other processes, if torchrun started any; only rank 0 logs."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return
    _world.store, _world.rank, _world.size = next(dist.rendezvous("env://"))
    # The others notice at once when a process ends, and wait for long while rank 0 downloads.
    timeout = datetime.timedelta(days=1)
    dist.init_process_group("gloo", None, timeout, _world.size, _world.rank, _world.store)
    logging.getLogger("startsparse").disabled = _world.rank > 0


def _say_once(line: str) -> None:
    """Print why this process stops, unless another one has printed why all stop."""
    if _world.store is None:
        errors.say(line)
        return
    try:
        if _world.store.add("stopping", 1) == 1:
            errors.say(line)
            _world.store.set("printed", "")
        else:  # wait for it, as torchrun kills all others when one ends
            _world.store.wait(["printed"], datetime.timedelta(seconds=10))
    except dist.DistError:  # torchrun, which has the store, is gone, or who printed it
        if _world.rank == 0 and stopping.is_orphan():
            errors.say(line)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside it, this process counts as the only one."""
    before = _world.rank, _world.size
    _world.rank, _world.size = 0, 1
    try:
        yield
    finally:
        _world.rank, _world.size = before


def all_from_rank_0(make: Callable[[], T]) -> T:
    """What ``make`` returns in rank 0; no other process calls it."""
    if _world.size == 1:
        return make()
    message: list = [None]
    if _world.rank == 0:
        with alone():
            message = [make()]
    with _talking():
        dist.broadcast_object_list(message)
    return message[0]


def by_rank_0(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a call that all processes make is made by rank 0 (`all_from_rank_0`)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return all_from_rank_0(lambda: function(*args, **kwargs))

    return call


@contextlib.contextmanager
def all_after_rank_0() -> Iterator[None]:
    """Rank 0 runs the block first, then the others do, which find its work done."""
    if _world.rank > 0:
        all_from_rank_0(lambda: None)
    try:
        yield
    finally:  # after an error, too: the others may raise it again
        if _world.rank == 0:
            all_from_rank_0(lambda: None)


def all_copy_rank_0(model: nn.Module) -> None:
    """Load the weights, masks and running statistics of rank 0.

    Until then, statistics of BatchNorm are those of each process's part, as with DataParallel.
    """
    if _world.size > 1:
        model.load_state_dict(all_from_rank_0(model.state_dict))


def all_reduce(sums: Tensor) -> Tensor:
    """Replace ``sums`` by the sum over the processes."""
    if _world.size > 1:
        with _talking():
            dist.all_reduce(sums)
    return sums


def all_agree(asked: bool) -> bool:
    """Whether ``asked`` is true in any process."""
    return bool(all_reduce(torch.tensor(float(asked))))


@torch.no_grad()
def all_average_gradients(
    parameters: Sequence[nn.Parameter], examples: int, stop: bool = False
) -> bool:
    """Make the gradients those of the whole batch: means weighted by the examples of each process.

    One all-reduce per step carries all gradients, the number of examples and ``stop``. Afterwards
    the gradients are views of its buffer, in the memory format of their parameters.

    Args:
        parameters: of the same shapes in the same order in all processes.
        examples: of this process's part; 0: its gradients do not count, and it may have none.
        stop: whether this process was asked to stop.

    Returns:
        Whether any process was asked to stop.
    """
    if _world.size == 1:
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
    all_reduce(message)
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
