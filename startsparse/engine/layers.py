"""The steps of a network on maps, forward and backward, by the kernels.

A step has ``forward(*maps, images)``, which returns its output and what is saved for its backward,
and ``backward(saved, d_output, into)``, which returns the gradients of its maps and those of its
`parameters`. ``images`` is the number of images; ``into`` has for each map its gradient so far,
from other steps that read it, or None. The step may overwrite ``d_output`` and ``into``. Only the
inside of a gradient counts, but a product's ``d_output`` has a border of zeros: it comes from an
`Affine`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.engine import entries, whole, winograd
from startsparse.engine.entries import Listed, Positions, Window
from startsparse.engine.kernels import kernels_for
from startsparse.engine.maps import Space, lanes
from startsparse.engine.protocol import Norm

Gradients = list[Tensor | None]
Part = Listed | whole.Rows | winograd.Tiled  # a product, or a phase of its input's gradient


def added(gradient: Tensor, so_far: Tensor | None) -> Tensor:
    """The sum of both."""
    return gradient if so_far is None else so_far.add_(gradient)


class Product:
    """A convolution or linear layer that stores and computes only what its mask allows.

    A linear layer is a 1x1 convolution of maps of one pixel. ``values`` is the parameter: the
    weights inside the mask, in the order of ``flat``, their indices in the flattened weight.
    """

    def __init__(self, window: Window, input: Space, output: Space):
        """Compute the map ``output`` from the map ``input``; their borders are wide enough."""
        self.window, self.input, self.output = window, input, output
        self.values: Tensor = nn.Parameter(torch.empty(0))
        # One of both: all weights, or those inside the mask.
        self.whole: whole.Whole | winograd.Winograd | None = None
        self.entries: entries.Entries | None = None
        self.phases = entries.backward_phases(window)
        # Pixels that no tap reaches get no gradient: with a stride above the kernel, say.
        self.skips = any(k < s for k, s in zip(window.kernel, window.stride))
        self._positions: tuple[int, list[Positions]] = (0, [])

    def set_mask(self, mask: Tensor) -> None:
        """List the entries of ``mask``, bool of the weight's shape [out, in, (ky, kx)]."""
        mask = mask.contiguous().view(*mask.shape[:2], *self.window.kernel)
        sizes = self.window, self.input, self.output
        density = int(mask.count_nonzero()) / max(1, mask.numel())
        self.whole = self.entries = None
        if density >= winograd.break_even(*sizes):
            self.whole = winograd.Winograd(mask, *sizes)
        elif density >= whole.break_even(self.output):
            self.whole = whole.Whole(mask, *sizes)
        if self.whole:
            self.flat = self.whole.flat
        else:
            self._list(mask)

    def _list(self, mask: Tensor) -> None:
        self.entries = entries.forward_entries(mask, self.input)
        self.flat = self.entries.flat
        self.transposed = [
            entries.backward_entries(self.entries, mask, self.output, phase)
            for phase in self.phases
        ]

    def lists(self) -> list[Tensor]:
        """All that is stored beside the values: where they are and what they read."""
        positions = [t for pair in self._positions[1] for t in (pair.input, pair.output)]
        of_whole = self.whole.lists() if self.whole else []
        parts = [self.entries, *self.transposed] if self.entries else []
        tensors = [t for part in parts for t in (part.offset, part.first)]
        orders = [part.order for part in parts if part.order is not None]
        return [*positions, self.flat, *of_whole, *tensors, *orders]

    def positions(self, blocks: int) -> list[Positions]:
        """Of the output, and of each phase of the input's gradient."""
        if self._positions[0] != blocks:
            spaces = self.window, self.input, self.output
            positions = [entries.forward_positions(*spaces, blocks)]
            positions += [entries.backward_positions(*spaces, p, blocks) for p in self.phases]
            self._positions = blocks, positions
        return self._positions[1]

    @property
    def parameters(self) -> list[Tensor]:
        """What learns."""
        return [self.values]

    @property
    def _part(self) -> Part:
        part = self.whole.forward if self.whole else self.entries
        assert part is not None  # `set_mask` made one
        return part

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, Any]:  # noqa: ARG002
        """The product; the border of its output is not set."""
        blocks = x.shape[1]
        y, positions = self.output.empty(blocks, x), self.positions(blocks)[0]
        self._part.gather(x, y, self.values.detach(), positions, add=False)
        return y, x

    def backward(
        self, saved: Any, d_y: Tensor, into: Gradients | None
    ) -> tuple[Gradients, Gradients]:
        """``into`` None: the gradient of x is not needed."""
        x, values, d_values = saved, self.values.detach(), None
        if self.values.requires_grad:
            d_values = self._part.weight_gradient(x, d_y, self.positions(x.shape[1])[0])
        if into is None:
            return [None], [d_values]
        parts: Iterable[tuple[Part, Tensor]]
        if self.whole:
            parts = ((part, values) for part in self.whole.backward)
        else:
            parts = ((part, part.own(values)) for part in self.transposed)
        return [self.to_input(d_y, into[0], parts)], [d_values]

    def to_input(
        self, d_y: Tensor, d_x: Tensor | None, parts: Iterable[tuple[Part, Tensor]]
    ) -> Tensor:
        """The gradient of x, added to ``d_x``; ``parts``: of each phase, and their values."""
        blocks, add = d_y.shape[1], d_x is not None
        if d_x is None:
            d_x = self.input.empty(blocks, d_y)
            if self.skips:
                d_x.zero_()
        for (part, values), positions in zip(parts, self.positions(blocks)[1:]):
            part.gather(d_y, d_x, values, positions, add)
        return d_x


