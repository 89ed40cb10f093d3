"""The networks, by name.

All are plain modules of nn.Conv2d, nn.Linear and BatchNorm, which callers may swap in place. Two
promises hold for these layers. `named_modules` yields them in the order of the forward pass, the
classifier last, so that layer-wise ratios can number them. And they are only called as modules, so
that no swapped layer or hook is bypassed.

A new network is a function of keyword arguments (classes, channels, size, width) and one line in
`MODELS`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from startsparse.errors import OptionError
from startsparse.models import resnet
from startsparse.models.algorithmic import algorithmic
from startsparse.models.gcn import gcn
from startsparse.models.init import INITS, init_weights
from startsparse.models.mlp import mlp
from startsparse.models.vgg import vgg

__all__ = ["INITS", "MODELS", "RESNET_TYPES", "build", "fitting", "init_weights"]

Builder = Callable[..., nn.Module]


class Network(NamedTuple):
    """A line of `MODELS`.

    Attributes:
        build: takes classes, channels, size and width, see `build`.
        takes: kinds of examples that it takes, see `data.Shape.kind`.
        batch_norm: whether it has BatchNorm.
    """

    build: Builder
    takes: tuple[str, ...] = ("images",)
    batch_norm: bool = True


MODELS: dict[str, Network] = {
    "resnet20": Network(partial(resnet.thin, 20)),
    "resnet32": Network(partial(resnet.thin, 32)),
    "resnet56": Network(partial(resnet.thin, 56)),
    "resnet18": Network(partial(resnet.wide, 18)),
    "resnet34": Network(partial(resnet.wide, 34)),
    "resnet50": Network(partial(resnet.wide, 50)),
    "vgg11": Network(partial(vgg, 11)),
    "vgg13": Network(partial(vgg, 13)),
    "vgg16": Network(partial(vgg, 16)),
    "vgg19": Network(partial(vgg, 19)),
    "mlp": Network(mlp, ("images", "rows", "graph nodes")),
    "gcn": Network(gcn, ("graph nodes",), batch_norm=False),
    "algorithmic": Network(algorithmic, ("rows",), batch_norm=False),
}

RESNET_TYPES: dict[str, Builder] = {
    "large": MODELS["resnet18"].build,
    "small-dense": resnet.small_dense,
    "small-dense-inc": resnet.small_dense_inc,
    "res50": MODELS["resnet50"].build,
}

_IMAGENET_MODELS: dict[str, Builder] = {
    "resnet18": partial(resnet.imagenet, 18),
    "resnet50": partial(resnet.imagenet, 50),
}

_IMAGENET_TYPES: dict[str, Builder] = {
    "large": _IMAGENET_MODELS["resnet18"],
    "res50": _IMAGENET_MODELS["resnet50"],
}


def build(
    arch: str,
    *,
    classes: int,
    channels: int = 3,
    size: int = 32,
    width: int = 0,
    resnet_type: str = "",
    option: str = "--arch",
    imagenet: bool = False,
    adjacency: Tensor | None = None,
) -> nn.Module:
    """The network ``arch``, from images (N, channels, size, size) to logits (N, classes).

    A row of numbers, or a node of a graph, is an image of size 1. ``adjacency`` is that of the
    graph, for gcn; see `GCN`.

    ``width`` is the channels of the first stage (further stages keep their ratio to it), or the
    units of every hidden layer of the MLP; 0 is the architecture's own. A ``resnet_type`` replaces
    ``arch``. With ``imagenet`` the network is torchvision's, for images of about 224 pixels.

    The weights are PyTorch's own, from the global random state; see `init_weights`.

    Args:
        option: what an error calls the name of the network.

    Raises:
        OptionError: an unknown name (they are in lower case), a width that is negative, missing or
            not possible, or images that are too small or have the wrong number of channels.
    """
    if width < 0:
        raise OptionError(f"--width: {width} is negative; 0 is the architecture's own")
    if resnet_type:
        table = _IMAGENET_TYPES if imagenet else RESNET_TYPES
        builder = _choose(option, resnet_type, table, imagenet)
    else:
        plain = {name: network.build for name, network in MODELS.items()}
        table = _IMAGENET_MODELS if imagenet else plain
        builder = _choose(option, arch, table, imagenet)
    graph = {"adjacency": adjacency} if builder is gcn else {}
    return builder(classes=classes, channels=channels, size=size, width=width, **graph)


def fitting(kind: str) -> list[str]:
    """The networks of `MODELS` that take examples of this `data.Shape.kind`."""
    return [name for name, network in MODELS.items() if kind in network.takes]


def _choose(option: str, name: str, table: dict[str, Builder], imagenet: bool) -> Builder:
    if name not in table:
        where = " for ImageNet" if imagenet else ""
        raise OptionError(
            f"{option}: no network is called {name!r}{where}; choose from {', '.join(table)}"
        )
    return table[name]
