"""Activations as the kernels want them: maps of blocks of 16 images.

A map is a tensor [C, N, H + 2 border, W + 2 border, 16]: N blocks of 16 images, which lie side by
side for each pixel of each channel. The border is zero in whatever a product reads, so that no
kernel has to look where the edge is. The images that the last block has too many are zero as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from startsparse.engine import memory
from startsparse.engine.kernels import kernels_for


def lanes() -> int:
    """Images of a block."""
    return kernels_for(torch.float32).lanes


@dataclass
class Space:
    """Where a map lives: channels, pixels, and how wide its border is."""

    channels: int
    height: int
    width: int
    border: int = 0

    @property
    def row(self) -> int:
        """Pixels of a line, border included."""
        return self.width + 2 * self.border

    @property
    def plane(self) -> int:
        """Pixels of a channel, border included."""
        return (self.height + 2 * self.border) * self.row

    def stride(self, blocks: int) -> int:
        """Numbers from one channel to the next, of so many blocks of images."""
        return lanes() * blocks * self.plane

    def empty(self, blocks: int, like: Tensor) -> Tensor:
        """A map of this space, its numbers and border not set."""
        shape = self.channels, blocks, self.height + 2 * self.border, self.row, lanes()
        return memory.empty(shape, like.dtype)

    def inside(self, data: Tensor) -> Tensor:
        """View of ``data`` without the border."""
        b = self.border
        return data[:, :, b : b + self.height, b : b + self.width]

    def positions(self, blocks: int, y: Tensor, x: Tensor) -> Tensor:
        """int64 [blocks * len(y) * len(x)]: where in memory channel 0 of these pixels begins.

        Ordered by block, y, x. Pixels may lie in the border: -1 is one before the edge.
        """
        n = torch.arange(blocks) * self.plane
        line = (y + self.border) * self.row
        pixels = n[:, None, None] + line[:, None] + (x + self.border)
        return (lanes() * pixels).flatten()


def to_map(images: Tensor, space: Space) -> Tensor:
    """[B, C, H, W] -> a map. Differentiable."""
    missing = -len(images) % lanes()
    if missing or space.border:
        images = torch.nn.functional.pad(images, (space.border,) * 4 + (0, 0, 0, missing))
    return images.unflatten(0, (-1, lanes())).permute(2, 0, 3, 4, 1).contiguous()


def to_images(data: Tensor, space: Space, images: int) -> Tensor:
    """A map -> [B, C, H, W] of the first B images. Differentiable."""
    inside = space.inside(data).permute(1, 4, 0, 2, 3)
    return inside.reshape(-1, *inside.shape[2:])[:images]
