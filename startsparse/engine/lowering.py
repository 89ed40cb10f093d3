"""From a network to its sparse form.

`lower` traces a network and writes it as a list of steps: products (convolutions and linear
layers), each followed by one pass for BatchNorm or bias, addition and ReLU; poolings; and the way
in and out. What it does not know it names, and the network stays dense.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.effective import EffectiveLayer
from startsparse.engine.compaction import CompactedProduct
from startsparse.engine.entries import Window
from startsparse.engine.layers import Affine, MaxPool, MeanPixels, Product
from startsparse.engine.maps import Space
from startsparse.engine.program import DenseProduct, Either, Program, Reparameterised, Step
from startsparse.errors import UserError, reason
from startsparse.masks import sparse_layers
from startsparse.traced import module_name, source_of


class UnsupportedError(UserError):
    """Something in the network has no sparse form; says what."""


@dataclass
class _Pending:
    """A product whose BatchNorm, bias, addition and ReLU are still being collected."""

    value: str
    norm: _BatchNorm | None = None
    bias: Tensor | None = None
    effective: Reparameterised | None = None
    residual: str | None = None
    relu_first: bool = False


def lower(model: nn.Module, shape: tuple[int, int, int]) -> Program:
    """``model`` as a program for images of ``shape`` [C, H, W].

    Raises:
        UnsupportedError: names the first thing that has no sparse form.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a network's own code raises when it is traced
        raise UnsupportedError(f"the network cannot be traced ({reason(error)})") from None
    return _Lowering(model, shape).run(graph)


