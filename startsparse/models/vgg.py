"""VGG networks (Simonyan and Zisserman 2015, arXiv:1409.1556, table 1) with BatchNorm.

As usual for small images, there is one linear layer instead of the paper's three, and a global
average instead of the last max-pooling. A convolution has no bias, as BatchNorm follows.
"""

from torch import Tensor, nn

from startsparse.errors import OptionError

# 3x3 convolutions in each of the five blocks: columns A, B, D and E of the table
_BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
# channels of the blocks, in units of the first block's
_RATIOS = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """Five blocks, global average, classifier: (N, channels, H, W) -> (N, classes) logits.

    Between blocks is a 2x2 max-pooling, so for 32x32 images the average is over 2x2 pixels.
    """

    def __init__(self, depth: int, *, classes: int, channels: int, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = channels
        for block, (count, ratio) in enumerate(zip(_BLOCKS[depth], _RATIOS, strict=True)):
            if block:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(count):
                outputs = ratio * width
                self.features.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
                self.features.append(nn.BatchNorm2d(outputs))
                self.features.append(nn.ReLU())
                inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)  # so that any image size fits the classifier
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, classes)."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


def vgg(depth: int, *, classes: int, channels: int, size: int, width: int) -> VGG:
    """VGG-11, 13, 16 or 19; ``width`` is the first block's channels, 0 is the paper's 64.

    Raises `OptionError` for images below 16 pixels, of which four poolings leave nothing.
    """
    if size < 16:
        raise OptionError(f"--arch: vgg{depth} needs images of 16 pixels or more, not {size}")
    return VGG(depth, classes=classes, channels=channels, width=width or 64)
