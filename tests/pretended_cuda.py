"""What surrounds the tensors of a pretended GPU: torch.cuda, generators, autocast, DataParallel.

It stands on private parts of PyTorch. Where they are missing, `require` names them.
"""

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils import _foreach_utils, backend_registration
from torch.utils._pytree import tree_map

BACKEND = "pretended"  # C++'s name of the device

_aten = torch.ops.aten
_here = threading.local()
_lock = threading.Lock()
_MARK = 0x80 << 56  # of the seed of a generator of a GPU, whose index follows
_SEED_BITS = 56
_REQUIRED = (
    "torch.Tensor._make_wrapper_subclass",
    "torch._C._set_only_lift_cpu_tensors",
    "torch._C._ExcludeDispatchKeyGuard",
    "torch._C._disabled_torch_function_impl",
    "torch._C._nn._parse_to",
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend",
    "torch.utils._foreach_utils._foreach_supported_types",
    "torch.nn.parallel.comm.broadcast_coalesced",
)


def require() -> None:
    """Raise `RuntimeError`, naming it, if PyTorch lacks a part."""
    for path in _REQUIRED:
        found: Any = torch
        for name in path.split(".")[1:]:
            found = getattr(found, name, None)
        if found is None:
            raise RuntimeError(
                f"the pretended GPU needs {path}, which PyTorch {torch.__version__} lacks"
            )


def current() -> int:
    """Index of this thread's current GPU."""
    return getattr(_here, "index", 0)


@contextlib.contextmanager
def _current_is(device: Any) -> Iterator[None]:
    before = current()
    index = device.index if isinstance(device, torch.device) else device
    _here.index = before if index is None else index
    try:
        yield
    finally:
        _here.index = before


# --- Generators -----------------------------------------------------------------------------------


class _OnGPU(torch._C.Generator):
    """A generator of the CPU whose seed says that it is one of a GPU: operations see only that."""

    def __init__(self, device: torch.device):
        self.on = torch.device("cuda", current() if device.index is None else device.index)
        self.manual_seed(super().initial_seed())

    def manual_seed(self, seed: int) -> "_OnGPU":
        seed %= 1 << _SEED_BITS
        super().manual_seed(_MARK | self.on.index << _SEED_BITS | seed)
        return self

    @property
    def device(self) -> torch.device:
        return self.on


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch._C.Generator)


class Generator(metaclass=_Kind):
    """torch.Generator, for GPUs too."""

    def __new__(cls, device: Any = "cpu"):
        device = torch.device(device)
        if device.type == "cuda":
            made = torch._C.Generator.__new__(_OnGPU)
            made.__init__(device)
            return made
        return torch._C.Generator(device)


def device_of(generator: torch._C.Generator) -> torch.device:
    """Where it draws."""
    seed = generator.initial_seed()
    if seed < _MARK:
        return torch.device("cpu")
    return torch.device("cuda", (seed - _MARK) >> _SEED_BITS)


_default: list[torch._C.Generator] = []  # one for each GPU


@contextlib.contextmanager
def default_draws(func: Any, device: torch.device, has_generator: bool) -> Iterator[None]:
    """Within it the CPU's default generator is that of the GPU, if ``func`` draws from it."""
    draws = torch.Tag.nondeterministic_seeded in func.tags
    if not draws or has_generator or device.type != "cuda":
        yield
        return
    with _lock:
        cpu, gpu = torch.random.default_generator, _default[device.index]
        before = cpu.get_state()
        cpu.set_state(gpu.get_state())
        try:
            yield
        finally:
            gpu.set_state(cpu.get_state())
            cpu.set_state(before)


def _manual_seed_all(seed: int) -> None:
    for generator in _default:
        generator.manual_seed(seed)


# --- The backend that C++ sees, and its autocast --------------------------------------------------


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def device_count(self):
        return max(1, len(_default))

    def current_device(self):
        return current()


