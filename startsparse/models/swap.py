"""Layers of another class in the place of plain ones."""

import torch
from torch import nn


def hollow(layer: nn.Module, conv: type[nn.Conv2d], linear: type[nn.Linear]) -> nn.Module:
    """A ``conv`` or ``linear`` with the sizes and settings of ``layer``, a Conv2d or Linear.

    Its parameters are on the meta device, to be replaced by those of ``layer``.
    """
    with torch.device("meta"):
        if not isinstance(layer, nn.Conv2d):
            return linear(layer.in_features, layer.out_features, layer.bias is not None)
        return conv(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
        )