class Affine:
    """z = relu(y * scale + shift + residual), where scale and shift are those of a BatchNorm.

    ReLU and residual may be missing, and so may the BatchNorm: then ``shift`` is a bias or zero.
    With ``relu_first``, y is relu(y + bias) instead.
    """

    def __init__(
        self,
        norm: _BatchNorm | None,
        bias: Tensor | None,
        relu: bool,
        space: Space,
        relu_first: bool = False,
    ):
        """The running statistics of ``norm`` are updated here."""
        self.norm, self.bias, self.relu, self.relu_first = norm, bias, relu, relu_first
        self.input, self.output, self.residual = space, space, space

    @property
    def parameters(self) -> list[Tensor | None]:
        """Scale, shift, and bias before the first ReLU; or None."""
        if self.norm is None:
            return [None, self.bias, None]
        return [self.norm.weight, self.norm.bias, self.bias if self.relu_first else None]

    def forward(self, y: Tensor, *rest: Any) -> tuple[Tensor, tuple]:
        """Of y, and a residual if there is one; images that are not there become zero.

        With ``relu_first`` y is overwritten.
        """
        *residual, images = rest
        norm, z = self.norm_for(y, images), self.output.empty(y.shape[1], y)
        other = (self.residual, residual[0]) if residual else None
        kernels_for(y.dtype).affine(
            (self.input, y), *self.first(), norm, other, self.relu, _last(images), (self.output, z)
        )
        result = z if residual and self.relu else None
        return z, (y, result, bool(residual), images, norm)

    def first(self) -> tuple[bool, Tensor | None]:
        """Whether a ReLU comes first, and the bias before it."""
        return self.relu_first, self.bias if self.relu_first else None

    def backward(self, saved: tuple, d_z: Tensor, into: Gradients) -> tuple[Gradients, Gradients]:
        """The gradient of y is always the first: nothing else reads y."""
        y, z, has_residual, images, norm = saved
        d_residual = None
        if has_residual:
            same = self.residual == self.output
            d_residual = d_z if same else self.residual.empty(y.shape[1], y)
        in_place = self.input == self.output and d_residual is not d_z
        d_y = d_z if in_place else self.input.empty(y.shape[1], y)
        learned = y.new_empty(3, self.input.channels).unbind()
        kernels_for(y.dtype).affine_backward(
            (self.output, d_z), None if z is None else (self.output, z), (self.input, y),
            self.relu_first, norm, self.relu, _last(images), (self.input, d_y),
            None if d_residual is None else (self.residual, d_residual), *learned,
        )  # fmt: skip
        gradients: Gradients = [d_y]
        if d_residual is not None:
            gradients.append(added(d_residual, into[1]))
        return gradients, [*learned[:2], learned[2] if self.relu_first else None]

    def norm_for(self, y: Tensor, images: int) -> Norm:
        """For the kernels; counts a batch if the BatchNorm is in training."""
        norm, (gamma, beta, _) = self.norm, self.parameters
        statistics = y.new_empty(2, self.input.channels)
        if norm is None:
            return Norm("plain", statistics, gamma, beta)
        batch = norm.training or norm.running_mean is None
        if batch and images * self.input.height * self.input.width == 1:
            raise ValueError("BatchNorm in training needs more than one value per channel")
        momentum = norm.momentum
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # the plain average over all batches
                momentum = 1 / norm.num_batches_tracked.item()
        uses_running = norm.training or not batch
        running = (norm.running_mean, norm.running_var) if uses_running else (None, None)
        mode = "batch" if batch else "running"
        return Norm(mode, statistics, gamma, beta, *running, momentum or 0.0, norm.eps)


def _last(images: int) -> int:
    """Images of the last block."""
    return (images - 1) % lanes() + 1


class MaxPool:
    """The largest of each window."""

    parameters = ()

    def __init__(self, window: Window, input: Space, output: Space):
        """Compute the map ``output`` from the map ``input``; kernel, stride, padding are square."""
        self.numbers = window.kernel[0], window.stride[0], window.padding[0]
        self.input, self.output = input, output

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # noqa: ARG002
        """x -> the pooled map."""
        y = self.output.empty(x.shape[1], x)
        kernels_for(x.dtype).max_pool((self.input, x), *self.numbers, (self.output, y))
        return y, (x, y)

    def backward(
        self, saved: tuple[Tensor, Tensor], d_y: Tensor, into: Gradients
    ) -> tuple[Gradients, Gradients]:
        """To the first of the largest."""
        x, y = saved
        d_x = torch.empty_like(x)
        maps = (self.output, d_y), (self.output, y), (self.input, x)
        kernels_for(x.dtype).max_pool_backward(*maps, *self.numbers, (self.input, d_x))
        return [added(d_x, into[0])], []


class MeanPixels:
    """The mean of each channel: a map of one pixel without a border."""

    parameters = ()

    def __init__(self, input: Space):
        """Of maps of the space ``input``."""
        self.input = input

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, int]:  # noqa: ARG002
        """x -> its means."""
        return self.input.inside(x).mean(dim=(2, 3), keepdim=True), x.shape[1]

    def backward(self, blocks: int, d_y: Tensor, into: Gradients) -> tuple[Gradients, Gradients]:
        """The same to every pixel."""
        d_x = self.input.empty(blocks, d_y)
        self.input.inside(d_x)[:] = d_y / (self.input.height * self.input.width)
        return [added(d_x, into[0])], []
