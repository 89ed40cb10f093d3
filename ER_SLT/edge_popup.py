"""Edge-popup (Ramanujan et al. 2020, arXiv:1911.13299, section 3) inside a random mask.

Weights and biases never change. Each has a score, and the layer computes with those whose scores
are the largest in magnitude, weights and biases ranked together; everything else is exactly 0.
Only biases and entries inside the random mask are ranked. Scores learn by the straight-through
estimator, which takes m as the identity in the effective weight e = w * m(|s|):

    dL/ds = dL/de * w * sign(s),    with the sign of a zero taken from its sign bit, never 0,

for entries that are kept and for those that are not. sign(s) is the derivative of |s|: as in the
code published with the paper, the magnitude is part of the differentiated function.

Scores live inside the mask, as weights do. Both are zero outside, so the gradient is too, and
neither weight decay nor momentum changes that.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.effective import EffectiveLayer, agree, effective_layers, replace_layers
from startsparse.seeding import generator
from startsparse.selection import top_masks

SCORE_INITS = ("constant", "kaiming")

_CONSTANT = 0.5
_TIE_BREAK = 1e-4  # spread of the constant scores, small against the change of a few steps


class StraightThrough(torch.autograd.Function):
    """w * m, with the straight-through gradient to the scores s that m ranks."""

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """All have one shape; ``mask`` is 0 or 1 in their dtype."""
        ctx.save_for_backward(frozen, score)
        return frozen * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        """dL/ds = dL/de * w * sign(s)."""
        frozen, score = ctx.saved_tensors
        sign = torch.copysign(torch.ones((), dtype=score.dtype, device=score.device), score)
        return None, (gradient * frozen).mul_(sign), None


class Popup(EffectiveLayer):
    """A layer of frozen weights that uses those with the best scores; each layer has its number.

    ``weight_score`` and ``bias_score`` are parameters like ``weight`` and ``bias``. ``keep``, the
    number of entries kept, is an int64 buffer, so that checkpoints hold it and changing it needs no
    new compilation; `set_density` writes it.
    """

    zeros_learn = True  # the scores of weights that are not kept have a gradient, too
    entrywise = True  # except for ranking, which needs the order of entries only

    weight_score: nn.Parameter
    bias_score: nn.Parameter | None
    keep: Tensor

    def set_up(self) -> None:
        """Freeze what the layer has; all scores are 0."""
        self.weight.requires_grad_(False)
        self.weight_score = nn.Parameter(torch.zeros_like(self.weight))
        self.bias_score = None
        if self.bias is not None:
            self.bias.requires_grad_(False)
            self.bias_score = nn.Parameter(torch.zeros_like(self.bias))
        if (inside := self._inside()) is not None:
            # Not -0, which a product leaves: the sparse form restores what it does not store as 0.
            self.weight.data.masked_fill_(~inside, 0)
        self.register_buffer("keep", torch.tensor(self.allowed(), device=self.weight.device))

    def size(self) -> int:
        """Number of weights and biases, inside the mask or not."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def allowed(self) -> int:
        """Number of biases and of weights inside the mask. Waits for the device."""
        inside = self._inside()
        outside = 0 if inside is None else int((~inside).sum())
        return self.size() - outside

    def keep_inside(self) -> None:
        """Zero the scores outside the mask."""
        if (inside := self._inside()) is not None:
            self.weight_score.mul_(inside)

    def ranked(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Magnitudes of the scores, and where entries are allowed: weights first, then biases."""
        if self.bias_score is None:
            return [self.weight_score.detach().abs()], [self._inside()]
        scores = self.weight_score.detach().abs(), self.bias_score.detach().abs()
        return list(scores), [self._inside(), None]

    def masks(self) -> tuple[Tensor, Tensor | None]:
        """The masks of weight and bias, 1.0 and 0.0, with ``keep`` ones in total."""
        weight, *bias = top_masks(*self.ranked(), self.keep)
        return weight, bias[0] if bias else None

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the layer computes with, shapes as ``weight`` and ``bias``."""
        weight_mask, bias_mask = self.masks()
        weight = StraightThrough.apply(self.weight, self.weight_score, weight_mask)
        bias = None
        if bias_mask is not None:
            bias = StraightThrough.apply(self.bias, self.bias_score, bias_mask)
        return weight, bias

    def _inside(self) -> Tensor | None:
        return getattr(self, "weight_mask", None)


class GlobalPopup(Popup):
    """The same with one number for the network, divided among layers in each forward pass."""

    @classmethod
    @torch.no_grad()
    def agree(cls, layers: Sequence[Popup]) -> None:
        """Divide the sum of all ``keep`` among the layers by their present scores.

        The best entries of the network that lie in a layer are the best of that layer, so a number
        per layer is enough. Ties go to earlier layers and positions. No synchronisation.
        """
        rank_globally(layers, torch.stack([layer.keep for layer in layers]).sum())


RANKINGS: dict[str, type[Popup]] = {"layer": Popup, "global": GlobalPopup}


def popup(model: nn.Module, seed: int, score_init: str = "kaiming", ranking: str = "layer") -> None:
    """Turn every convolution and linear layer into its edge-popup form, in place.

    Weights, biases and masks stay the same tensors. BatchNorm loses its weight and bias and keeps
    its running statistics, so that only scores learn. Until `set_density` is called, every layer
    keeps all entries that its mask allows.

    Args:
        model: the bare network, with its masks.
        seed: the run's. Scores of the layer ``name`` are drawn from (seed, "score/" + name).
        score_init: ``kaiming``, uniform in +-1/sqrt(fan_in) as in the paper's code; or
            ``constant``, 0.5 plus a random excess below 1e-4 for tie-breaking: equal scores would
            keep the first outputs of each layer and leave the others dead.
        ranking: ``layer`` keeps a number of entries in each layer; ``global`` keeps a number in the
            network, and every forward pass of ``model`` (not of a part of it) ranks anew.
    """
    for name, layer in replace_layers(model, RANKINGS[ranking]).items():
        _draw_scores(layer, score_init, generator(seed, f"score/{name}"))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.affine = False
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)


