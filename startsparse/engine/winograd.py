"""3x3 convolutions whose masks leave a good part of the weights: a quarter of the multiplications.

All weights are computed, zeros too, by transforms of tiles of pixels (`winograd.cpp`). The values
that are stored are those inside the mask; they are laid out for the kernel at each use.
"""

import ctypes
import math

import torch
from torch import Tensor

from startsparse.engine import memory
from startsparse.engine.build import library
from startsparse.engine.entries import Positions, Window
from startsparse.engine.maps import Space, at

_bool, _int = ctypes.c_bool, ctypes.c_int64

# On smaller maps the transforms of the weights take too long, with fewer channels, in or out, those
# of the maps.
_PIXELS, _CHANNELS = 64, 32
_FOUR = 4  # rows, and channels, that the kernel does at once


def worth(window: Window, given: Space, made: Space) -> float:
    """Density from which a convolution is faster so; inf: never, or it cannot be computed so."""
    fits = window.kernel == (3, 3) and window.stride == (1, 1) and set(window.padding) <= {0, 1, 2}
    channels = min(given.channels, made.channels)
    if not fits or made.height * made.width < _PIXELS or channels < _CHANNELS:
        return math.inf
    return 0.2 + 6 / channels  # products, and transforms of maps, as measured


class Tiled:
    """A convolution of the map ``given`` to the map ``made``."""

    def __init__(self, given: Space, made: Space, padding: tuple[int, int], place: Tensor):
        """``place``: int64 [3, n], of each stored value: tap, row and channel."""
        tap, row, channel = place
        fours, channels = -(-made.channels // _FOUR), -(-given.channels // _FOUR) * _FOUR
        four = (tap * fours + row // _FOUR) * channels + channel
        self.place = (four * _FOUR + row % _FOUR).int()
        self.given, self.made, self.padding = given, made, [_int(p) for p in padding]
        self._size = 9 * fours * channels * _FOUR

    def gather(self, x: Tensor, y: Tensor, values: Tensor, _places: Positions, add: bool) -> None:
        """``y``, or what is added to it."""
        packed = values.new_zeros(self._size)
        packed[self.place] = values
        maps = self.given.view(x), self.made.view(y)
        kernels = library(x.dtype)
        scratch = memory.empty([kernels.winograd_scratch_size(*maps)], x.dtype)
        kernels.winograd_gather(*maps, at(packed), *self.padding, at(scratch), _bool(add))

    def weights(self, x: Tensor, d_y: Tensor, _places: Positions) -> Tensor:
        """The gradient of the values."""
        maps = self.given.view(x), self.made.view(d_y)
        kernels, packed = library(x.dtype), x.new_empty(self._size)
        scratch = memory.empty([kernels.winograd_scratch_size(*maps)], x.dtype)
        kernels.winograd_weights(*maps, at(packed), *self.padding, at(scratch))
        return packed[self.place]


class Winograd:
    """A convolution and the gradient of its input.

    Attributes:
        flat: int32, the places of the stored values in the flattened mask.
    """

    def __init__(self, mask: Tensor, window: Window, given: Space, made: Space):
        """``mask``: bool [out, in, 3, 3], contiguous."""
        self.flat = mask.flatten().nonzero().flatten().int()
        row, channel, tap = mask.flatten(2).nonzero().unbind(1)
        padding = window.padding
        back = 2 - padding[0], 2 - padding[1]
        self.forward = Tiled(given, made, padding, torch.stack([tap, row, channel]))
        self.backward = [Tiled(made, given, back, torch.stack([8 - tap, channel, row]))]

    def lists(self) -> list[Tensor]:
        """Where the stored values go."""
        return [part.place for part in (self.forward, *self.backward)]
