"""A network as a list of steps on maps, which `lowering` makes of it."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from startsparse.effective import EffectiveLayer
from startsparse.engine.entries import Window
from startsparse.engine.gradients import gradients
from startsparse.engine.layers import Affine, Gradients, MaxPool, MeanPixels, Product, added
from startsparse.engine.maps import Space, to_images, to_map


class DenseProduct:
    """A convolution or linear layer as PyTorch computes it, between maps.

    Attributes:
        effective: the weight to compute with; None: that of the layer, as it is at each call.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, window: Window, input: Space, output: Space):
        self.layer, self.window, self.input, self.output = layer, window, input, output
        self.effective: Tensor | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """What learns."""
        return [self.layer.weight if self.effective is None else self.effective]

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # noqa: ARG002
        """The product; its border is zero."""
        (weight,) = self.parameters
        if torch.is_inference_mode_enabled():
            return self._compute(x, weight), (x, weight, x)  # no backward will follow
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self._compute(x, weight)
        return y.detach(), (x, weight, y)

    def backward(
        self, saved: tuple[Tensor, Tensor, Tensor], d_y: Tensor, into: Gradients | None
    ) -> tuple[Gradients, Gradients]:
        """``into`` None: the gradient of x is not needed."""
        x, weight, y = saved
        wanted = [t for t, want in ((x, into is not None), (weight, weight.requires_grad)) if want]
        found = list(gradients(y, wanted, d_y)) if wanted else []
        d_x = None if into is None else added(found.pop(0).contiguous(), into[0])
        return [d_x], [found[0] if found else None]

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        inside = self.input.inside(x).permute(1, 4, 2, 3, 0)  # channels_last is the fast layout
        images = inside.reshape(-1, *inside.shape[2:]).permute(0, 3, 1, 2)
        stride = self.window.stride
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        if self.window.kernel == (1, 1) and self.window.padding == (0, 0):
            # As in models.resnet.Projection: oneDNN must not see the stride.
            images, stride = images[:, :, :: stride[0], :: stride[1]], (1, 1)
        y = F.conv2d(images, weight, None, stride, self.window.padding)
        return to_map(y, self.output)


@dataclass
class Either:
    """A layer's product in both forms: sparse if ``name`` is in ``chosen``, which may change."""

    name: str
    chosen: set[str]
    sparse: Product
    dense: DenseProduct

    @property
    def now(self) -> Product | DenseProduct:
        """The form that computes."""
        return self.sparse if self.name in self.chosen else self.dense


@dataclass
class Reparameterised:
    """A layer that computes with an effective weight, and where that goes.

    Its ``effective()`` makes weight and bias anew for each step, by autograd. If it is
    ``entrywise``, the sparse form has given it vectors of the entries of the mask.
    """

    layer: EffectiveLayer
    both: Either
    affine: Affine | None = None  # that adds the bias

    def compute(self) -> None:
        """Effective weight and bias, to be used in the steps."""
        weight, bias = self.layer.effective()
        if self.both.now is self.both.sparse and not self.layer.entrywise:
            weight = weight.reshape(-1).index_select(0, self.both.sparse.flat)
        self.both.sparse.values = self.both.dense.effective = weight
        if self.affine is not None:
            self.affine.bias = bias


@dataclass
class Step:
    """``run.forward(*values named inputs, images)`` makes the value named ``output``."""

    run: Either | Affine | MaxPool | MeanPixels
    inputs: list[str]
    output: str

    @property
    def now(self) -> Any:
        """What runs: see `layers`."""
        return self.run.now if isinstance(self.run, Either) else self.run


@dataclass
class Program:
    """The steps, and what they are made of.

    Attributes:
        products: layer name -> its product in both forms; `sparse` has the names that run sparsely.
        effective: layer name -> what computes its values, where they are not its weight.
        spaces: value -> the space of its map.
        start, result: the values that images come in and logits go out as.
        flat: whether images come in as maps of one pixel.
    """

    flat: bool = False
    steps: list[Step] = field(default_factory=list)
    products: dict[str, Either] = field(default_factory=dict)
    effective: dict[str, Reparameterised] = field(default_factory=dict)
    sparse: set[str] = field(default_factory=set)
    spaces: dict[str, Space] = field(default_factory=dict)
    start: str = ""
    result: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], as the network."""
        parameters = [p for step in self.steps for p in step.now.parameters if p is not None]
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return _Run.apply(self, images, *parameters)
        return self._forward(images, save=False)[0]

    @functools.cached_property
    def _last_use(self) -> dict[str, int]:
        """Value -> the last step that reads it."""
        return {name: i for i, step in enumerate(self.steps) for name in step.inputs}

    def _forward(self, images: Tensor, save: bool) -> tuple[Tensor, list]:
        """Logits; and what each step saved for its backward, and its parameters, if ``save``."""
        if self.flat:
            images = images.flatten(1)[:, :, None, None]
        values, saved = {self.start: to_map(images, self.spaces[self.start])}, []
        count, last_use = len(images), self._last_use
        for i, step in enumerate(self.steps):
            inputs, now = [values[name] for name in step.inputs], step.now
            values[step.output], of_step = now.forward(*inputs, count)
            if save:
                saved.append((of_step, now.parameters))
            for name in step.inputs:
                if last_use[name] == i:
                    values.pop(name, None)
        result = values[self.result]
        return to_images(result, self.spaces[self.result], count).flatten(1), saved

    def _backward(self, saved: list, d_logits: Tensor) -> dict[int, Tensor]:
        """``id`` of a parameter -> its gradient. Uses ``saved`` up."""
        d_result = to_map(d_logits[:, :, None, None], self.spaces[self.result])
        maps: dict[str, Tensor | None] = {self.result: d_result}
        gradients: dict[int, Tensor] = {}
        for step in reversed(self.steps):
            into: Gradients | None = [maps.pop(name, None) for name in step.inputs]
            if step.inputs == [self.start] and isinstance(step.run, Either):
                into = None  # nobody asks for the gradient of the images
            of_step, parameters = saved.pop()
            d_inputs, learned = step.now.backward(of_step, maps.pop(step.output), into)
            maps.update(zip(step.inputs, d_inputs))
            for parameter, gradient in zip(parameters, learned):
                if parameter is not None and gradient is not None:
                    key = id(parameter)  # a tensor's own hash takes longer
                    gradients[key] = added(gradient, gradients.get(key))
        return gradients


class _Run(torch.autograd.Function):
    """A program as one function: autograd between its steps would take longer than small layers."""

    @staticmethod
    def forward(ctx: Any, program: Program, images: Tensor, *parameters: Tensor) -> Tensor:
        logits, ctx.saved = program._forward(images, save=True)
        ctx.program, ctx.parameters = program, parameters
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.program._backward(ctx.saved, d_logits)
        return None, None, *(gradients.get(id(parameter)) for parameter in ctx.parameters)
