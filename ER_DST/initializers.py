"""Initial weights: as published, or scaled by the density of masks; and orthogonal repair."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from startsparse import models
from startsparse.errors import OptionError
from startsparse.masks import active, keep_inside, masked_weights, sparse_layers
from startsparse.models.gcn import GCN
from startsparse.models.looks_linear import looks_linear
from startsparse.models.vgg import VGG
from startsparse.seeding import generator


class Spec(NamedTuple):
    """What a rule knows of the layer whose weight it draws."""

    shape: torch.Size
    """[out, in, *kernel]"""

    std: float
    """1 / sqrt(fan_in * p), with fan_in = in * kernel and p the realised density of the mask."""

    first: bool
    last: bool


Init = Callable[[Spec, torch.Generator], Tensor]


def _normal(spec: Spec, draw: torch.Generator) -> Tensor:
    """Normal. Each output is a sum of fan_in * p terms, so it has the variance of the inputs."""
    return spec.std * torch.randn(spec.shape, generator=draw, dtype=torch.float32, device="cpu")


def _uniform(spec: Spec, draw: torch.Generator) -> Tensor:
    """Uniform in +-sqrt(3) std, which has the same variance."""
    bound = math.sqrt(3) * spec.std
    weight = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
    return weight.uniform_(-bound, bound, generator=draw)


def _bimodal(spec: Spec, draw: torch.Generator) -> Tensor:
    """+std or -std with equal probability: only the mask and the signs are random."""
    signs = torch.randint(2, spec.shape, generator=draw, dtype=torch.float32, device="cpu")
    return spec.std * (2 * signs - 1)


def _looks_linear(spec: Spec, draw: torch.Generator) -> Tensor:
    """See `looks_linear`. Density does not scale it.

    Only a dense network begins linear, because random masks are not mirrored.
    """
    return looks_linear(spec.shape, draw, first=spec.first, last=spec.last)


def _fan_out(spec: Spec, draw: torch.Generator) -> Tensor:
    """Normal with variance 2 / fan_out, fan_out = out * kernel (He et al. 2015, equation 14)."""
    fan_out = spec.shape[0] * math.prod(spec.shape[2:])
    weight = torch.randn(spec.shape, generator=draw, dtype=torch.float32, device="cpu")
    return math.sqrt(2 / fan_out) * weight


def _small(spec: Spec, draw: torch.Generator) -> Tensor:
    """Normal with standard deviation 0.01 (the classifier of VGG)."""
    return 0.01 * torch.randn(spec.shape, generator=draw, dtype=torch.float32, device="cpu")


def _glorot(spec: Spec, draw: torch.Generator) -> Tensor:
    """Uniform with variance 2 / (in + out) (Glorot and Bengio 2010, equation 16)."""
    weight = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
    bound = math.sqrt(6 / (spec.shape[0] + spec.shape[1]))
    return weight.uniform_(-bound, bound, generator=draw)


class Start(NamedTuple):
    """Rules for the weights of a network; None: layers of that kind keep what the base drew."""

    base: str
    """A rule of `models.init_weights`. It sets biases too: to 0, or with "torch" as PyTorch does"""

    conv: Init | None = None
    linear: Init | None = None


# default depends on the network; see `published`
INITS: dict[str, Start | None] = {
    "default": None,
    "kaiming": Start("kaiming_normal"),
    "normal": Start("kaiming_normal", _normal, _normal),
    "uniform": Start("kaiming_normal", _uniform, _uniform),
    "bimodal": Start("kaiming_normal", _bimodal, _bimodal),
    "looks-linear": Start("kaiming_normal", _looks_linear, _looks_linear),
}


def published(model: nn.Module) -> Start:
    """The rules that published code has for a network, whatever its mask.

    VGG: Kaiming normal with fan_out, the classifier N(0, 0.01^2), biases 0. ResNets of ImageNet:
    Kaiming normal with fan_out, the classifier by PyTorch's own rule, as torchvision has it. GCN:
    Glorot uniform (Kipf and Welling 2017). All others, the CIFAR ResNets among them: PyTorch's own
    rule, weights and biases uniform in +-1/sqrt(fan_in).
    """
    if isinstance(model, VGG):
        return Start("kaiming_normal", _fan_out, _small)
    if isinstance(model, GCN):
        return Start("torch", linear=_glorot)
    if type(model).__module__ == "torchvision.models.resnet":  # slow to import, and seldom there
        return Start("torch", conv=_fan_out)
    return Start("torch")


@torch.no_grad()
def init_weights(model: nn.Module, how: str, seed: int) -> None:
    """Initialise ``model`` in place, its weights by the rule ``how``.

    ``default`` is `published` for this network; ``kaiming`` is Kaiming normal with fan_in. Biases
    are 0, except with ``default``. As in `models.init_weights`, each layer draws on the CPU from
    ``generator(seed, f"weights/{name}")``, BatchNorm is reset, and the model must be the bare one.
    Afterwards the weights are zero outside their masks.

    Raises:
        OptionError: ``how`` is not in `INITS`, or does not suit the size of a layer.
    """
    if how not in INITS:
        raise OptionError(
            f"--init-method: no rule is called {how!r}; choose from {', '.join(INITS)}"
        )
    start = INITS[how] or published(model)
    models.init_weights(model, start.base, seed)
    layers = sparse_layers(model)
    for number, (name, layer) in enumerate(layers.items(), start=1):
        rule = start.conv if isinstance(layer, nn.Conv2d) else start.linear
        if rule is None:
            continue
        # fan_in * p is the mean number of edges of an output; an empty layer has no scale
        edges = max(int(active(layer).sum()), 1) / len(layer.weight)
        spec = Spec(layer.weight.shape, 1 / math.sqrt(edges), number == 1, number == len(layers))
        try:
            layer.weight.copy_(rule(spec, generator(seed, f"weights/{name}")))
        except ValueError as error:
            raise OptionError(f"--init-method: {how}: layer {name!r}: {error}") from None
    keep_inside(model)


@torch.no_grad()
def ortho_repair(model: nn.Module, steps: int = 40) -> dict[str, tuple[float, float]]:
    """Make each masked layer as orthogonal as its mask allows, in place.

    Gradient descent on ||W W^T - I||^2 (Frobenius) for W = (mask * weight).flatten(1), in float32
    on the weight's device. If W has more rows than columns, W^T W takes the place of W W^T, which
    cannot have full rank. A step that would raise the objective is not taken and halves the step
    size; any other step increases it. A layer is done early when a step gains less than 0.01 %.

    Masks stay as they are, and weights outside them are zero afterwards.

    Args:
        steps: limit of the steps tried in a layer; each costs about 4 * n * weights operations,
            where n is the smaller side of W.

    Returns:
        Layer name -> (objective before, after).
    """
    objectives = {}
    for name, weight, mask in masked_weights(model):
        inside = mask.flatten(1)
        matrix = weight.flatten(1).float() * inside
        if len(matrix) > matrix.shape[1]:
            repaired, before, after = _descend(matrix.T, inside.T, steps)
            repaired = repaired.T
        else:
            repaired, before, after = _descend(matrix, inside, steps)
        weight.copy_(repaired.reshape(weight.shape))
        objectives[name] = before, after
    return objectives


def _descend(matrix: Tensor, inside: Tensor, steps: int) -> tuple[Tensor, float, float]:
    """The matrix after at most ``steps`` tried steps, and the objective before and after."""
    gap = orthogonality_gap(matrix)
    before = objective = float(gap.square().sum())
    # A small first step: the curvature is about eight times the largest eigenvalue of W W^T, which
    # is at most its largest row sum. The size doubles up to the first failure; after that it grows
    # more slowly, to waste fewer steps.
    size = 0.25 / max(1.0, float(gap.abs().sum(1).max()))
    growth = 2.0
    slope = orthogonality_gradient(matrix, gap, inside)
    for _ in range(steps):
        tried = matrix - size * slope
        gap = orthogonality_gap(tried)
        value = float(gap.square().sum())
        if not value < objective:  # NaN, after an overflow, is a failure too
            size, growth = size / 2, 1.2
            if size * float(slope.square().sum()) < 1e-4 * objective:  # to first order
                break
            continue
        gained = 1 - value / objective
        matrix, objective = tried, value
        if gained < 1e-4:
            break
        size *= growth
        slope = orthogonality_gradient(matrix, gap, inside)
    return matrix, before, objective


def orthogonality_gap(matrix: Tensor) -> Tensor:
    """W W^T - I, [n, n] for W of [n, m]; the objective is its squared Frobenius norm."""
    gap = matrix @ matrix.T
    gap.diagonal().sub_(1)
    return gap


def orthogonality_gradient(matrix: Tensor, gap: Tensor, inside: Tensor) -> Tensor:
    """4 (W W^T - I) W inside the mask: the gradient of the objective, [n, m]."""
    return (4 * gap @ matrix).mul_(inside)
