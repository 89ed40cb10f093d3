"""Pruning: one score per weight, and the best k weights stay.

Scores are read on the current masks, and a weight that was pruned never comes back.
"""

import torch
from torch import Tensor, nn

from startsparse.masks import masked_weights


def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """The absolute value of each weight."""
    return {name: weight.detach().abs() for name, weight, _ in masked_weights(model)}


SCORES = {"mag": magnitude}


@torch.no_grad()
def keep_top(model: nn.Module, scores: dict[str, Tensor], count: int) -> None:
    """Shrink the masks, in place, to the ``count`` highest scores of the whole network.

    Exactly ``count`` weights stay; of equal scores those of earlier layers and positions stay.

    Raises:
        ValueError: fewer than ``count`` weights are left.
    """
    masks = {name: mask for name, _, mask in masked_weights(model)}
    flat = torch.cat(
        [scores[name].masked_fill(~mask, -torch.inf).flatten() for name, mask in masks.items()]
    )
    left = sum(int(mask.sum()) for mask in masks.values())
    if count > left:
        raise ValueError(f"{count} weights cannot be kept: {left} are left")
    keep = torch.zeros_like(flat, dtype=torch.bool)
    if count > 0:
        last = flat.kthvalue(len(flat) - count + 1).values
        keep = flat > last
        ties = (flat == last).nonzero().flatten()
        keep[ties[: count - int(keep.sum())]] = True
    for mask, part in zip(masks.values(), keep.split([m.numel() for m in masks.values()])):
        mask.copy_(part.view(mask.shape))
