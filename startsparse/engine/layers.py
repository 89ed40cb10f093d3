"""The kernels as differentiable functions of maps."""

import ctypes

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from startsparse.engine import entries
from startsparse.engine.build import library
from startsparse.engine.entries import Entries, Positions, Window
from startsparse.engine.maps import LANES, NO_MAP, Space, at

_bool, _int, _double = ctypes.c_bool, ctypes.c_int64, ctypes.c_double


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
        self.phases = entries.backward_phases(window)
        # Pixels that no tap reaches get no gradient: with a stride above the kernel, say.
        self.skips = any(k < s for k, s in zip(window.kernel, window.stride))
        self._places: tuple[int, list[Positions]] = (0, [])

    def set_mask(self, mask: Tensor) -> None:
        """List the entries of ``mask``, bool of the weight's shape [out, in, (ky, kx)]."""
        mask = mask.contiguous().view(*mask.shape[:2], *self.window.kernel)
        self.forward, self.flat = entries.forward_entries(mask, self.given)
        self.backward = [
            entries.backward_entries(self.forward, self.flat, mask, self.made, phase)
            for phase in self.phases
        ]

    def lists(self) -> list[Tensor]:
        """All that is stored beside the values to find their places."""
        parts = [self.forward, *(part for part, _ in self.backward)]
        tensors = [t for part in parts for t in (part.offset, part.first)]
        places = [t for pair in self._places[1] for t in (pair.given, pair.made)]
        return [*tensors, *places, self.flat, *(order for _, order in self.backward)]

    def positions(self, blocks: int) -> list[Positions]:
        """Of the output, and of each phase of the input's gradient."""
        if self._places[0] != blocks:
            spaces = self.window, self.given, self.made
            places = [entries.forward_positions(*spaces, blocks)]
            places += [entries.backward_positions(*spaces, p, blocks) for p in self.phases]
            self._places = blocks, places
        return self._places[1]

    def __call__(self, x: Tensor) -> Tensor:
        """The product; the border of what it makes is not set."""
        return _Product.apply(x, self.values, self)


def _gather(x: Tensor, y: Tensor, values: Tensor, part: Entries, places: Positions) -> None:
    library(x.dtype).gather(at(x), at(y), at(values), part.view(), places.view(part.group))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, layer: Product) -> Tensor:
        y = layer.made.empty(len(x), x)
        _gather(x, y, values, layer.forward, layer.positions(len(x))[0])
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """``d_y`` has a border of zeros."""
        (x, values), layer, d_y = ctx.saved_tensors, ctx.layer, d_y.contiguous()
        kernels, d_x, d_values = library(x.dtype), None, None
        forward, *backward = layer.positions(len(x))
        if ctx.needs_input_grad[1]:
            d_values, part = torch.empty_like(values), layer.forward
            scratch = torch.empty(len(part) * kernels.vector_width(), dtype=x.dtype)
            places = forward.view(part.group)
            kernels.weights(at(x), at(d_y), at(d_values), at(scratch), part.view(), places)
        if ctx.needs_input_grad[0]:
            d_x = layer.given.empty(len(x), x)
            if layer.skips:
                d_x.zero_()
            else:
                kernels.zero_borders(layer.given.view(d_x))
            for (part, order), places in zip(layer.backward, backward):
                _gather(d_y, d_x, values[order], part, places)
        return d_x, d_values, None


