"""Several processes that train one network, as torchrun starts them, on one or many machines.

Each runs the whole script, on a GPU of its own or on the CPU. All draw the same weights and masks,
since randomness is derived. Each trains on its part of every batch (`data.batches.parts`), with a
loss of which the mean over the processes is that of the batch. DistributedDataParallel
(`all_replicate`) averages the gradients, so that all processes have the same weights. It does not
know the parameters of the sparse form, whose gradients `all_average_gradients` averages. Rank 0
writes the files, and decides for all where processes could differ (`by_rank_0`).

Collectives are functions that every process must call, in the same order: one that calls alone
waits for ever. Their names begin with ``all_`` or end in ``_by_rank_0``; all methods of `runs.Run`
and `candidates.Candidates` are collectives, too.

In a single process all of this does nothing.
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from startsparse import errors, stopping

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass
class World:
    """The processes of this run, as this one sees them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process among those of its machine, from 0.
        local_size: number of processes of this machine.
        store: keys that they read and write without a collective; None in a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
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


def local_rank() -> int:
    """Number of this process among those of its machine, from 0: that of its GPU."""
    return _world.local_rank


def local_size() -> int:
    """Number of processes of this machine."""
    return _world.local_size


def shows() -> bool:
    """Whether this process logs and shows progress: rank 0 does, also inside `alone`."""
    return not logging.getLogger("startsparse").disabled


def run_script(main: Callable[[], int | None]) -> None:
    """`errors.run_script`, in one of several processes if torchrun started them."""
    start()
    try:
        errors.run_script(lambda: _noticing_loss(main), _say_once)
    except SystemExit as end:
        if _world.store is not None:
            _leave(end.code)
        raise


def _noticing_loss(main: Callable[[], int | None]) -> int | None:
    """Run ``main``; what a backward pass raises as another process is gone is a `LostError`."""
    try:
        return main()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise _lost(error) from None


def start() -> None:
    """Find the other processes, if torchrun started any; only rank 0 logs."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return
    _world.store, _world.rank, _world.size = next(dist.rendezvous("env://"))
    _world.local_rank = int(os.environ["LOCAL_RANK"])
    _world.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    # gloo carries what lies on the CPU, and objects.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The others notice at once when a process ends, and wait for long while rank 0 downloads.
    timeout = datetime.timedelta(days=1)
    dist.init_process_group(backend, None, timeout, _world.size, _world.rank, _world.store)
    logging.getLogger("startsparse").disabled = _world.rank > 0


def _leave(code: object) -> None:
    """End this process at once: PyTorch's own end takes seconds, and may wait for lost ones."""
    if not code:
        dist.destroy_process_group()  # else NCCL warns
    stopping.end_children()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


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


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if _world.size == 1:
        return [value]
    values: list = [None] * _world.size
    with _talking():
        dist.all_gather_object(values, value)
    return values


def by_rank_0(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a call that all processes make is made by rank 0 (`all_from_rank_0`)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return all_from_rank_0(lambda: function(*args, **kwargs))

    return call


@contextlib.contextmanager
def all_in_turn() -> Iterator[None]:
    """Rank 0 runs the block first, then one process of each other machine, then the others.

    The later ones find its work done, on a disk that machines share or on one of their own.
    """
    turn = 0 if _world.rank == 0 else 1 if _world.local_rank == 0 else 2
    for _ in range(turn):
        all_agree(False)
    try:
        yield
    finally:  # after an error, too: the others may raise it again
        for _ in range(turn, 2):
            all_agree(False)


@torch.no_grad()
def all_copy_rank_0(model: nn.Module) -> None:
    """Load the weights, masks and running statistics of rank 0.

    Until then, statistics of BatchNorm are those of each process's part, as with DataParallel.
    """
    if _world.size == 1:
        return
    for tensor in model.state_dict().values():
        message = tensor.clone(memory_format=torch.contiguous_format)
        with _talking():
            dist.broadcast(message, 0)
        if _world.rank > 0:
            tensor.copy_(message)


@torch.no_grad()
def all_require_equal(model: nn.Module, when: str) -> None:
    """Check that all processes have the same parameters and masks, to the bit.

    They do by construction: all start alike, add the same gradients and derive the same draws.

    Args:
        when: ends "... have come to different weights", for the message.

    Raises:
        UserError: names the first tensor that differs.
    """
    if _world.size == 1:
        return
    statistics = {n for n, b in model.named_buffers() if b.is_floating_point()}
    state = {n: t for n, t in model.state_dict().items() if n not in statistics}
    digests = torch.stack([_digest(tensor) for tensor in state.values()]).cpu()
    largest = torch.cat([digests, -digests])
    with _talking():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    highest, lowest = largest.chunk(2)
    different = [name for name, same in zip(state, (highest == -lowest).tolist()) if not same]
    if different:
        raise errors.UserError(
            f"the processes of this run have come to different weights{when}, {different[0]} "
            "first; they need the same kind of machine, and the same versions"
        )


def _digest(tensor: Tensor) -> Tensor:
    """int64 []: depends on every bit and its place."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.reshape(-1).view(kind).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def all_replicate(model: nn.Module) -> nn.Module:
    """``model`` with a backward pass that averages gradients over the processes.

    Args:
        model: in the same state in all processes, and on the device of each.
    """
    device = next(model.parameters()).device
    # Statistics are copied when an epoch ends. The later of these names is of PyTorch 2.14.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
    settings: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **settings)


def all_reduce(sums: Tensor) -> Tensor:
    """Replace ``sums`` by the sum over the processes."""
    if _world.size > 1:
        with _talking():
            dist.all_reduce(sums)
    return sums


def all_agree(asked: bool) -> bool:
    """Whether ``asked`` is true in any process."""
    return bool(all_reduce(torch.tensor(float(asked))))


class Vote:
    """A question to all processes in each step that waits for none: answered a step later.

    `all_ask` is a collective.
    """

    def __init__(self) -> None:
        self._asked = torch.zeros(())
        self._work: dist.Work | None = None

    def all_ask(self, asked: bool) -> bool:
        """Whether ``asked`` was true in any process in the call before; alone, in this one."""
        if _world.size == 1:
            return asked
        with _talking():
            if self._work is not None:
                self._work.wait()
            answer = bool(self._asked)
            self._asked = torch.tensor(float(asked))
            self._work = dist.all_reduce(self._asked, async_op=True)
        return answer


@torch.no_grad()
def all_average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their means over the processes, by one all-reduce.

    Afterwards they are views of its buffer, in the memory format of their parameters.

    Args:
        parameters: of the same shapes in the same order in all processes.
    """
    if _world.size == 1:
        return
    sizes = [parameter.numel() for parameter in parameters]
    message = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    views = [
        part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
        for part, parameter in zip(message.split(sizes), parameters)
    ]
    for view, parameter in zip(views, parameters):
        if parameter.grad is None:
            view.zero_()
        else:
            view.copy_(parameter.grad)
    all_reduce(message).div_(_world.size)
    for view, parameter in zip(views, parameters):
        parameter.grad = view


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise
        raise _lost(error) from None


def _lost(error: RuntimeError) -> LostError:
    # [file:line] reason. Advice ...
    reason = str(error).rpartition("] ")[2].partition(". ")[0].strip()
    return LostError(f"another process of this run is gone ({errors.one_line(reason)})")
