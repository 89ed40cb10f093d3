"""Soft threshold reparameterization (Kusupati et al. 2020): layers that learn their sparsity.

A layer computes with sign(w) relu(|w| - g(s)) (eq. 4). Each layer has one s, which weight decay
and the loss move. With an ER mask the effective weight is also multiplied by the mask. That needs
no operation: weights outside the mask are zero, and the soft threshold keeps zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from startsparse import selection
from startsparse.effective import EffectiveLayer, effective_layers
from startsparse.masks import active, sparse_layers
from startsparse.selection_by_counts import Layout

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "exp": torch.exp}


class SoftThreshold(torch.autograd.Function):
    """sign(w) relu(|w| - t) for a weight of any shape and a threshold t >= 0 of shape [1]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        """Two passes over the weight: subtracting the clamped weight is the soft threshold."""
        effective = weight.clamp(-threshold, threshold)
        torch.sub(weight, effective, out=effective)
        ctx.save_for_backward(effective)
        return effective

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """d/dw is 1 and d/dt is -sign(w) where |w| > t; both are 0 elsewhere."""
        (effective,) = ctx.saved_tensors
        sign = effective.sign()
        inward = gradient * sign
        to_threshold = -inward.sum().view(1)
        return inward.mul_(sign), to_threshold


class SoftThresholdOfAll(torch.autograd.Function):
    """The same for many weights in few operations; ``thresholds`` has one of each, [weights]."""

    @staticmethod
    def forward(ctx: Any, thresholds: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """The weights are copied into one vector once."""
        layout = ctx.layout = Layout.of(weights)
        bounds = thresholds.index_select(0, layout.owner(thresholds.device))[:, None]
        joined = layout.join(weights, 0)
        effective = joined.clamp(-bounds, bounds)
        torch.sub(joined, effective, out=effective)
        ctx.save_for_backward(effective)
        return tuple(layout.split(effective))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """As that of `SoftThreshold`; each sum is taken by itself, in the same order as there."""
        (effective,) = ctx.saved_tensors
        sign = effective.sign()
        inward = ctx.layout.join(gradients, 0) * sign
        to_thresholds = -torch.stack([part.sum() for part in ctx.layout.split(inward)])
        return to_thresholds, *ctx.layout.split(inward.mul_(sign))


class SoftThresholded(EffectiveLayer):
    """A layer with a soft-thresholded weight; ``threshold_logit``, shape [1], is its s."""

    zeros_learn = False  # where the effective weight is zero, w and s have no gradient
    entrywise = True

    def set_up(self, s_init: float, function: str) -> None:
        """Begin with the threshold g(s_init); ``function``, one of `FUNCTIONS`, is g."""
        self.function = function
        self.threshold_logit = nn.Parameter(self.weight.new_full((1,), s_init))

    def threshold(self) -> Tensor:
        """g(s), shape [1]."""
        return FUNCTIONS[self.function](self.threshold_logit)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """sign(w) relu(|w| - g(s)), and the bias as it is."""
        return SoftThreshold.apply(self.weight, self.threshold()), self.bias

    @classmethod
    def effective_of_all(
        cls, layers: Sequence["SoftThresholded"]
    ) -> Sequence[tuple[Tensor, Tensor | None]] | None:
        """All in one vector, on a GPU; torch.compile joins the operations of a layer itself."""
        functions = {layer.function for layer in layers}
        if torch.compiler.is_compiling() or len(functions) > 1:
            return None
        if selection.one_by_one(layers[0].weight.device):
            return None
        logits = torch.cat([layer.threshold_logit for layer in layers])
        thresholds = FUNCTIONS[functions.pop()](logits)
        effective = SoftThresholdOfAll.apply(thresholds, *[layer.weight for layer in layers])
        return [(weight, layer.bias) for weight, layer in zip(effective, layers)]


def thresholds(model: nn.Module) -> dict[str, float]:
    """Threshold g(s) of each layer that has one, in forward order."""
    layers = effective_layers(model, SoftThresholded).items()
    return {name: layer.threshold().item() for name, layer in layers}


def why_dense(model: nn.Module, s_init: float, decay: float) -> str:
    """A warning if thresholds have pruned less than 1 % of the weights, else "".

    Args:
        s_init: initial s.
        decay: weight decay of s.
    """
    layers = effective_layers(model, SoftThresholded).values()
    masks = [getattr(layer, "weight_mask", torch.ones_like(layer.weight)) for layer in layers]
    allowed = sum(int(torch.count_nonzero(mask)) for mask in masks)
    used = sum(int(active(layer).sum()) for layer in layers)
    if used <= 0.99 * allowed:
        return ""
    highest = max(layer.threshold_logit.item() for layer in layers)
    return (
        f"--sInit-value: soft thresholds use {used / allowed:.4f} of the weights that they could: "
        f"s began at {s_init:g} and is {highest:.4g} at most, where thresholds are almost 0; "
        f"weight decay of s ({decay:g}; --st-decay, else --weight-decay) moves s towards 0; raise "
        "the decay, the lr or the number of steps, or begin nearer to 0"
    )


def layer_table(model: nn.Module) -> dict[str, dict[str, float]]:
    """Layer -> density, and threshold if it has one; --er-sparsity-file reads this back."""
    soft = thresholds(model)
    return {
        name: {"density": active(layer).double().mean().item()}
        | ({"threshold": soft[name]} if name in soft else {})
        for name, layer in sparse_layers(model).items()
    }