class _Tracer(fx.Tracer):
    """Takes layers of a kind of their own as a whole, so that they can be named."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.Linear) or super().is_leaf_module(module, name)


class _Lowering:
    def __init__(self, model: nn.Module, shape: tuple[int, int, int]):
        self.model, self.shape = model, shape
        self.layers = sparse_layers(model)
        self.program = Program()
        self.names: dict[fx.Node, str] = {}  # node -> the value it stands for
        self.pending: dict[fx.Node, _Pending] = {}
        self.strides: dict[fx.Node, tuple[str, tuple[int, int]]] = {}  # x[:, :, ::s, ::s]
        self.readers: list[tuple[str, Window, str]] = []  # value read, how, output
        self.means: set[str] = set()  # values without a border

    def run(self, graph: fx.Graph) -> Program:
        for node in graph.nodes:
            kind = node.op if node.op in ("placeholder", "output") else self._kind(node)
            getattr(self, f"_{kind}")(node)
        self._set_borders()
        return self.program

    def _kind(self, node: fx.Node) -> str:
        target = node.target
        if node.op == "call_module":
            module = self.model.get_submodule(module_name(node))
            plain = module.replaced if isinstance(module, EffectiveLayer) else type(module)
            for kind, types in _MODULES.items():
                if plain in types:
                    return kind
            raise UnsupportedError(f"{target}: {type(module).__name__} has no sparse form")
        if target in _FUNCTIONS:
            return _FUNCTIONS[target]
        raise UnsupportedError(f"{getattr(target, '__name__', target)} has no sparse form")

    # the way in and out

    def _placeholder(self, node: fx.Node) -> None:
        users = list(node.users)
        program = self.program
        program.flat = len(users) == 1 and self._kind(users[0]) == "flatten"
        channels, height, width = self.shape
        if program.flat:
            channels, height, width = channels * height * width, 1, 1
        program.start = self._value(node, Space(channels, height, width))

    def _output(self, node: fx.Node) -> None:
        self.program.result = self._ready(source_of(node))

    # products and what follows them

    def _product(self, node: fx.Node) -> None:
        target, source = module_name(node), source_of(node)
        layer = self.layers[target]
        value, extra = self.strides.get(source) or (self._ready(source), (1, 1))
        window = Window()
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
                raise UnsupportedError(f"{target}: groups, dilation or padding mode")
            if not isinstance(layer.padding, tuple):
                raise UnsupportedError(f"{target}: padding {layer.padding!r}")
            if extra != (1, 1) and (layer.kernel_size != (1, 1) or layer.padding != (0, 0)):
                raise UnsupportedError(f"{target}: a slice before a kernel above 1x1")
            stride = _pair(a * b for a, b in zip(layer.stride, extra))
            window = Window(_pair(layer.kernel_size), stride, _pair(layer.padding))
        input = self.program.spaces[value]
        if isinstance(layer, nn.Linear) and (input.height, input.width) != (1, 1):
            raise UnsupportedError(f"{target}: a linear layer on pixels")
        output = window.output(input, layer.weight.shape[0])
        product, effective = Product(window, input, output), None
        if isinstance(layer, EffectiveLayer):
            product = CompactedProduct(window, input, output, layer.zeros_learn)
        dense = DenseProduct(layer, window, input, output)
        both = Either(target, self.program.sparse, product, dense)
        self.program.products[target] = both
        if isinstance(layer, EffectiveLayer):
            effective = self.program.effective[target] = Reparameterised(layer, both)
        name = self._value(node, output)
        self._emit(both, [value], name)
        self.readers.append((value, window, name))
        self.pending[node] = _Pending(name, bias=layer.bias, effective=effective)
        self._finish_unless(node, ("norm", "relu", "add"))

    def _norm(self, node: fx.Node) -> None:
        source = source_of(node)
        norm = self.model.get_submodule(module_name(node))
        assert isinstance(norm, _BatchNorm)
        before = self.pending.get(source)
        late = before and (before.norm or before.residual or before.bias is not None)
        if before and late and not before.relu_first:
            self._finish(source, relu=False)
        waiting = self.pending.pop(source, None) or _Pending(self._ready(source))
        waiting.norm = norm
        self.pending[node] = waiting
        self._finish_unless(node, () if waiting.relu_first else ("relu", "add"))

    def _add(self, node: fx.Node) -> None:
        sources = [a for a in node.args if isinstance(a, fx.Node)]
        if not len(node.args) == len(sources) == 2:
            raise UnsupportedError("an addition of something else than two maps")
        mine = next((a for a in sources if self._waits(a)), None)
        if mine is None:
            raise UnsupportedError("an addition without a product before it")
        residual = self._ready(sources[1] if mine is sources[0] else sources[0])
        waiting = self.pending.pop(mine)
        waiting.residual = residual
        self.pending[node] = waiting
        self._finish_unless(node, ("relu",))

    def _waits(self, node: fx.Node) -> bool:
        return node in self.pending and self.pending[node].residual is None

    def _relu(self, node: fx.Node) -> None:
        source = source_of(node)
        if source not in self.pending:
            raise UnsupportedError("a ReLU without a product before it")
        waiting = self.pending[source]
        if waiting.norm or waiting.residual or not self._leads_to(node, ("norm",)):
            self._finish(source, relu=True, alias=node)
            return
        self.pending[node] = self.pending.pop(source)
        waiting.relu_first = True

    def _finish_unless(self, node: fx.Node, kinds: tuple[str, ...]) -> None:
        """Go on collecting if the only user of ``node`` is one of ``kinds``."""
        if not self._leads_to(node, kinds):
            self._finish(node, relu=False)

    def _leads_to(self, node: fx.Node, kinds: tuple[str, ...]) -> bool:
        users = list(node.users)
        return len(users) == 1 and users[0].op != "output" and self._kind(users[0]) in kinds

    def _finish(self, node: fx.Node, *, relu: bool, alias: fx.Node | None = None) -> None:
        waiting = self.pending.pop(node)
        input = self.program.spaces[waiting.value]
        affine = Affine(waiting.norm, waiting.bias, relu, input, waiting.relu_first)
        if waiting.effective and waiting.bias is not None:
            waiting.effective.affine = affine
        output = Space(input.channels, input.height, input.width)
        name = f"{(alias or node).name}/done"
        self.program.spaces[name] = affine.output = output
        self.names[node] = self.names[alias or node] = name
        inputs = [waiting.value]
        if waiting.residual:
            inputs.append(waiting.residual)
            affine.residual = self.program.spaces[waiting.residual]
        self._emit(affine, inputs, name)

    # pooling, and what changes no number

    def _max_pool(self, node: fx.Node) -> None:
        pool = self.model.get_submodule(module_name(node))
        assert isinstance(pool, nn.MaxPool2d)
        value = self._ready(source_of(node))
        numbers = [_pair(n) for n in (pool.kernel_size, pool.stride, pool.padding)]
        plain = pool.dilation in (1, (1, 1)) and not pool.ceil_mode and not pool.return_indices
        if not plain or any(a != b for a, b in numbers):
            raise UnsupportedError(f"{node.target}: {pool}")
        input, window = self.program.spaces[value], Window(*numbers)
        output = window.output(input, input.channels)
        self._emit(MaxPool(window, input, output), [value], self._value(node, output))

    def _mean(self, node: fx.Node) -> None:
        if node.op == "call_module":
            pool = self.model.get_submodule(module_name(node))
            assert isinstance(pool, nn.AdaptiveAvgPool2d)
            if pool.output_size not in (1, (1, 1)):
                raise UnsupportedError(f"{node.target}: only a global average has a sparse form")
        elif (node.kwargs.get("dim") or node.args[1:2]) not in ((2, 3), ((2, 3),)):
            raise UnsupportedError("a mean over something else than all pixels")
        value = self._ready(source_of(node))
        input = self.program.spaces[value]
        name = self._value(node, Space(input.channels, 1, 1))
        self.means.add(name)
        self._emit(MeanPixels(input), [value], name)

    def _flatten(self, node: fx.Node) -> None:
        value = self._ready(source_of(node))
        space = self.program.spaces[value]
        if (space.height, space.width) != (1, 1):
            raise UnsupportedError("a flatten of pixels")
        self.names[node] = value

    def _same(self, node: fx.Node) -> None:
        self.names[node] = self._ready(source_of(node))

    def _slice(self, node: fx.Node) -> None:
        where: Any = node.args[1]
        every = slice(None, None, None)
        fits = isinstance(where, tuple) and len(where) == 4 and where[:2] == (every, every)
        if not fits or any(s.start or s.stop for s in where[2:]):
            raise UnsupportedError("a slice of something else than every n-th pixel")
        if any(self._kind(user) != "product" for user in node.users):
            raise UnsupportedError("a slice that no product follows")
        self.strides[node] = self._ready(source_of(node)), _pair(s.step or 1 for s in where[2:])

    # names

    def _value(self, node: fx.Node, space: Space) -> str:
        self.names[node] = node.name
        self.program.spaces[node.name] = space
        return node.name

    def _ready(self, node: fx.Node) -> str:
        """The value of ``node``, with all that was pending."""
        if node in self.pending:
            self._finish(node, relu=False)
        return self.names[node]

    def _emit(
        self, run: Either | Affine | MaxPool | MeanPixels, inputs: list[str], output: str
    ) -> None:
        self.program.steps.append(Step(run, inputs, output))

    def _set_borders(self) -> None:
        """Give each map the border that its readers need, forward and backward."""
        spaces = self.program.spaces
        for value, window, result in self.readers:
            input, out = spaces[value], spaces[result]
            input.border = max(input.border, window.border_in(input, out))
            if input.border and value in self.means:
                raise UnsupportedError("a padded convolution after a global average")
            if value != self.program.start:
                out.border = max(out.border, window.border_out(input, out))


def _pair(numbers: int | Iterable[int]) -> tuple[int, int]:
    """A number for each of height and width."""
    if isinstance(numbers, int):
        return numbers, numbers
    height, width = numbers
    return height, width


_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "product": (nn.Conv2d, nn.Linear),
    "norm": (nn.BatchNorm1d, nn.BatchNorm2d),
    "relu": (nn.ReLU,),
    "max_pool": (nn.MaxPool2d,),
    "mean": (nn.AdaptiveAvgPool2d,),
    "flatten": (nn.Flatten,),
    "same": (nn.Identity,),
}

_FUNCTIONS: dict[object, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add_": "add",
    torch.flatten: "flatten",
    "flatten": "flatten",
    "mean": "mean",
    operator.getitem: "slice",
}