@torch.no_grad()
def _draw_scores(layer: Popup, how: str, draw: torch.Generator) -> None:
    """Weights first, then biases, drawn on the CPU in float32."""
    bound = 1 / math.sqrt(layer.weight[0].numel())
    for score in (layer.weight_score, layer.bias_score):
        if score is not None:
            drawn = torch.empty(score.shape, dtype=torch.float32, device="cpu")
            if how == "constant":
                drawn.uniform_(_CONSTANT, _CONSTANT + _TIE_BREAK, generator=draw)
            else:
                drawn.uniform_(-bound, bound, generator=draw)
            score.copy_(drawn)
    layer.keep_inside()


def popup_layers(model: nn.Module) -> dict[str, Popup]:
    """The edge-popup layers, name -> module, in forward order."""
    return effective_layers(model, Popup)


def count(density: float, size: int, allowed: int) -> int:
    """How many of ``size`` entries a density keeps: the nearest integer, at most ``allowed``.

    ``size`` counts all weights and biases, also those outside the random mask.
    """
    return min(round(density * size), allowed)


@torch.no_grad()
def set_density(model: nn.Module, density: float) -> None:
    """Keep a share ``density`` of the entries of each layer, or in global ranking of the network.

    Call it at every change of density or masks. Waits for the device.
    """
    layers = list(popup_layers(model).values())
    for layer in layers:
        layer.keep_inside()
        layer.keep.fill_(count(density, layer.size(), layer.allowed()))
    if isinstance(layers[0], GlobalPopup):
        total = count(density, sum(x.size() for x in layers), sum(x.allowed() for x in layers))
        rank_globally(layers, torch.tensor(total, device=layers[0].keep.device))


def rank_globally(layers: Sequence[Popup], total: Tensor) -> None:
    """Rank all entries together, and let ``layers`` keep ``total`` of them in all."""
    magnitudes, allowed, owners = [], [], []
    for layer in layers:
        scores, inside = layer.ranked()
        magnitudes += scores
        allowed += inside
        owners += [layer] * len(scores)
    masks = top_masks(magnitudes, allowed, total)
    for layer in layers:
        layer.keep.zero_()
    for layer, mask in zip(owners, masks):
        layer.keep.add_(mask.count_nonzero())


@torch.no_grad()
def found_masks(model: nn.Module) -> dict[str, Tensor]:
    """What each layer uses: parameter name ("conv1.weight", "fc.bias") -> bool tensor like it."""
    agree(model)
    found = {}
    for name, layer in popup_layers(model).items():
        for kind, mask in zip(("weight", "bias"), layer.masks()):
            if mask is not None:
                found[f"{name}.{kind}" if name else kind] = mask.bool()
    return found
