"""A pretended GPU: tensors that say they are on cuda:N, and compute on the CPU.

`pretended_gpus` makes this process believe in CUDA devices. Every operation of every thread then
passes `_run`, which raises where tensors of two devices meet, notes each time the CPU would wait
for the GPU, and counts what would be launched (`Log`). What it cannot see: kernels, cuDNN, memory,
streams, NCCL.

A tensor on it is a `Pretend`: a wrapper subclass around the CPU tensor that does the work. C++
takes it to be on the backend PrivateUse1 (`pretended_cuda`), which lasts as long as the process. So
this runs in a process of its own (`gpu_scenarios`).
"""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import pretended_cuda as cuda
import torch
from pretended_log import Log
from torch.utils._python_dispatch import TorchDispatchMode

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_PRODUCTS = {"aten::convolution", "aten::mm", "aten::addmm", "aten::bmm"}
_COPYING = {"aten::copy_", "aten::_to_copy"}
_WAITING = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::repeat_interleave": "repeat_interleave",
    "aten::_coalesce": "coalesce",
}
_NO_KERNEL = {
    *("aten::_local_scalar_dense", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::set_"),
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::resize_"),
    *("aten::new_empty_strided", "aten::_unsafe_view", "aten::_reshape_alias", "prim::device"),
}

_log = Log()  # of the present `pretended_gpus`


class MixedDevicesError(RuntimeError):
    """Tensors met that are on different devices."""


class Pretend(torch.Tensor):
    """``inner``, a tensor on the CPU, that says it is on a GPU."""

    inner: torch.Tensor
    on: torch.device

    @staticmethod
    def __new__(cls, inner, device):
        strided = (
            inner if inner.layout is torch.strided else torch.empty(inner.shape, device="meta")
        )
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=strided.stride(),
            storage_offset=strided.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(cuda.BACKEND, device.index),
        )
        made.inner, made.on = inner, device
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @property
    def device(self):
        return self.on

    @property
    def is_cuda(self):
        return True

    def get_device(self):
        return self.on.index

    def to(self, *args, **kwargs):
        """Without the copy that C++ makes, for which cuda:0 is another device."""
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and _real(device) == self.on:
            device = None
        wanted = {"device": device, "dtype": dtype, "memory_format": memory_format}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if not wanted and not copy:
            return self
        return super().to(**wanted, non_blocking=non_blocking, copy=copy)

    def cuda(self, device=None, **how):
        return self.to(
            torch.device("cuda", device if device is not None else cuda.current()), **how
        )

    def __setitem__(self, index, value):
        """As CUDA does it: a number that is put where a mask is true stays on the CPU."""
        if isinstance(value, int | float) and getattr(index, "dtype", None) is torch.bool:
            value = torch.tensor(value, dtype=self.dtype)
        super().__setitem__(index, value)

    def tolist(self):
        _log.wait("tolist")
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {self.on} device type tensor to numpy, at {_log.place()}")

    def __array__(self, *_, **__):
        self.numpy()

    def __deepcopy__(self, memo):
        inner = self.inner.detach().clone(memory_format=torch.preserve_format)
        made = Pretend(inner, self.on).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made._is_param = True
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol):
        """A file holds the tensor on the CPU; `cuda` moves it back where it is loaded."""
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self, **_):
        return f"Pretend({self.inner!r}, {self.on})"


class _Mode(TorchDispatchMode):
    """Sees operations without a `Pretend` among their arguments, as torch.zeros(device=cuda)."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; to skip it takes its import, and time in each call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _real(device: torch.device | None) -> torch.device | None:
    """The device that the project knows, with its index."""
    if device is None or device.type not in ("cuda", cuda.BACKEND):
        return device
    return torch.device("cuda", cuda.current() if device.index is None else device.index)


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Do an operation of PyTorch, on whatever device."""
    if torch.is_inference_mode_enabled() and _is_composite(func):  # autograd has not split it
        with _Mode():
            return func.decompose(*args, **kwargs)
    name, leaves = func._schema.name, list(_leaves((*args, *kwargs.values())))
    gpu = [v for v in leaves if isinstance(v, Pretend)]
    asked = _real(kwargs.get("device"))
    target = asked or (gpu[0].on if gpu else torch.device("cpu"))
    if name == "aten::copy_":
        target = args[0].device
    draws = [v for v in leaves if isinstance(v, torch._C.Generator)]
    for generator in draws:
        if (device := cuda.device_of(generator)) != target:
            raise RuntimeError(
                f"Expected a '{target}' device type for generator but found '{device}', in {func} "
                f"at {_log.place()}"
            )
    if not gpu and target.type != "cuda":
        return func(*args, **kwargs)

    if name in _COPYING:
        _look_at_copy(name, args, kwargs, target)
    else:
        cpu = [v for v in leaves if isinstance(v, torch.Tensor) and not isinstance(v, Pretend)]
        _look_at_devices(func, args, gpu, cpu)
    if name in _WAITING and not (name == "aten::repeat_interleave" and "output_size" in kwargs):
        _log.wait(_WAITING[name])
    if name in _INDEXING:
        _look_at_indices(name, args)
    if name in _PRODUCTS:
        _log.products.add((str(target), str(gpu[0].dtype).removeprefix("torch.")))
    if name not in _NO_KERNEL and not _is_view(func):
        _log.launch(name, _launches(name, args))

    with cuda.default_draws(func, target, bool(draws)):
        named = {key: _unwrapped(value) for key, value in kwargs.items()}
        named |= {"device": torch.device("cpu")} if asked else {}
        named |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        result = func(*_unwrapped(args), **named)
    return _wrapped(func, args, kwargs, result, target, gpu)


