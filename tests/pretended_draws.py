"""The current device and the generators of pretended GPUs.

A generator of a GPU is one of the CPU whose seed begins with a mark and the number of the GPU: the
seed is all that an operation, which gets the generator from C++, can see of it.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_here = threading.local()
_lock = threading.Lock()
_MARK = 0x80 << 56  # seeds of the project are below it
_SEED_BITS = 56  # of which the CPU's generator uses 32


def current() -> int:
    """Index of this thread's current GPU."""
    return getattr(_here, "index", 0)


@contextlib.contextmanager
def current_is(device: Any) -> Iterator[None]:
    before = current()
    index = device.index if isinstance(device, torch.device) else device
    _here.index = before if index is None else index
    try:
        yield
    finally:
        _here.index = before


class _OnGPU(torch._C.Generator):
    """A generator of a GPU."""

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


defaults: list[torch._C.Generator] = []  # one for each GPU


@contextlib.contextmanager
def default_draws(func: Any, device: torch.device, has_generator: bool) -> Iterator[None]:
    """Within it the CPU's default generator is that of the GPU, if ``func`` draws from it."""
    draws = torch.Tag.nondeterministic_seeded in func.tags
    if not draws or has_generator or device.type != "cuda":
        yield
        return
    with _lock:
        cpu, gpu = torch.random.default_generator, defaults[device.index]
        before = cpu.get_state()
        cpu.set_state(gpu.get_state())
        try:
            yield
        finally:
            gpu.set_state(cpu.get_state())
            cpu.set_state(before)


def manual_seed_all(seed: int) -> None:
    for generator in defaults:
        generator.manual_seed(seed)