_LOW = {
    **{"conv2d": _aten.conv2d, "linear": _aten.linear, "matmul": _aten.matmul, "mm": _aten.mm},
    **{"addmm": _aten.addmm, "bmm": _aten.bmm, "baddbmm": _aten.baddbmm},
}
_FULL = {
    **{"log_softmax.int": _aten.log_softmax.int, "softmax.int": _aten.softmax.int},
    **{"nll_loss": _aten.nll_loss, "cross_entropy_loss": _aten.cross_entropy_loss},
    **{"layer_norm": _aten.layer_norm, "rsqrt": _aten.rsqrt, "exp": _aten.exp, "log": _aten.log},
}
_libraries: list[torch.library.Library] = []  # registered as long as they live


def _register(pretend: type[torch.Tensor]) -> None:
    """Once in a process. (It cannot be CUDA itself: autograd fails at its streams.)"""
    if _libraries:
        return
    backend_registration._setup_privateuseone_for_python_backend(BACKEND, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def register(name: str, operation: Any, low: bool) -> None:
        def kernel(*args, **kwargs):
            dtype = torch.get_autocast_dtype(BACKEND) if low else torch.float32

            def cast(value):
                fits = isinstance(value, pretend) and value.is_floating_point()
                return value.to(dtype) if fits and value.dtype != torch.float64 else value

            with torch._C._ExcludeDispatchKeyGuard(key):
                return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

        library.impl(name, kernel, "AutocastPrivateUse1")

    for low, operations in ((True, _LOW), (False, _FULL)):
        for name, operation in operations.items():
            register(name, operation, low)
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.extend([library, others])


class _Autocast(torch.autocast):
    """torch.autocast, whose "cuda" is the backend."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__(BACKEND if device_type == "cuda" else device_type, *args, **kwargs)


def autocast_as_in_a_new_thread() -> None:
    """Give a new thread the dtype of CUDA's autocast, which differs from that of PrivateUse1."""
    torch.set_autocast_dtype(BACKEND, torch.get_autocast_dtype("cuda"))


# --- torch.cuda and DataParallel ------------------------------------------------------------------


class _Stream:
    """Work is done at once, so there is nothing to wait for."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getattr__(self, _name):
        return lambda *_, **__: None


def _moved_to_cuda(state: Any, device: torch.device, pretend: Callable) -> Any:
    """What torch.load gives, in place, so that what its dicts carry besides stays."""
    if isinstance(state, torch.Tensor):
        return pretend(state, device)
    if isinstance(state, dict | list):
        for key in state if isinstance(state, dict) else range(len(state)):
            state[key] = _moved_to_cuda(state[key], device, pretend)
    return (
        tuple(_moved_to_cuda(v, device, pretend) for v in state) if type(state) is tuple else state
    )


def _replicas(pretend: Callable) -> dict[str, Callable]:
    """What torch.nn.parallel.comm does between GPUs."""

    def gpu(index: int | None) -> torch.device:
        return torch.device("cuda", index or 0)

    def scatter(tensor, devices, chunk_sizes=None, dim=0, streams=None):
        inner = getattr(tensor, "inner", tensor)
        parts = inner.split(chunk_sizes, dim) if chunk_sizes else inner.chunk(len(devices), dim)
        return tuple(pretend(p.clone(), gpu(d)) for p, d in zip(parts, devices))

    def gather(tensors, dim=0, destination=None):
        return pretend(torch.cat([t.inner for t in tensors], dim), gpu(destination))

    def broadcast_coalesced(tensors, devices, *_):
        def copies(index):
            if index == tensors[0].on.index:
                return list(tensors)
            # They arrive in one flat buffer, so they are contiguous there.
            flat = [t.inner.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
            return [pretend(t, gpu(index)) for t in flat]

        return [copies(index) for index in devices]

    def reduce_add_coalesced(inputs, destination=None, buffer_size=0):
        sums = [sum(t.inner for t in tensors) for tensors in zip(*inputs)]
        return tuple(pretend(total, gpu(destination)) for total in sums)

    return {
        "scatter": scatter,
        "gather": gather,
        "broadcast_coalesced": broadcast_coalesced,
        "reduce_add_coalesced": reduce_add_coalesced,
    }


def _patches(count: int, bf16: bool, pretend: Callable, wait: Callable) -> Iterator[Any]:
    def patch(owner, **named):
        return mock.patch.multiple(owner, create=True, **named)

    load, autocast_on, autocast_dtype = (
        torch.load,
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
    )

    def load_to(file, map_location=None, **named):
        target = torch.device(map_location or "cpu")
        state = load(file, map_location="cpu", **named)
        if target.type != "cuda":
            return state
        return _moved_to_cuda(state, torch.device("cuda", target.index or 0), pretend)

    def backend_of(kind="cuda"):
        return BACKEND if kind == "cuda" else kind

    yield patch(
        torch.cuda,
        is_available=lambda: count > 0,
        device_count=lambda: count,
        is_bf16_supported=lambda *_, **__: bf16,
        _lazy_init=lambda: None,
        get_device_name=lambda *_: "pretended",
        get_device_properties=lambda *_: SimpleNamespace(
            name="pretended", total_memory=1 << 34, multi_processor_count=1, major=9, minor=0
        ),
        get_device_capability=lambda *_: (9, 0),
        current_device=current,
        device=_current_is,
        is_current_stream_capturing=lambda: False,
        manual_seed_all=_manual_seed_all,
        manual_seed=lambda seed: _default[current()].manual_seed(seed),
        default_generators=_default,
        synchronize=lambda *_: wait(),
        current_stream=_Stream,
        Stream=_Stream,
        Event=_Stream,
        stream=lambda stream: stream,
        empty_cache=lambda: None,
        mem_get_info=lambda *_: (1 << 34, 1 << 34),
        memory_allocated=lambda *_: 0,
        max_memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=lambda *_: None,
    )
    yield patch(
        torch,
        autocast=_Autocast,
        Generator=Generator,
        load=load_to,
        is_autocast_enabled=lambda kind="cuda": autocast_on(backend_of(kind)),
        get_autocast_dtype=lambda kind: autocast_dtype(backend_of(kind)),
        compile=lambda f=None, **_: f if f is not None else lambda g: g,  # without a GPU, eager
    )
    yield patch(torch.amp, autocast=_Autocast)
    yield patch(
        torch.accelerator,
        current_stream=_Stream,
        device_index=_current_is,
        is_available=lambda: True,
        synchronize=lambda *_: wait(),
    )
    yield patch(
        torch.Tensor,
        cuda=lambda t, device=None: t.to(torch.device("cuda", device or current())),
        pin_memory=_pinned,
        is_pinned=lambda t, *_: getattr(t, "_pinned", False),
        record_stream=lambda *_: None,
    )
    comm = _replicas(pretend)
    yield patch(importlib.import_module("torch.nn.parallel.comm"), **comm)
    yield patch(torch._C, _broadcast_coalesced=comm["broadcast_coalesced"])
    yield patch(
        importlib.import_module("torch.nn.parallel._functions"), _get_stream=lambda *_: None
    )


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    copy = tensor.clone()
    copy._pinned = True
    return copy


@contextlib.contextmanager
def pretended(count: int, bf16: bool, pretend: type, wait: Callable[[], None]) -> Iterator[None]:
    """Within it there are so many GPUs, with tensors ``pretend``; ``wait`` notes a wait for one."""
    require()
    _register(pretend)
    from torch.optim import optimizer

    _default[:] = [Generator(torch.device("cuda", index)) for index in range(count)]
    kinds = [_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types]
    for accepted in kinds:
        accepted.append(pretend)
    cudnn = torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic
    torch.backends.cudnn.enabled = False  # BatchNorm then is one operation that CPUs have, too
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=cuda) then passes the mode
    try:
        with contextlib.ExitStack() as stack:
            for patch in _patches(count, bf16, pretend, wait):
                stack.enter_context(patch)
            yield
    finally:
        for accepted in kinds:
            accepted.remove(pretend)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic = cudnn
        _default.clear()
