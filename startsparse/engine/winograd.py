"""3x3 convolutions whose masks leave a good part of the weights: a quarter of the multiplications.

All weights are computed, zeros too, by transforms of tiles of pixels (`winograd.cpp`). The values
that are stored are those inside the mask; each use packs them for the kernel.
"""

import math

import torch
from torch import Tensor

from startsparse.engine.entries import Positions, Window
from startsparse.engine.kernels import kernels_for
from startsparse.engine.maps import Space

# On smaller maps the transforms of the weights take too long, with fewer channels, in or out, those
# of the maps.
_PIXELS, _CHANNELS = 64, 32


def break_even(window: Window, input: Space, output: Space) -> float:
    """Density from which a convolution is faster so; inf: never, or it cannot be computed so."""
    fits = window.kernel == (3, 3) and window.stride == (1, 1) and set(window.padding) <= {0, 1, 2}
    channels = min(input.channels, output.channels)
    if not fits or output.height * output.width < _PIXELS or channels < _CHANNELS:
        return math.inf
    return 0.2 + 6 / channels  # products, and transforms of maps, as measured


class Tiled:
    """A convolution of the map ``input`` to the map ``output``."""

    def __init__(self, input: Space, output: Space, padding: tuple[int, int], where: Tensor):
        """``where``: int64 [3, n], of each stored value: tap, row and channel."""
        tap, row, channel = where
        together = kernels_for(torch.float32).rows_at_once
        groups, channels = (-(-n // together) for n in (output.channels, input.channels))
        channels *= together
        group = (tap * groups + row // together) * channels + channel
        self.packed = (group * together + row % together).int()  # where the kernel wants them
        self.input, self.output, self.padding = input, output, padding
        self._size = 9 * groups * channels * together

    def gather(
        self, x: Tensor, y: Tensor, values: Tensor, _positions: Positions, add: bool
    ) -> None:
        """``y``, or what is added to it."""
        packed = values.new_zeros(self._size)
        packed[self.packed] = values
        maps = (self.input, x), (self.output, y)
        kernels_for(x.dtype).winograd_gather(*maps, packed, self.padding, add)

    def weight_gradient(self, x: Tensor, d_y: Tensor, _: Positions) -> Tensor:
        """The gradient of the values."""
        how = (self.input, x), (self.output, d_y), self._size, self.padding
        return kernels_for(x.dtype).winograd_weight_gradient(*how)[self.packed]


class Winograd:
    """A convolution and the gradient of its input.

    Attributes:
        flat: int32, the indices of the stored values in the flattened mask.
    """

    def __init__(self, mask: Tensor, window: Window, input: Space, output: Space):
        """``mask``: bool [out, in, 3, 3], contiguous."""
        self.flat = mask.flatten().nonzero().flatten().int()
        row, channel, tap = mask.flatten(2).nonzero().unbind(1)
        padding = window.padding
        back = 2 - padding[0], 2 - padding[1]
        self.forward = Tiled(input, output, padding, torch.stack([tap, row, channel]))
        self.backward = [Tiled(output, input, back, torch.stack([8 - tap, channel, row]))]

    def lists(self) -> list[Tensor]:
        """Where the stored values go."""
        return [part.packed for part in (self.forward, *self.backward)]
