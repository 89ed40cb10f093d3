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

from startsparse import selection
from startsparse.effective import EffectiveLayer, effective_layers, replace_layers
from startsparse.seeding import generator
from startsparse.selection_by_counts import Layout

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
        return None, (gradient * frozen).mul_(_sign(score)), None


class StraightThroughOfAll(torch.autograd.Function):
    """The same for many tensors in a few operations."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``count`` frozen tensors, then their scores, then their masks."""
        frozen, scores, masks = _thirds(count, tensors)
        ctx.save_for_backward(*frozen, *scores)
        return tuple(torch._foreach_mul(frozen, Layout.of(frozen).alike(masks)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """As that of `StraightThrough`."""
        nothing = [None] * len(gradients)
        frozen, scores, _ = _thirds(len(gradients), ctx.saved_tensors)
        layout = Layout.of(frozen)
        products = torch._foreach_mul(layout.alike(gradients), frozen)
        to_scores = layout.split(_sign(layout.join(scores, 0)))
        torch._foreach_mul_(to_scores, layout.alike(products))
        return None, *nothing, *to_scores, *nothing


def _thirds(count: int, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [tensors[i * count : (i + 1) * count] for i in range(3)]


def _sign(scores: Tensor) -> Tensor:
    """1 or -1, also of 0 and -0."""
    return torch.copysign(torch.ones((), dtype=scores.dtype, device=scores.device), scores)


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

    def masks(self) -> tuple[Tensor, Tensor | None]:
        """The masks of weight and bias, 1.0 and 0.0, with ``keep`` ones in total."""
        weight, *bias = selection.top_masks(*ranked([self]), self.keep)
        return weight, bias[0] if bias else None

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the layer computes with, shapes as ``weight`` and ``bias``."""
        weight_mask, bias_mask = self.masks()
        weight = StraightThrough.apply(self.weight, self.weight_score, weight_mask)
        bias = None
        if bias_mask is not None:
            bias = StraightThrough.apply(self.bias, self.bias_score, bias_mask)
        return weight, bias

    @classmethod
    def effective_of_all(
        cls, layers: Sequence["Popup"]
    ) -> Sequence[tuple[Tensor, Tensor | None]] | None:
        """One selection and one product for all layers, on a GPU and where torch.compile traces."""
        if selection.one_by_one(layers[0].weight.device):
            return None
        frozen = [t for x in layers for t in (x.weight, x.bias) if t is not None]
        masks = cls.masks_of_all(layers)
        used = iter(StraightThroughOfAll.apply(len(frozen), *frozen, *_scores(layers), *masks))
        return [(next(used), None if x.bias is None else next(used)) for x in layers]

    @classmethod
    def masks_of_all(cls, layers: Sequence["Popup"]) -> list[Tensor]:
        """The masks of ``layers``, each layer's weight before its bias, found together."""
        keep = torch.stack([layer.keep for layer in layers])
        return selection.top_of_groups(*ranked(layers), keep, [len(_scores([x])) for x in layers])

    @classmethod
    def effective_weights(cls, layers: Sequence["Popup"]) -> list[Tensor]:
        """With one selection for all layers on a GPU; each keeps as many as it did last."""
        if selection.one_by_one(layers[0].weight.device):
            return super().effective_weights(layers)
        masks = dict(zip(_scores(layers), Popup.masks_of_all(layers)))
        return [layer.weight * masks[layer.weight_score] for layer in layers]

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
        cls.masks_of_all(layers)

    @classmethod
    @torch.no_grad()
    def masks_of_all(cls, layers: Sequence[Popup]) -> list[Tensor]:
        """The same, and the masks: they are those of the network's best entries."""
        return rank_globally(layers, torch.stack([layer.keep for layer in layers]).sum())


def _scores(layers: Sequence[Popup]) -> list[Tensor]:
    """Each layer's scores of weights before those of biases."""
    return [s for x in layers for s in (x.weight_score, x.bias_score) if s is not None]


def ranked(layers: Sequence[Popup]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Magnitudes of all scores, and where entries are allowed; weights before biases, by layer."""
    allowed: list[Tensor | None] = []
    for layer in layers:
        allowed += [layer._inside(), None][: 1 if layer.bias_score is None else 2]
    with torch.no_grad():
        return list(torch._foreach_abs(_scores(layers))), allowed


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


def rank_globally(layers: Sequence[Popup], total: Tensor) -> list[Tensor]:
    """Rank all entries together, and let ``layers`` keep ``total`` of them in all.

    Returns:
        The masks, as `Popup.masks_of_all`.
    """
    masks = selection.top_masks(*ranked(layers), total)
    keep = [layer.keep for layer in layers]
    if _can_change(keep[0]):
        kept = iter(torch.stack(torch._foreach_norm(masks, 1, dtype=torch.float64)).long().unbind())
        of_layers = [next(kept) if x.bias is None else next(kept) + next(kept) for x in layers]
        torch._foreach_copy_(keep, of_layers)
    return masks


def _can_change(tensor: Tensor) -> bool:
    """Whether it is no copy for a replica of DataParallel that evaluates in a thread of its own."""
    if torch.compiler.is_compiling():  # cannot trace the question
        return True
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


@torch.no_grad()
def found_masks(model: nn.Module) -> dict[str, Tensor]:
    """What each layer uses: parameter name ("conv1.weight", "fc.bias") -> bool tensor like it."""
    layers = popup_layers(model)
    ranking = type(next(iter(layers.values())))
    masks = iter(ranking.masks_of_all(list(layers.values())))
    found = {}
    for name, layer in layers.items():
        for kind in ("weight",) if layer.bias is None else ("weight", "bias"):
            found[f"{name}.{kind}" if name else kind] = next(masks).bool()
    return found
