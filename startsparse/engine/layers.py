"""The steps of a network on maps, forward and backward, by the kernels.

A step has ``forward(*maps, images)``, which returns what it makes and what its backward needs, and
``backward(kept, d_made, into)``, which returns the gradients of its maps and those of its
`parameters`. ``images`` is the number of images; ``into`` has for each map its gradient so far,
from other steps that read it, or None. ``d_made`` and ``into`` are the step's to overwrite. Only
the inside of a gradient counts, but a product's ``d_made`` has a border of zeros: it comes from an
`Affine`.
"""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from startsparse.engine import entries, whole, winograd
from startsparse.engine.build import library
from startsparse.engine.entries import Listed, Positions, Window
from startsparse.engine.maps import LANES, NO_MAP, Space, at

_bool, _int = ctypes.c_bool, ctypes.c_int64

Gradients = list[Tensor | None]
Part = Listed | whole.Rows | winograd.Tiled  # a product, or a phase of its input's gradient


def added(gradient: Tensor, so_far: Tensor | None) -> Tensor:
    """The sum of both."""
    return gradient if so_far is None else so_far.add_(gradient)


class Product:
    """A convolution or linear layer that stores and computes only what its mask allows.

    A linear layer is a 1x1 convolution of maps of one pixel. ``values`` is the parameter: the
    weights inside the mask, in the order of ``flat``, their places in the flattened
    weight.
    """

    def __init__(self, window: Window, given: Space, made: Space):
        """Compute the map ``made`` from the map ``given``, whose borders are wide enough."""
        self.window, self.given, self.made = window, given, made
        self.values = nn.Parameter(torch.empty(0))
        self.whole: whole.Whole | winograd.Winograd | None = None  # or else
        self.entries: entries.Entries | None = None
        self.phases = entries.backward_phases(window)
        # Pixels that no tap reaches get no gradient: with a stride above the kernel, say.
        self.skips = any(k < s for k, s in zip(window.kernel, window.stride))
        self._places: tuple[int, list[Positions]] = (0, [])

    def set_mask(self, mask: Tensor) -> None:
        """List the entries of ``mask``, bool of the weight's shape [out, in, (ky, kx)]."""
        mask = mask.contiguous().view(*mask.shape[:2], *self.window.kernel)
        sizes = self.window, self.given, self.made
        density = int(mask.count_nonzero()) / max(1, mask.numel())
        self.whole = self.entries = None
        if density >= winograd.worth(*sizes):
            self.whole = winograd.Winograd(mask, *sizes)
        elif density >= whole.worth(self.made):
            self.whole = whole.Whole(mask, *sizes)
        if self.whole:
            self.flat = self.whole.flat
        else:
            self._list(mask)

    def _list(self, mask: Tensor) -> None:
        self.entries = entries.forward_entries(mask, self.given)
        self.flat = self.entries.flat
        self.transposed = [
            entries.backward_entries(self.entries, mask, self.made, phase) for phase in self.phases
        ]

    def lists(self) -> list[Tensor]:
        """All that is stored beside the values to find their places."""
        places = [t for pair in self._places[1] for t in (pair.given, pair.made)]
        of_whole = self.whole.lists() if self.whole else []
        parts = [self.entries, *self.transposed] if self.entries else []
        tensors = [t for part in parts for t in (part.offset, part.first)]
        orders = [part.order for part in parts if part.order is not None]
        return [*places, self.flat, *of_whole, *tensors, *orders]

    def positions(self, blocks: int) -> list[Positions]:
        """Of the output, and of each phase of the input's gradient."""
        if self._places[0] != blocks:
            spaces = self.window, self.given, self.made
            places = [entries.forward_positions(*spaces, blocks)]
            places += [entries.backward_positions(*spaces, p, blocks) for p in self.phases]
            self._places = blocks, places
        return self._places[1]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What learns."""
        return [self.values]

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The product; the border of what it makes is not set."""
        blocks = x.shape[1]
        y, places = self.made.empty(blocks, x), self.positions(blocks)[0]
        part = self.whole.forward if self.whole else self.entries
        part.gather(x, y, self.values.detach(), places, add=False)
        return y, x

    def backward(
        self, x: Tensor, d_y: Tensor, into: Gradients | None
    ) -> tuple[Gradients, Gradients]:
        """``into`` None: the gradient of x is not needed."""
        values, d_values = self.values.detach(), None
        if self.values.requires_grad:
            part = self.whole.forward if self.whole else self.entries
            d_values = part.weights(x, d_y, self.positions(x.shape[1])[0])
        if into is None:
            return [None], [d_values]
        if self.whole:
            parts = ((part, values) for part in self.whole.backward)
        else:
            parts = ((part, values.index_select(0, part.order)) for part in self.transposed)
        return [self.to_input(d_y, into[0], parts)], [d_values]

    def to_input(
        self, d_y: Tensor, d_x: Tensor | None, parts: Iterable[tuple[Part, Tensor]]
    ) -> Tensor:
        """The gradient of x, added to ``d_x``; ``parts``: of each phase, and their values."""
        blocks, add = d_y.shape[1], d_x is not None
        if not add:
            d_x = self.given.empty(blocks, d_y)
            if self.skips:
                d_x.zero_()
        for (part, values), places in zip(parts, self.positions(blocks)[1:]):
            part.gather(d_y, d_x, values, places, add)
        return d_x