class Affine:
    """z = relu(y * scale + shift + residual), where scale and shift are those of a BatchNorm.

    ReLU and residual may be missing, and so may the BatchNorm: then ``shift`` is a bias or zero.
    """

    def __init__(self, norm: nn.Module | None, bias: nn.Parameter | None, relu: bool, space: Space):
        """``norm`` is a BatchNorm, whose running statistics are kept up to date here."""
        self.norm, self.bias, self.relu = norm, bias, relu
        self.given, self.made, self.residual = space, space, space

    def __call__(self, y: Tensor, residual: Tensor | None, images: int) -> Tensor:
        """Of the first ``images`` images; the others of the last block become zero."""
        norm, channels = self.norm, self.given.channels
        one, zero = y.new_ones(channels), y.new_zeros(channels)
        if norm is None:
            beta = zero if self.bias is None else self.bias
            return _Affine.apply(y, residual, one, beta, zero, one, False, images, self)
        gamma = one if norm.weight is None else norm.weight
        beta = zero if norm.bias is None else norm.bias
        batch = norm.training or norm.running_mean is None
        if batch:
            count = images * self.given.height * self.given.width
            if count == 1:
                raise ValueError("BatchNorm in training needs more than one value per channel")
            mean, variance = torch.empty_like(one), torch.empty_like(one)
            library(y.dtype).moments(
                self.given.view(y), _last(images), _double(count), at(mean), at(variance)
            )
            if norm.training and norm.running_mean is not None:
                self._keep(mean, variance * (count / (count - 1)))
        else:
            mean, variance = norm.running_mean, norm.running_var
        inverse = (variance + norm.eps).rsqrt()
        return _Affine.apply(y, residual, gamma, beta, mean, inverse, batch, images, self)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        norm.num_batches_tracked += 1
        share = norm.momentum
        if share is None:  # the plain average over all batches
            share = 1 / norm.num_batches_tracked.item()
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance, share)


def _last(images: int) -> ctypes.c_int64:
    """Images of the last block."""
    return _int((images - 1) % LANES + 1)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        inverse: Tensor,
        batch: bool,
        images: int,
        layer: Affine,
    ) -> Tensor:
        scale = gamma * inverse
        shift = beta - mean * scale
        z = layer.made.empty(len(y), y)
        other = NO_MAP if residual is None else layer.residual.view(residual)
        library(y.dtype).affine(
            layer.given.view(y), at(scale), at(shift), other, _bool(layer.relu), _last(images),
            layer.made.view(z),
        )  # fmt: skip
        with_residual = layer.relu and residual is not None
        ctx.save_for_backward(y, mean, inverse, scale, shift, z if with_residual else None)
        ctx.layer, ctx.batch, ctx.images = layer, batch, images
        ctx.residual = residual is not None
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, inverse, scale, shift, z = ctx.saved_tensors
        layer, images, d_z = ctx.layer, ctx.images, d_z.contiguous()
        d_y, d_residual = layer.given.empty(len(y), y), None
        if ctx.residual:
            d_residual = layer.residual.empty(len(y), y)
        d_gamma, d_beta = torch.empty_like(mean), torch.empty_like(mean)
        count = images * layer.given.height * layer.given.width
        library(y.dtype).affine_backward(
            layer.made.view(d_z), NO_MAP if z is None else layer.made.view(z), layer.given.view(y),
            at(mean), at(inverse), at(scale), at(shift), _bool(layer.relu), _bool(ctx.batch),
            _last(images), _double(count), layer.given.view(d_y),
            layer.residual.view(d_residual) if ctx.residual else NO_MAP, at(d_gamma), at(d_beta),
        )  # fmt: skip
        return d_y, d_residual, d_gamma, d_beta, None, None, None, None, None


class MaxPool:
    """The largest of each window; ``made`` is the space of what it makes."""

    def __init__(self, window: Window, given: Space, made: Space):
        """Compute the map ``made`` from the map ``given``; kernel, stride, padding are square."""
        self.numbers = window.kernel[0], window.stride[0], window.padding[0]
        self.given, self.made = given, made

    def __call__(self, x: Tensor) -> Tensor:
        """x -> the pooled map."""
        return _MaxPool.apply(x, self)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: MaxPool) -> Tensor:
        y = layer.made.empty(len(x), x)
        library(x.dtype).max_pool(
            layer.given.view(x), *map(_int, layer.numbers), layer.made.view(y)
        )
        ctx.save_for_backward(x, y)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor) -> tuple[Tensor, None]:
        (x, y), layer, d_y = ctx.saved_tensors, ctx.layer, d_y.contiguous()
        d_x = torch.empty_like(x)
        library(x.dtype).max_pool_backward(
            layer.made.view(d_y), layer.made.view(y), layer.given.view(x),
            *map(_int, layer.numbers), layer.given.view(d_x),
        )  # fmt: skip
        return d_x, None


def mean_pixels(x: Tensor, space: Space) -> Tensor:
    """The mean of each channel: a map of one pixel without a border."""
    return space.inside(x).mean(dim=(2, 3), keepdim=True)
