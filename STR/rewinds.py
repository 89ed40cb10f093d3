"""What happens to the weights between pruning levels; the schedule always starts again.

Momentum goes on where the weights do (``none``), and starts again with them elsewhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from startsparse.masks import keep_inside, masked_weights

State = dict[str, Tensor]  # a state_dict: name -> tensor


def flipped(model: nn.Module, initial: State) -> dict[str, float]:
    """Share of the kept weights of each masked layer, and in ``total``, that changed their sign."""
    counts = {
        name: (int((weight.sign() * initial[f"{name}.weight"].sign() < 0).sum()), int(mask.sum()))
        for name, weight, mask in masked_weights(model)
    }
    if counts:
        changed, kept = map(sum, zip(*counts.values()))
        counts["total"] = changed, kept
    return {name: changed / max(1, kept) for name, (changed, kept) in counts.items()}


@torch.no_grad()
def rewind_weights(model: nn.Module, first: State) -> None:
    """Everything but the masks back to ``first`` (IMP, Frankle & Carbin 2019)."""
    for name, tensor in model.state_dict().items():
        if not name.endswith(".weight_mask"):
            tensor.copy_(first[name])
    keep_inside(model)


@torch.no_grad()
def rewind_bn(model: nn.Module, first: State) -> None:
    """BatchNorm's parameters and statistics back to ``first``."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in module.state_dict().items():
                tensor.copy_(first[f"{prefix}.{name}"])


@torch.no_grad()
def rewind_amplitudes(model: nn.Module, first: State) -> None:
    """Magnitudes of the masked weights back to ``first``; the learned signs stay."""
    for name, weight, mask in masked_weights(model):
        weight.copy_(weight.sign() * first[f"{name}.weight"].abs() * mask)


@torch.no_grad()
def rewind_signs(model: nn.Module, first: State) -> None:
    """Signs of the masked weights back to ``first``; the learned magnitudes stay."""
    for name, weight, mask in masked_weights(model):
        weight.copy_(weight.abs() * first[f"{name}.weight"].sign() * mask)


REWINDS: dict[str, Callable[[nn.Module, State], None]] = {
    "none": lambda _model, _first: None,
    "weights": rewind_weights,
    "bn": rewind_bn,
    "amplitudes": rewind_amplitudes,
    "signs": rewind_signs,
}
