"""Inference of one image at a time, for batches too small to fill blocks of 16 images.

The same steps on maps [C, H + 2 border, W + 2 border] of one image; `planes.cpp` says how. All
memory is there before the first image, so that an image is a list of prepared calls and no more.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from startsparse.engine.entries import Entries, Positions, Window, forward_entries
from startsparse.engine.kernels import kernels_for
from startsparse.engine.layers import Affine, MaxPool, MeanPixels
from startsparse.engine.maps import Space, lanes
from startsparse.engine.program import Either, Program
from startsparse.engine.protocol import Call, Plane


class _Plane:
    """The map of one image, zeros at first; ``line`` and ``channel`` are strides."""

    def __init__(self, space: Space, line: int, channel: int, dtype: torch.dtype, beyond: int = 0):
        """``beyond``: numbers after the last channel that a kernel may read."""
        self.space, self.line, self.channel = space, line, channel
        self.memory = torch.zeros(space.channels * channel + beyond, dtype=dtype)
        self.first = space.border * line + space.border  # pixel (0, 0)

    @property
    def inside(self) -> Tensor:
        """View [C, H, W], without the border."""
        shape = self.space.channels, self.space.height, self.space.width
        return self.memory.as_strided(shape, (self.channel, self.line, 1), self.first)

    def view(self, up: int = 0, left: int = 0) -> Plane:
        """For the kernels; with ``up`` or ``left``, from so many pixels before the first to the
        end of the border.
        """
        space, start = self.space, self.first - up * self.line - left
        more = space.border if up or left else 0
        sizes = space.height + up + more, space.width + left + more
        return Plane(self.memory[start:], space.channels, *sizes, self.channel, self.line)


class _Copy:
    """Some of a parameter's values in another order, as they are at each `refresh`."""

    def __init__(self, source: Tensor, flat: Tensor):
        self.source, self.flat = source, flat
        self.values = torch.empty(len(flat), dtype=source.dtype)
        self._version = -1

    def refresh(self) -> None:
        if self.source._version != self._version:
            weight = self.source.detach().reshape(-1)
            torch.index_select(weight, 0, self.flat, out=self.values)
            self._version = self.source._version


