"""Soft threshold reparameterization (Kusupati et al. 2020): layers that learn their sparsity.

A layer computes with sign(w) relu(|w| - g(s)) (eq. 4). The threshold g(s) has one s per layer,
which weight decay and the loss move. With an ER mask the effective weight is also multiplied by
the mask; weights live inside it, and the threshold of a zero is zero, so this needs no operation.
"""

from collections.abc import Callable, Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from startsparse.masks import kept, sparse_layers
from startsparse.models.swap import hollow

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "exp": torch.exp}


class SoftThreshold(torch.autograd.Function):
    """sign(w) relu(|w| - t) for a weight of any shape and a threshold t >= 0 of shape [1]."""

    @staticmethod
    def forward(ctx, weight: Tensor, threshold: Tensor) -> Tensor:
        """Two passes over the weight: what the clamp leaves over is the soft threshold."""
        effective = weight.clamp(-threshold, threshold)
        torch.sub(weight, effective, out=effective)
        ctx.save_for_backward(effective)
        return effective

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """d/dw is 1 and d/dt is -sign(w) where |w| > t; both are 0 elsewhere."""
        (effective,) = ctx.saved_tensors
        sign = effective.sign()
        inward = gradient * sign
        to_threshold = -inward.sum().view(1)
        return inward.mul_(sign), to_threshold


class SoftThresholded(nn.Module):
    """What STRConv2d and STRLinear share: the threshold and the effective weight."""

    zeros_learn = False  # where the effective weight is zero nothing has a gradient

    def take(self, layer: nn.Module, s_init: float, function: str) -> None:
        """Take over the parameters of a plain ``layer`` and begin with the threshold g(s_init)."""
        self.weight, self.bias = layer.weight, layer.bias
        self.function = function
        self.threshold_logit = nn.Parameter(torch.full((1,), s_init))

    def threshold(self) -> Tensor:
        """g(s), shape [1]."""
        return FUNCTIONS[self.function](self.threshold_logit)

    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with, same shape as ``weight``."""
        return SoftThreshold.apply(self.weight, self.threshold())

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the layer computes with."""
        return self.effective_weight(), self.bias


class STRConv2d(SoftThresholded, nn.Conv2d):
    """Convolution with a soft-thresholded weight."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self._conv_forward(images, *self.effective())


class STRLinear(SoftThresholded, nn.Linear):
    """Linear layer with a soft-thresholded weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, n_in] -> [B, n_out]."""
        return F.linear(inputs, *self.effective())


def soften(model: nn.Module, s_init: float, function: str, dense: Container[str] = ()) -> None:
    """Replace every convolution and linear layer, but those named in ``dense``, by its STR form."""
    for name, layer in sparse_layers(model).items():
        if name in dense:
            continue
        soft = hollow(layer, STRConv2d, STRLinear)
        soft.take(layer, s_init, function)
        model.set_submodule(name, soft)


def thresholds(model: nn.Module) -> dict[str, float]:
    """Threshold g(s) of each STR layer, in forward order."""
    layers = sparse_layers(model).items()
    return {n: x.threshold().item() for n, x in layers if isinstance(x, SoftThresholded)}


def why_dense(model: nn.Module, s_init: float, decay: float) -> str:
    """A line on thresholds that have pruned less than 1 % of the weights; "" if there is more.

    Args:
        s_init: where s began.
        decay: weight decay of s.
    """
    layers = [x for x in sparse_layers(model).values() if isinstance(x, SoftThresholded)]
    masks = [getattr(layer, "weight_mask", torch.ones_like(layer.weight)) for layer in layers]
    allowed = sum(int(torch.count_nonzero(mask)) for mask in masks)
    used = sum(int(kept(layer).sum()) for layer in layers)
    if used <= 0.99 * allowed:
        return ""
    highest = max(layer.threshold_logit.item() for layer in layers)
    return (
        f"--sInit-value: soft thresholds use {used / allowed:.4f} of the weights they may use: s "
        f"began at {s_init:g} and is {highest:.4g} at most, where they are all but 0; the weight "
        f"decay of s ({decay:g}; --st-decay, else --weight-decay) takes it towards 0, the faster "
        "the larger lr, decay and number of steps; raise them, or begin nearer to 0"
    )


def layer_table(model: nn.Module) -> dict[str, dict[str, float]]:
    """Layer -> density and, of STR layers, threshold: what --er-sparsity-file reads back."""
    soft = thresholds(model)
    return {
        name: {"density": kept(layer).double().mean().item()}
        | ({"threshold": soft[name]} if name in soft else {})
        for name, layer in sparse_layers(model).items()
    }


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State of the ordinary network that computes the same: effective weights, no thresholds."""
    state = dict(model.state_dict())
    for name, layer in sparse_layers(model).items():
        if isinstance(layer, SoftThresholded):
            state[f"{name}.weight"] = layer.effective_weight()
            del state[f"{name}.threshold_logit"]
        state.pop(f"{name}.weight_mask", None)
    return state
