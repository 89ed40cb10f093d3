"""Optimizers: a new one is a line in `OPTIMIZERS`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn


class Kind(NamedTuple):
    """An optimizer of PyTorch.

    Attributes:
        make: takes groups of parameters and ``lr``; see ``momentum``.
        keeps: what it keeps of each parameter, in a checkpoint too.
        momentum: whether it takes ``momentum`` and ``nesterov``, too; 0 keeps nothing.
    """

    make: Callable[..., torch.optim.Optimizer]
    keeps: tuple[str, ...]
    momentum: bool = False


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


OPTIMIZERS: dict[str, Kind] = {
    "sgd": Kind(partial(torch.optim.SGD, fused=True), ("momentum_buffer",), momentum=True),
    "adam": Kind(partial(torch.optim.Adam, fused=True), _MOMENTS),
    "adamw": Kind(partial(torch.optim.AdamW, fused=True), _MOMENTS),
}


def make_optimizer(
    name: str, parameters: Iterable[Any], *, lr: float, momentum: float, nesterov: bool
) -> torch.optim.Optimizer:
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
