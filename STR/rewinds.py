"""What happens to the weights between pruning levels; the schedule always restarts.

Momentum buffers stay where the weights do (``none``); all other rewinds restart them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from startsparse.masks import keep_inside, masked_weights

State = dict[str, Tensor]  # a state_dict: name -> tensor


def flipped(model: nn.Module, initial: State) -> dict[str, float]:
    """Share of the active weights whose sign changed: per masked layer, and ``total``."""
    counts = {
        name: (int((weight.sign() * initial[f"{name}.weight"].sign() < 0).sum()), int(mask.sum()))
        for name, weight, mask in masked_weights(model)
    }
    if counts:
        changed, nnz = map(sum, zip(*counts.values()))
        counts["total"] = changed, nnz
    return {name: changed / max(1, nnz) for name, (changed, nnz) in counts.items()}


@torch.no_grad()
def rewind_weights(model: nn.Module, first: State) -> None:
    """Set everything but the masks back to ``first`` (IMP, Frankle & Carbin 2019)."""
    for name, tensor in model.state_dict().items():
        if not name.endswith(".weight_mask"):
            tensor.copy_(first[name])
    keep_inside(model)


@torch.no_grad()
def rewind_bn(model: nn.Module, first: State) -> None:
    """Set BatchNorm's parameters and statistics back to ``first``."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in module.state_dict().items():
                tensor.copy_(first[f"{prefix}.{name}"])


@torch.no_grad()
def rewind_amplitudes(model: nn.Module, first: State) -> None:
    """Set magnitudes of the masked weights back to ``first``; the learned signs stay."""
    for name, weight, mask in masked_weights(model):
        weight.copy_(weight.sign() * first[f"{name}.weight"].abs() * mask)


@torch.no_grad()
def rewind_signs(model: nn.Module, first: State) -> None:
    """Set signs of the masked weights back to ``first``; the learned magnitudes stay."""
    for name, weight, mask in masked_weights(model):
        weight.copy_(weight.abs() * first[f"{name}.weight"].sign() * mask)


REWINDS: dict[str, Callable[[nn.Module, State], None]] = {
    "none": lambda _model, _first: None,
    "weights": rewind_weights,
    "bn": rewind_bn,
    "amplitudes": rewind_amplitudes,
    "signs": rewind_signs,
}
