"""Residual networks (He et al. 2016, arXiv:1512.03385) for small images, and torchvision's.

Two families, as in the literature: the *thin* ones for CIFAR (section 4.2: three stages of 16, 32
and 64 channels) and the *wide* ones for ImageNet (section 4.1: four stages of 64 to 512 channels).
Here the wide ones have a 3x3 stem of stride 1 and no max-pooling, so that 32x32 images keep their
size up to the second stage.

Every shortcut that changes the shape is a projection, 1x1 convolution and BatchNorm (option B of
section 3.3), in the thin networks too, where the paper pads with zeros (option A). A convolution
has no bias, as BatchNorm follows.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from startsparse.errors import OptionError


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Projection(nn.Sequential):
    """1x1 convolution and BatchNorm on every ``stride``-th pixel.

    The stride comes before the convolution, which is the same function. In a convolution with that
    stride, oneDNN's weight gradient writes past its buffer if there are fewer than 8 input channels
    in channels_last (seen with torch 2.15 on AVX2: a crash or an endless loop).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
        return super().forward(x[:, :, :: self.stride, :: self.stride])


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else Projection(inputs, outputs, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (N, inputs, H, W) -> (N, width, H/stride, ...)."""

    expansion = 1  # channels that leave the block, in units of its width

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Layers run in the order in which they are registered: the shortcut comes last."""
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu_(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut: (N, inputs, H, W) -> (N, 4 * width, H/stride, ...).

    The stride is in the 3x3 convolution, as torchvision has it; the paper has it in the first 1x1.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Layers run in the order in which they are registered: the shortcut comes last."""
        out = F.relu_(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu_(out + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages, global average, classifier: (N, channels, H, W) -> (N, classes) logits.

    Stage i has ``blocks[i]`` blocks of width ``widths[i]``; every stage but the first halves the
    image. The stem is as wide as the first stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        classes: int,
        channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        inputs = widths[0]
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                stage.append(block(inputs, width, stride=2 if i > 0 and j == 0 else 1))
                inputs = width * block.expansion
            self.stages.append(stage)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, classes)."""
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.fc(self.stages(x).mean(dim=(2, 3)))


_WIDE: dict[int, tuple[type[BasicBlock] | type[Bottleneck], Sequence[int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def thin(depth: int, *, classes: int, channels: int, width: int, **_: int) -> ResNet:
    """ResNet-20, 32, 56 ...: three stages of width, 2 width, 4 width; 0 is the paper's 16."""
    width = width or 16
    blocks = (depth - 2) // 6
    return ResNet(
        BasicBlock, [blocks] * 3, [width, 2 * width, 4 * width], classes=classes, channels=channels
    )


def wide(depth: int, *, classes: int, channels: int, width: int, **_: int) -> ResNet:
    """ResNet-18, 34, 50: four stages of width, 2, 4 and 8 width; 0 is the paper's 64."""
    block, blocks = _WIDE[depth]
    widths = [(width or 64) * 2**i for i in range(4)]
    return ResNet(block, blocks, widths, classes=classes, channels=channels)


def small_dense(*, classes: int, channels: int, width: int, **_: int) -> ResNet:
    """ResNet-18 with every stage ``width`` wide; no width is an `OptionError`."""
    if not width:
        raise OptionError("--width: small-dense needs it (channels of every stage)")
    block, blocks = _WIDE[18]
    return ResNet(block, blocks, [width] * 4, classes=classes, channels=channels)


def small_dense_inc(*, classes: int, channels: int, width: int, **_: int) -> ResNet:
    """ResNet-18 with ``width`` channels, doubled at each stage; no width is an `OptionError`."""
    if not width:
        raise OptionError("--width: small-dense-inc needs it (channels of the first stage)")
    return wide(18, classes=classes, channels=channels, width=width)


def imagenet(depth: int, *, classes: int, channels: int, width: int, **_: int) -> nn.Module:
    """torchvision's ResNet-18 or 50, untrained: 7x7 stem of stride 2, max-pooling, 3 channels."""
    if width:
        raise OptionError("--width: the ImageNet ResNets have their own; leave it out")
    if channels != 3:
        raise OptionError(
            f"--arch: the ImageNet ResNets need colour images, not {channels} channel(s)"
        )
    from torchvision.models import resnet18, resnet50  # slow to import, and seldom needed

    return {18: resnet18, 50: resnet50}[depth](weights=None, num_classes=classes)
