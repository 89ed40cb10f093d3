"""Optimizers: a new one is a line in `OPTIMIZERS`."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import profiler
from torch.optim import optimizer
from torch.optim.optimizer import Optimizer


class Kind(NamedTuple):
    """An optimizer of PyTorch.

    Attributes:
        make: takes groups of parameters and ``lr``; see ``momentum``.
        keeps: what it keeps of each parameter, in a checkpoint too.
        momentum: whether it takes ``momentum`` and ``nesterov``, too; 0 keeps nothing.
    """

    make: Callable[..., Optimizer]
    keeps: tuple[str, ...]
    momentum: bool = False


_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _light(kind: Any) -> Any:
    """``kind`` without what PyTorch wraps around its methods.

    The wrappers import the compiler, for optimizers that are compiled, which takes a second at the
    start of a run. And they name each step for profilers, which takes an eighth of the step of a
    small network; here only if there is a profiler, or a hook.
    """
    plain = inspect.unwrap(kind.step)
    hooked = Optimizer.profile_hook_step(plain)

    @torch.no_grad()
    def step(self: Optimizer, closure: None = None) -> None:
        watched = (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        (hooked if watched else plain)(self, closure)

    step.hooked = True  # type: ignore[attr-defined] # else PyTorch wraps it again
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in _WRAPPED}
    return type(kind.__name__, (kind,), methods | {"step": step})


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


OPTIMIZERS: dict[str, Kind] = {
    "sgd": Kind(partial(_light(torch.optim.SGD), fused=True), ("momentum_buffer",), momentum=True),
    "adam": Kind(partial(_light(torch.optim.Adam), fused=True), _MOMENTS),
    "adamw": Kind(partial(_light(torch.optim.AdamW), fused=True), _MOMENTS),
}


def make_optimizer(
    name: str, parameters: Iterable[Any], *, lr: float, momentum: float, nesterov: bool
) -> Optimizer:
    """The optimizer ``name`` for ``parameters``: tensors, or groups with a weight decay each.

    ``momentum`` and ``nesterov`` are for those that take them.

    Raises:
        ValueError: no optimizer has this name; lists those there are.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}; choose from {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    more = {"momentum": momentum, "nesterov": nesterov} if kind.momentum else {}
    return kind.make(parameters, lr=lr, **more)


def kept(name: str, momentum: float) -> tuple[str, ...]:
    """What the optimizer ``name`` keeps of each parameter."""
    kind = OPTIMIZERS[name]
    return () if kind.momentum and not momentum else kind.keeps


def decay_groups(model: nn.Module, decay: Callable[[nn.Module, str], float]) -> list[dict]:
    """The parameters of ``model`` in groups of one weight decay each.

    Args:
        decay: (module, name of its parameter) -> weight decay.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            groups.setdefault(decay(module, name), []).append(parameter)
    return [{"params": group, "weight_decay": value} for value, group in groups.items()]
