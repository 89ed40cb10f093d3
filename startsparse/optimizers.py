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
        momentum: whether it takes ``momentum`` and ``nesterov``, too.
        states: tensors that it keeps for each parameter, as large as that.
    """

    make: Callable[..., torch.optim.Optimizer]
    momentum: bool = False
    states: int = 2


OPTIMIZERS: dict[str, Kind] = {
    "sgd": Kind(partial(torch.optim.SGD, fused=True), momentum=True, states=1),
    "adam": Kind(partial(torch.optim.Adam, fused=True)),
    "adamw": Kind(partial(torch.optim.AdamW, fused=True)),
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
    make, takes_momentum, _ = OPTIMIZERS[name]
    more = {"momentum": momentum, "nesterov": nesterov} if takes_momentum else {}
    return make(parameters, lr=lr, **more)


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