class CNorm(ctypes.Structure):
    """`Norm` of layers.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "mean", "variance")),
        *((name, ctypes.c_double) for name in ("momentum", "epsilon")),
        ("mode", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("batch_mean", "inverse")),
    ]


_PLAIN, _RUNNING, _BATCH = range(3)  # `Mode` of layers.cpp


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Affine:
    """z = relu(y * scale + shift + residual), where scale and shift are those of a BatchNorm.

    ReLU and residual may be missing, and so may the BatchNorm: then ``shift`` is a bias or zero.
    With ``relu_first``, relu(y + bias) takes the place of y.
    """

    def __init__(
        self,
        norm: nn.Module | None,
        bias: nn.Parameter | None,
        relu: bool,
        space: Space,
        relu_first: bool = False,
    ):
        """``norm`` is a BatchNorm, whose running statistics are kept up to date here."""
        self.norm, self.bias, self.relu, self.relu_first = norm, bias, relu, relu_first
        self.given, self.made, self.residual = space, space, space

    @property
    def parameters(self) -> list[nn.Parameter | None]:
        """Scale, shift, and bias before the first ReLU; or None."""
        if self.norm is None:
            return [None, self.bias, None]
        return [self.norm.weight, self.norm.bias, self.bias if self.relu_first else None]

    def forward(self, y: Tensor, *rest: Tensor | int) -> tuple[Tensor, tuple]:
        """Of y, and a residual if there is one; images that are not there become zero.

        With ``relu_first`` y is overwritten.
        """
        *residual, images = rest
        norm, statistics = self.norm_for(y, images)
        z = self.made.empty(y.shape[1], y)
        other = self.residual.view(residual[0]) if residual else NO_MAP
        library(y.dtype).affine(
            *(self.given.view(y), *self.first(), norm, other, _bool(self.relu), _last(images)),
            self.made.view(z),
        )
        result = z if residual and self.relu else None
        return z, (y, result, bool(residual), images, norm, statistics)

    def first(self) -> tuple[ctypes.c_bool, ctypes.c_void_p]:
        """Whether a ReLU comes first, and the bias before it, for the kernels."""
        bias = self.bias if self.relu_first else None
        return _bool(self.relu_first), ctypes.c_void_p(_pointer(bias))

    def backward(self, kept: tuple, d_z: Tensor, into: Gradients) -> tuple[Gradients, Gradients]:
        """The gradient of y is always the first: nothing else reads y."""
        y, z, has_residual, images, norm, _statistics = kept
        d_residual = None
        if has_residual:
            same = self.residual == self.made
            d_residual = d_z if same else self.residual.empty(y.shape[1], y)
        in_place = self.given == self.made and d_residual is not d_z
        d_y = d_z if in_place else self.given.empty(y.shape[1], y)
        learned = y.new_empty(3, self.given.channels).unbind()
        library(y.dtype).affine_backward(
            self.made.view(d_z), NO_MAP if z is None else self.made.view(z), self.given.view(y),
            _bool(self.relu_first), norm, _bool(self.relu), _last(images), self.given.view(d_y),
            self.residual.view(d_residual) if has_residual else NO_MAP, *map(at, learned),
        )  # fmt: skip
        gradients = [d_y]
        if has_residual:
            gradients.append(added(d_residual, into[1]))
        return gradients, [*learned[:2], learned[2] if self.relu_first else None]

    def norm_for(self, y: Tensor, images: int) -> tuple[CNorm, Tensor]:
        """For the kernels; and the memory that it points to: mean and inverse deviation."""
        norm, channels = self.norm, self.given.channels
        statistics = y.new_empty(2 * channels)
        mean = statistics.data_ptr()
        own = mean, mean + channels * y.element_size()
        pointers = [_pointer(parameter) for parameter in self.parameters[:2]]
        if norm is None:
            return CNorm(*pointers, None, None, 0.0, 0.0, _PLAIN, *own), statistics
        batch = norm.training or norm.running_mean is None
        if batch and images * self.given.height * self.given.width == 1:
            raise ValueError("BatchNorm in training needs more than one value per channel")
        share = norm.momentum
        if norm.training and norm.running_mean is not None:
            norm.num_batches_tracked.add_(1)
            if share is None:  # the plain average over all batches
                share = 1 / norm.num_batches_tracked.item()
        keep = norm.training or not batch
        pointers += [_pointer(t) if keep else None for t in (norm.running_mean, norm.running_var)]
        mode = _BATCH if batch else _RUNNING
        return CNorm(*pointers, share or 0.0, norm.eps, mode, *own), statistics


def _last(images: int) -> ctypes.c_int64:
    """Images of the last block."""
    return _int((images - 1) % LANES + 1)


class MaxPool:
    """The largest of each window; ``made`` is the space of what it makes."""

    parameters = ()

    def __init__(self, window: Window, given: Space, made: Space):
        """Compute the map ``made`` from the map ``given``; kernel, stride, padding are square."""
        self.numbers = [_int(n[0]) for n in (window.kernel, window.stride, window.padding)]
        self.given, self.made = given, made

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # noqa: ARG002
        """x -> the pooled map."""
        y = self.made.empty(x.shape[1], x)
        library(x.dtype).max_pool(self.given.view(x), *self.numbers, self.made.view(y))
        return y, (x, y)

    def backward(
        self, kept: tuple[Tensor, Tensor], d_y: Tensor, into: Gradients
    ) -> tuple[Gradients, Gradients]:
        """To the first of the largest."""
        x, y = kept
        d_x = torch.empty_like(x)
        library(x.dtype).max_pool_backward(
            self.made.view(d_y), self.made.view(y), self.given.view(x), *self.numbers,
            self.given.view(d_x),
        )  # fmt: skip
        return [added(d_x, into[0])], []


class MeanPixels:
    """The mean of each channel: a map of one pixel without a border."""

    parameters = ()

    def __init__(self, given: Space):
        """Of maps of the space ``given``."""
        self.given = given

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, int]:  # noqa: ARG002
        """x -> its means."""
        return self.given.inside(x).mean(dim=(2, 3), keepdim=True), x.shape[1]

    def backward(self, blocks: int, d_y: Tensor, into: Gradients) -> tuple[Gradients, Gradients]:
        """The same to every pixel."""
        d_x = self.given.empty(blocks, d_y)
        self.given.inside(d_x)[:] = d_y / (self.given.height * self.given.width)
        return [added(d_x, into[0])], []
