"""What the engine asks of a device: the seam between the steps of a network and their kernels.

`kernels.py` has those of CPUs. Another device implements `Kernels`, with as many images in a block
as suit it, and `kernels.kernels_for` returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from startsparse.engine.entries import Listed, Positions
    from startsparse.engine.maps import Space

    Map = tuple[Space, Tensor]  # activations, and the space that they fill


@dataclass
class Norm:
    """What a BatchNorm does to a channel: (y - mean) * inverse deviation * gamma + beta.

    Attributes:
        mode: where mean and deviation come from: "plain" (0 and 1), "running" statistics, "batch".
        statistics: [2, channels], mean and inverse deviation; `Kernels.affine` writes them.
        gamma, beta: [channels]; None: 1, and 0.
        running_mean, running_variance: [channels]; None in mode "batch": they are not updated.
        handle: what the kernels made of it.
    """

    mode: str
    statistics: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_variance: Tensor | None = None
    momentum: float = 0.0
    epsilon: float = 0.0
    handle: Any = None


@dataclass
class Plane:
    """The map of one image, from pixel (0, 0) of channel 0 on.

    ``channel`` and ``line`` are numbers from one channel, or line of pixels, to the next.
    """

    data: Tensor
    channels: int
    height: int
    columns: int
    channel: int
    line: int


Call = Callable[[], None]  # computes what it was prepared for, as often as it is called


class Kernels(Protocol):
    """The operations of one device on numbers of one dtype.

    Attributes:
        lanes: images of a block, the innermost dimension of a map.
        sums: groups of positions, `Listed.group`, are multiples of it.
        rows_at_once: rows that lie side by side in packed weights.
        no_tap: marks taps that belong to another phase.
    """

    lanes: int
    sums: int
    rows_at_once: int
    no_tap: int

    # lists of entries

    def list_entries(self, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The entries of a mask, bool [rows, channels, taps], by (block of ``size`` channels, row).

        Returns:
            int32 [blocks * rows + 1], the first of each list; int32 [entries], flat indices.
        """

    def list_transposed(
        self, entries: Listed, flat: Tensor, channels: int, tap: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """The entries of a phase by (block of ``size`` rows, input channel).

        Args:
            entries, flat: what `list_entries` found.
            tap: int64 [taps], `no_tap` where the tap is of another phase.

        Returns:
            The first of each list; int32 [entries], which of the entries each is.
        """

    def set_offsets(
        self, offset: Tensor, flat: Tensor, order: Tensor | None, divisor: int, modulus: int,
        stride: int, tap: Tensor,
    ) -> None:  # fmt: skip
        """``offset`` = flat // divisor % modulus * stride + tap[flat % taps], for flat[order]."""

    def list_nonzero(
        self, entries: Listed, order: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First, offset, order and value of the entries of which ``values[order]`` is not zero."""

    # products of maps: see products.h

    def gather(
        self, x: Tensor, y: Tensor, values: Tensor, entries: Listed, positions: Positions, add: bool
    ) -> None:
        """``y`` at every position, or what is added to it: a sparse matrix times a dense one."""

    def weight_gradient(
        self, x: Tensor, d_y: Tensor, entries: Listed, positions: Positions
    ) -> Tensor:
        """[entries]: a product of dense matrices, sampled where there are entries."""

    def whole_gather(
        self, x: Tensor, y: Tensor, packed: Tensor, offset: Tensor, rows: int,
        positions: Positions, add: bool,
    ) -> None:  # fmt: skip
        """As `gather`, by all weights: ``packed`` [rows / rows_at_once, weights, rows_at_once]."""

    def whole_weight_gradient(
        self, x: Tensor, d_y: Tensor, offset: Tensor, rows: int, positions: Positions
    ) -> Tensor:
        """The gradient of ``packed``, flat."""

    def winograd_gather(
        self, x: Map, y: Map, packed: Tensor, padding: tuple[int, int], add: bool
    ) -> None:
        """A 3x3 convolution; packed: [9, rows / rows_at_once, channels, rows_at_once].

        Both rows and channels are rounded up; weights that are not there are zero.
        """

    def winograd_weight_gradient(
        self, x: Map, d_y: Map, size: int, padding: tuple[int, int]
    ) -> Tensor:
        """The gradient of ``packed``, flat, of so many numbers."""

    # between products

    def affine(
        self, y: Map, first: bool, bias: Tensor | None, norm: Norm, residual: Map | None,
        relu: bool, last: int, z: Map,
    ) -> None:  # fmt: skip
        """z = norm(y) + residual, then ReLU if asked for; borders become zero.

        Args:
            first: whether y = ReLU(y + bias) before all that, in place.
            last: images of the last block; the others of it become zero.
        """

    def affine_backward(
        self, d_z: Map, z: Map | None, y: Map, first: bool, norm: Norm, relu: bool, last: int,
        d_y: Map, d_residual: Map | None, d_gamma: Tensor, d_beta: Tensor, d_bias: Tensor,
    ) -> None:  # fmt: skip
        """Fills all from ``d_y`` on; z is None where y tells which ReLUs are open."""

    def max_pool(self, x: Map, kernel: int, stride: int, padding: int, y: Map) -> None:
        """The largest of each window."""

    def max_pool_backward(
        self, d_y: Map, y: Map, x: Map, kernel: int, stride: int, padding: int, d_x: Map
    ) -> None:
        """Of tied pixels the first gets the gradient."""

    # single images: what is prepared reads and writes the same memory at each call

    def plane_gather(
        self, x: Tensor, y: Tensor, values: Tensor, entries: Listed, positions: Positions
    ) -> Call:
        """`gather` over runs of pixels."""

    def split(self, x: Plane, stride: tuple[int, int], y: Plane) -> Call:
        """One plane of y for each phase of the stride of one of x; pixels beyond x are zero."""

    def plane_affine(
        self, y: Plane, first: bool, bias: Tensor | None, norm: Norm, residual: Plane | None,
        relu: bool, z: Plane,
    ) -> Call:  # fmt: skip
        """As `affine`, without statistics of the batch; y stays as it is."""

    def plane_max_pool(self, x: Plane, kernel: int, stride: int, padding: int, y: Plane) -> Call:
        """The largest of each window."""

    def plane_mean(self, x: Plane, y: Plane) -> Call:
        """The mean of each channel."""

    def dot(self, x: Plane, y: Tensor, values: Tensor, entries: Listed) -> Call:
        """A linear layer."""