def _look_at_copy(name: str, args: tuple, kwargs: dict, target: torch.device) -> None:
    """Copies wait, except from pinned memory, or to it, if they are asked not to."""
    source = args[1] if name == "aten::copy_" else args[0]
    if source.device.type == target.type:
        return
    free = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
    if target.type == "cpu":
        if not free or (name == "aten::copy_" and not args[0].is_pinned()):
            _log.wait("copy to CPU")
    elif not free or not source.is_pinned():
        _log.wait("copy to GPU")


def _look_at_devices(func: Any, args: tuple, gpu: list, cpu: list) -> None:
    """Raise where CUDA would. It takes single numbers and, when indexing, indices from the CPU."""
    devices = sorted({str(tensor.on) for tensor in gpu})
    if len(devices) > 1:
        raise MixedDevicesError(f"{func}: tensors on {devices} at {_log.place()}")
    indexing = func._schema.name in _INDEXING
    for tensor in cpu if gpu else []:
        if tensor.dim() == 0 and not (indexing and tensor is args[0]):
            continue
        if indexing and isinstance(args[0], Pretend) and any(tensor is i for i in args[1]):
            _log.wait("CPU index")
            continue
        raise MixedDevicesError(
            f"{func}: {tuple(tensor.shape)} {tensor.dtype} on the CPU and {tuple(gpu[0].shape)} on "
            f"{gpu[0].on} at {_log.place()}"
        )


def _look_at_indices(name: str, args: tuple) -> None:
    """Boolean indices are counted first, unless a number of the CPU is put there."""
    indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
    boolean = [index.dtype in (torch.bool, torch.uint8) for index in indices]
    fills = name != "aten::index" and all(boolean) and args[2].device.type == "cpu"
    if any(boolean) and not fills:
        _log.wait("boolean index")


@functools.cache
def _is_view(func: Any) -> bool:
    return any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)


def _launches(name: str, args: tuple) -> int:
    """One kernel; for lists of tensors that CUDA does not take at once, one for each."""
    if not name.startswith("aten::_foreach"):
        return 1
    lists = [a for a in args if isinstance(a, list | tuple) and a and torch.is_tensor(a[0])]
    first = lists[0]
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors}
    fast = len(dtypes) == 1 or name == "aten::_foreach_copy_"
    for others in lists[1:]:
        fast &= all(_strides(a) == _strides(b) for a, b in zip(first, others))
    return 1 if fast else len(first)


def _strides(tensor: torch.Tensor) -> list[int]:
    """Those that say something: of dimensions of more than one entry."""
    return [step for size, step in zip(tensor.shape, tensor.stride()) if size > 1]


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Pretend):
        return value.inner
    if isinstance(value, list | tuple):
        return type(value)(map(_unwrapped, value))
    return value


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _wrapped(func: Any, args: tuple, kwargs: dict, result: Any, target: Any, gpu: list) -> Any:
    """What an operation returns; what it wrote to is the object that was given."""
    written = {}
    for position, schema in enumerate(func._schema.arguments):
        if schema.alias_info is not None and schema.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(schema.name)
            written.update(dict.fromkeys(schema.alias_info.after_set, value))

    # In inference mode, views of ordinary tensors are ordinary.
    ordinary = torch.is_inference_mode_enabled() and _is_view(func) and gpu
    ordinary = ordinary and not gpu[0].is_inference()

    def wrap(value):
        if not isinstance(value, torch.Tensor) or target.type != "cuda":
            return value
        if ordinary:
            with torch.inference_mode(False):
                return Pretend(value, target)
        return Pretend(value, target)

    returns = func._schema.returns
    if not returns:
        return None
    results = []
    for schema, value in zip(returns, result if len(returns) > 1 else (result,)):
        alias = schema.alias_info
        if alias is not None and alias.is_write:
            results.append(next(written[name] for name in alias.after_set if name in written))
        else:
            results.append([wrap(v) for v in value] if isinstance(value, list) else wrap(value))
    return tuple(results) if len(returns) > 1 else results[0]


class _Threads:
    """Threads that begin within it see the pretended GPUs, too."""

    @staticmethod
    def run(thread: threading.Thread) -> None:
        torch.autograd.set_multithreading_enabled(False)
        cuda.autocast_as_in_a_new_thread()
        with _Mode():
            _thread_run(thread)


_thread_run = threading.Thread.run


@contextlib.contextmanager
def pretended_gpus(count: int = 1, bf16: bool = True) -> Iterator[Log]:
    """Within it there are so many GPUs, which have bf16 or not; yields what happens on them."""
    global _log
    _log = Log()
    threads = torch.autograd.is_multithreading_enabled()
    try:
        with contextlib.ExitStack() as stack:
            torch.autograd.set_multithreading_enabled(False)
            stack.enter_context(
                cuda.pretended(count, bf16, Pretend, lambda: _log.wait("synchronize"))
            )
            stack.enter_context(mock.patch.object(threading.Thread, "run", _Threads.run))
            stack.enter_context(_log.watching())
            stack.enter_context(_Mode())
            yield _log
    finally:
        torch.autograd.set_multithreading_enabled(threads)