class SingleImage:
    """The network of a program, in evaluation, for one image at a time."""

    def __init__(self, program: Program, model: nn.Module):
        """Read parameters, masks and running statistics where they are at this moment."""
        self.program = program
        self.dtype = next(model.parameters()).dtype
        self.kernels = kernels_for(self.dtype)
        self._calls: list[Call] = []
        self._held: list[object] = []  # what they point to
        self._copies: list[_Copy] = []
        self._sources = [p for s in program.effective.values() for p in s.layer.parameters()]
        self._versions = [parameter._version for parameter in self._sources]
        self._planes = {program.start: self._padded(program.start)}
        prepare: dict[type, Callable[[Any, list[str], str], _Plane]] = {
            Either: self._product,
            Affine: self._affine,
            MaxPool: self._max_pool,
            MeanPixels: self._mean,
        }
        for step in program.steps:
            plane = prepare[type(step.run)](step.run, step.inputs, step.output)
            self._planes[step.output] = plane

    @staticmethod
    def fits(program: Program) -> bool:
        """Whether every BatchNorm has running statistics."""
        affine = [step.run for step in program.steps if isinstance(step.run, Affine)]
        return all(a.norm is None or a.norm.running_mean is not None for a in affine)

    def is_old(self) -> bool:
        """Whether effective weights may have changed: they are read once, the others each time."""
        return [parameter._version for parameter in self._sources] != self._versions

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        for copy in self._copies:
            copy.refresh()
        if self.program.flat:
            images = images.flatten(1)[:, :, None, None]
        input, output = self._planes[self.program.start], self._planes[self.program.result]
        logits = images.new_empty(len(images), output.space.channels)
        pixels, result = input.inside, output.inside[:, 0, 0]
        for image, row in zip(images, logits):
            pixels.copy_(image)
            for call in self._calls:
                call()
            row.copy_(result)
        return logits

    def _padded(self, name: str) -> _Plane:
        """A map with its border, where a product may read."""
        space = self.program.spaces[name]
        # A run of positions may end a tile late, and then reads up to a kernel further.
        beyond = (space.border * 2 + 1) * (space.row + 1) + 2 * _run()
        return _Plane(space, space.row, space.plane, self.dtype, beyond)

    def _product(self, both: Either, inputs: list[str], _output: str) -> _Plane:
        x, layer = self._planes[inputs[0]], both.sparse
        window, output = layer.window, replace(layer.output, border=0)
        if (output.height, output.width, *window.kernel) == (1, 1, 1, 1):
            return self._linear(both, x, output)
        listed, values = self._listed(both)
        start, line, stride = self._split(x, window, output)
        down, right = (torch.arange(k) for k in window.kernel)
        (sy, sx), phase = window.stride, stride // math.prod(window.stride)
        taps = (down % sy * sx)[:, None] + right % sx
        taps = taps * phase + (down // sy * line)[:, None] + right // sx
        entries = _with_taps(listed, taps.flatten())
        count = -(-output.height * line // lanes())
        y = _Plane(output, line, lanes() * count, self.dtype)
        runs = lanes() * torch.arange(count)
        positions = Positions(runs, runs, stride, y.channel)
        listed = entries.for_stride(stride)
        self._calls.append(self.kernels.plane_gather(start, y.memory, values, listed, positions))
        self._held += [entries, values, positions]
        return y

    def _linear(self, both: Either, x: _Plane, output: Space) -> _Plane:
        layer, (listed, values) = both.sparse, self._listed(both, blocked=False)
        y, first = _Plane(output, 1, 1, self.dtype), x.view(*layer.window.padding)
        entries = _with_taps(listed, torch.zeros(1, dtype=torch.int64))
        listed = entries.for_stride(x.channel)
        self._calls.append(self.kernels.dot(first, y.memory, values, listed))
        self._held += [entries, values]
        return y

    def _listed(self, both: Either, blocked: bool = True) -> tuple[Entries, Tensor]:
        """The entries of a layer and their values."""
        product, layer = both.sparse, both.dense.layer
        sparse, effective = both.name in self.program.sparse, both.dense.effective
        shape = product.output.channels, product.input.channels, *product.window.kernel
        if effective is not None:
            weight = effective.detach().reshape(-1)
            if sparse:
                flat = product.flat.long()
                weight = weight.new_zeros(math.prod(shape)).scatter_(0, flat, weight)
            listed = forward_entries((weight != 0).view(shape), product.input, blocked)
            return listed, weight[listed.flat]
        if sparse and blocked and product.entries:
            return product.entries, product.values.detach()
        mask = getattr(layer, "weight_mask", None)
        mask = torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask
        listed = forward_entries(mask.contiguous().view(shape), product.input, blocked)
        if sparse:
            flat, order = product.flat.sort()
            copy = _Copy(product.values, order[torch.searchsorted(flat, listed.flat)])
        else:
            copy = _Copy(layer.weight, listed.flat)
        self._copies.append(copy)
        return listed, copy.values

    def _split(self, x: _Plane, window: Window, output: Space) -> tuple[Tensor, int, int]:
        """The map from the first tap of the first position on; strides of lines and channels."""
        view = x.view(*window.padding)
        if window.stride == (1, 1):
            return view.data, x.line, x.channel
        (sy, sx), (ky, kx) = window.stride, window.kernel
        height, width = output.height + (ky - 1) // sy, output.width + (kx - 1) // sx
        phases = Space(x.space.channels * sy * sx, height, width)
        y = _Plane(phases, width, height * width, self.dtype, (ky + 1) * width + 2 * _run())
        self._calls.append(self.kernels.split(view, window.stride, y.view()))
        self._held.append(y)
        return y.memory, y.line, y.channel * sy * sx

    def _affine(self, affine: Affine, inputs: list[str], output: str) -> _Plane:
        y, *residual = (self._planes[name] for name in inputs)
        z = self._padded(output)
        norm = affine.norm_for(y.memory, 1)
        other = residual[0].view() if residual else None
        how = *affine.first(), norm, other, affine.relu
        self._calls.append(self.kernels.plane_affine(y.view(), *how, z.view()))
        self._held += [norm, affine.bias]
        return z

    def _max_pool(self, pool: MaxPool, inputs: list[str], output: str) -> _Plane:
        y = self._padded(output)
        x = self._planes[inputs[0]].view()
        self._calls.append(self.kernels.plane_max_pool(x, *pool.numbers, y.view()))
        return y

    def _mean(self, _mean: MeanPixels, inputs: list[str], output: str) -> _Plane:
        y = self._padded(output)
        self._calls.append(self.kernels.plane_mean(self._planes[inputs[0]].view(), y.view()))
        return y


def _run() -> int:
    """Pixels that a kernel does at a time."""
    return kernels_for(torch.float32).sums * lanes()


def _with_taps(listed: Entries, taps: Tensor) -> Entries:
    """The same entries for a map whose taps lie elsewhere."""
    channels = listed.modulus
    return Entries(listed.first, listed.rows, listed.flat, None, taps, len(taps), channels)
