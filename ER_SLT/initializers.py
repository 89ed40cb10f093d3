"""How the frozen weights and biases begin: the choices of ``--initBias``.

Fischer et al. 2021 (arXiv:2110.11150) give strong tickets biases that are not zero. Multiplying the
weights of each layer by some factor, and its biases by the product of the factors up to there, does
nothing to a ReLU network but multiply its output. So the standard deviation of biases is the
product of those of the weights of all layers so far, this one included, times ``--bfac``; that of
``signed-const-with-bias`` is the one of the layer's own weights.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.errors import OptionError
from startsparse.masks import keep_inside, sparse_layers
from startsparse.models.looks_linear import looks_linear
from startsparse.seeding import generator

# (shape, gain, generator, first layer, last layer) -> float32 tensor on the CPU
Weights = Callable[[torch.Size, float, torch.Generator, bool, bool], Tensor]


def he_deviation(shape: torch.Size) -> float:
    """sqrt(2 / fan_in), the standard deviation of He et al. 2015 (arXiv:1502.01852, eq. 10)."""
    return math.sqrt(2 / math.prod(shape[1:]))


def _normal(shape: torch.Size, gain: float, draw: torch.Generator, *_: bool) -> Tensor:
    return _gaussian(shape, gain * he_deviation(shape), draw)


def _signed(shape: torch.Size, gain: float, draw: torch.Generator, *_: bool) -> Tensor:
    return gain * he_deviation(shape) * _signs(shape, draw)


def _ortho(
    shape: torch.Size, gain: float, draw: torch.Generator, first: bool, last: bool
) -> Tensor:
    return gain * looks_linear(shape, draw, first=first, last=last)


def _gaussian(shape: torch.Size, deviation: float, draw: torch.Generator) -> Tensor:
    drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
    return drawn.normal_(0, deviation, generator=draw)


def _signs(shape: torch.Size, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=draw, device="cpu").float().mul_(2).sub_(1)


# name -> how weights are drawn, and how biases are
INITS: dict[str, tuple[Weights, str]] = {
    "kn-zero-bias": (_normal, "none"),
    "kn-nonzero-bias": (_normal, "normal"),
    "ortho-zero-bias": (_ortho, "none"),
    "ortho-nonzero-bias": (_ortho, "mirrored"),
    "ortho-bias-special": (_ortho, "cancelling"),
    "signed-const-zero-bias": (_signed, "none"),
    "signed-const-with-bias": (_signed, "signed"),
}


@torch.no_grad()
def init_weights(
    model: nn.Module,
    how: str,
    seed: int,
    bfac: float = 0.05,
    density: float | None = None,
    scale: float = 1.0,
) -> None:
    """Draw every weight and bias of ``model`` anew, in place.

    Weights: ``kn`` normal with the standard deviation of He, sqrt(2 / fan_in); ``signed-const``
    plus or minus that with equal probability; ``ortho`` looks-linear (Balduzzi et al. 2017).

    Biases: with ``zero-bias`` no layer has any, as a frozen zero is nothing to select. Otherwise
    every layer has one, of the standard deviation s that this module's text names, where the
    weights of ``ortho`` count with that of He, too.

    - ``kn-nonzero-bias``: normal.
    - ``signed-const-with-bias``: +-s with equal probability, where s is that of the layer's own
      weights, so that they and the biases have one magnitude.
    - ``ortho-nonzero-bias``: mirrored, (b, -b) with normal b, so that the two halves of a layer
      still carry z and -z; in the last layer, which has no halves, normal.
    - ``ortho-bias-special``: mirrored in one layer and such that it undoes this one in the next:
      where V is the upper left block of the next layer's weight, summed over its kernel, the bias
      there is (-V b, V b). Away from the borders of images the network then begins as linear as it
      does without biases, and every bias that is masked bends it. A layer whose number of inputs is
      not the number of outputs of the mirrored one before it is mirrored itself.

    In networks with some tens of layers the product ends below what float32 can hold, and biases
    that have it at zero.

    Args:
        model: not yet the edge-popup form. Weights outside masks that are in place end as zero.
        seed: weights of the layer ``name`` come from (seed, "weights/" + name), its biases from
            (seed, "bias/" + name), on the CPU.
        bfac: factor of the bias deviations, but for ``signed-const-with-bias``; > 0.
        density: of the ticket to be found, in (0, 1]. The weights of each layer are divided by the
            square root of the density that it then computes with, as by ``scale_fan`` in the code
            published with Ramanujan et al. 2020: this one, or its mask's where that is lower.
            None: they are not.
        scale: factor of all weights, and by the rules above of biases; > 0.

    Raises:
        OptionError: an unknown rule, or ``ortho`` where a layer has an odd number of units.
    """
    if how not in INITS:
        raise OptionError(f"--initBias: no rule is called {how!r}; choose from {', '.join(INITS)}")
    weights, biases = INITS[how]
    layers = sparse_layers(model)
    product, mirrored = bfac, None
    for index, (name, layer) in enumerate(layers.items()):
        shape, first, last = layer.weight.shape, index == 0, index == len(layers) - 1
        gain = scale if density is None else scale * min(density, _inside(layer)) ** -0.5
        own = gain * he_deviation(shape)
        product *= own
        try:
            weight = weights(shape, gain, generator(seed, f"weights/{name}"), first, last)
        except ValueError as error:
            raise OptionError(f"--initBias {how}: layer {name}: {error}") from None
        layer.weight.copy_(weight)
        if biases == "none":
            layer.bias = None
            continue
        draw = generator(seed, f"bias/{name}")
        if biases == "cancelling" and mirrored is not None and 2 * len(mirrored) == shape[1]:
            bias, mirrored = _cancelling(weight, mirrored, last), None
        elif biases in ("mirrored", "cancelling") and not last:
            mirrored = _gaussian(torch.Size([shape[0] // 2]), product, draw)
            bias = torch.cat([mirrored, -mirrored])
        elif biases == "signed":
            bias = own * _signs(shape[:1], draw)
        else:
            bias = _gaussian(shape[:1], product, draw)
        layer.bias = nn.Parameter(bias.to(layer.weight))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()
    keep_inside(model)


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a factor of the weights is taken back."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _inside(layer: nn.Module) -> float:
    """Density of the layer's mask; 1 where it has none, or an empty one: nothing to be scaled."""
    mask = getattr(layer, "weight_mask", None)
    return 1.0 if mask is None else mask.double().mean().item() or 1.0


def _cancelling(weight: Tensor, mirrored: Tensor, last: bool) -> Tensor:
    """The bias that undoes (mirrored, -mirrored) of the layer before this looks-linear one."""
    rows = len(weight) if last else len(weight) // 2
    block = weight[:rows, : len(mirrored)].reshape(rows, len(mirrored), -1).sum(2)
    undone = -(block.double() @ mirrored.double()).float()
    return undone if last else torch.cat([undone, -undone])
