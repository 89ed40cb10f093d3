"""A network as a list of steps on maps, which `lowering` makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from startsparse.engine.entries import Window
from startsparse.engine.layers import Product
from startsparse.engine.maps import Space, to_images, to_map


@dataclass
class Step:
    """One step: ``run(*tensors, images)`` of the values named ``inputs`` makes ``output``."""

    run: Callable[..., Tensor]
    inputs: list[str]
    output: str


class DenseProduct:
    """A convolution or linear layer as PyTorch computes it, between maps."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, window: Window, given: Space, made: Space):
        """Use the weight of ``layer`` as it is at each call."""
        self.layer, self.window, self.given, self.made = layer, window, given, made

    def __call__(self, x: Tensor) -> Tensor:
        """The product; its border is zero."""
        inside = self.given.inside(x).permute(0, 4, 2, 3, 1)  # channels_last is the fast layout
        images = inside.reshape(-1, *inside.shape[2:]).permute(0, 3, 1, 2)
        weight, stride = self.layer.weight, self.window.stride
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        if self.window.kernel == (1, 1) and self.window.padding == (0, 0):
            # As in models.resnet.Projection: oneDNN must not see the stride.
            images, stride = images[:, :, :: stride[0], :: stride[1]], (1, 1)
        y = F.conv2d(images, weight, None, stride, self.window.padding)
        return to_map(y, self.made)


@dataclass
class Program:
    """The steps, and what they are made of.

    Attributes:
        products: layer name -> its product, sparse and dense; `sparse` says which one runs.
        spaces: value -> the space of its map.
    """

    flat: bool = False
    steps: list[Step] = field(default_factory=list)
    products: dict[str, tuple[Product, DenseProduct]] = field(default_factory=dict)
    sparse: set[str] = field(default_factory=set)
    spaces: dict[str, Space] = field(default_factory=dict)
    start: str = ""
    result: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], as the network."""
        if self.flat:
            images = images.flatten(1)[:, :, None, None]
        values = {self.start: to_map(images, self.spaces[self.start])}
        last_use = {name: i for i, step in enumerate(self.steps) for name in step.inputs}
        for i, step in enumerate(self.steps):
            inputs = [values[name] for name in step.inputs]
            values[step.output] = step.run(*inputs, len(images))
            for name in step.inputs:
                if last_use[name] == i:
                    values.pop(name, None)
        return to_images(values[self.result], self.spaces[self.result], len(images)).flatten(1)
