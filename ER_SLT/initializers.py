"""Initial values of the frozen weights and biases: the choices of ``--initBias``.

Fischer et al. 2021 (arXiv:2110.11150) give strong tickets biases that are not zero. If the weights
of each layer are multiplied by some factor, and its biases by the product of the factors so far, a
ReLU network only multiplies its output. So biases have the standard deviation s: the product of the
deviations of the weights of all layers so far, this one included, times ``--bfac``. With
``signed-const-with-bias``, s is the deviation of the layer's own weights.
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
    """Draw every weight and bias of ``model``, in place.

    Weights: ``kn`` normal with the standard deviation of He, sqrt(2 / fan_in); ``signed-const``
    plus or minus that with equal probability; ``ortho`` looks-linear (Balduzzi et al. 2017).

    Biases: with ``zero-bias`` no layer has one, because a frozen zero is nothing to select.
    Otherwise every layer has one, with the standard deviation s of this module's docstring; the
    weights of ``ortho`` count with the deviation of He, too.

    - ``kn-nonzero-bias``: normal.
    - ``signed-const-with-bias``: +-s with equal probability, where s is that of the layer's own
      weights, so that weights and biases have one magnitude.
    - ``ortho-nonzero-bias``: mirrored, (b, -b) with normal b, so that the two halves of a layer
      still carry z and -z; in the last layer, which has no halves, normal.
    - ``ortho-bias-special``: mirrored in one layer; the bias of the next layer undoes it. That bias
      is (-V b, V b), where V is the upper left block of the next layer's weight, summed over its
      kernel. Away from the borders of images the network then begins as linear as it does without
      biases, and every bias that is masked bends it. A layer is mirrored itself if its number of
      inputs is not the number of outputs of the mirrored layer before it.

    In networks of some tens of layers the product of deviations falls below what float32 can hold,
    and biases become zero.

    Args:
        model: not yet in edge-popup form. Weights outside its masks, if it has any, become zero.
        seed: weights of the layer ``name`` come from (seed, "weights/" + name), its biases from
            (seed, "bias/" + name), on the CPU.
        bfac: factor of the bias deviations, except for ``signed-const-with-bias``; > 0.
        density: of the ticket, in (0, 1]. Divides the weights of each layer by the square root of
            the layer's density in the ticket: this one, or that of its mask if it is lower. The
            code published with Ramanujan et al. 2020 calls it ``scale_fan``. None: no division.
        scale: factor of all weights, and of biases by the rules above; > 0.

    Raises:
        OptionError: an unknown rule, or ``ortho`` where a layer has an odd number of units.
    """
    if how not in INITS:
        raise OptionError(f"--initBias: no rule is called {how!r}; choose from {', '.join(INITS)}")
    weights, biases = INITS[how]
    layers = sparse_layers(model)
    product, mirrored = bfac, None  # mirrored: the half of a bias that the next layer can undo
    for index, (name, layer) in enumerate(layers.items()):
        shape, first, last = layer.weight.shape, index == 0, index == len(layers) - 1
        gain = scale if density is None else scale * min(density, _inside(layer)) ** -0.5
        deviation = gain * he_deviation(shape)
        product *= deviation
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
        elif biases == "signed":
            bias = deviation * _signs(shape[:1], draw)
        else:
            bias, mirrored = _drawn_bias(biases != "normal" and not last, shape[0], product, draw)
        layer.bias = nn.Parameter(bias.to(layer.weight))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()
    keep_inside(model)


def _drawn_bias(
    mirror: bool, outputs: int, deviation: float, draw: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """A normal bias [outputs]; if it is to be mirrored, (b, -b), also b."""
    if not mirror:
        return _gaussian(torch.Size([outputs]), deviation, draw), None
    half = _gaussian(torch.Size([outputs // 2]), deviation, draw)
    return torch.cat([half, -half]), half


def has_batchnorm(model: nn.Module) -> bool:
    """Whether the model has BatchNorm, which undoes a factor of the weights."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _inside(layer: nn.Module) -> float:
    """Density of the layer's mask; 1 without a mask, or with an empty one: nothing to scale."""
    mask = getattr(layer, "weight_mask", None)
    return 1.0 if mask is None else mask.double().mean().item() or 1.0


def _cancelling(weight: Tensor, mirrored: Tensor, last: bool) -> Tensor:
    """The bias that undoes (mirrored, -mirrored) of the layer before this looks-linear one."""
    rows = len(weight) if last else len(weight) // 2
    block = weight[:rows, : len(mirrored)].reshape(rows, len(mirrored), -1).sum(2)
    undone = -(block.double() @ mirrored.double()).float()
    return undone if last else torch.cat([undone, -undone])
