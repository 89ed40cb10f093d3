"""The same function from fewer units.

A unit is a channel of a convolution, or an output of a linear layer. It can go if each layer that
reads it has no weight for it, or reads a constant there and can fold the constant into its bias. A
unit without an incoming edge is constant, also after BatchNorm and ReLU. A convolution that pads
cannot fold a constant: at the border it reads zeros instead. In its input only units that are
constantly zero can go; the other constants are merged into one unit that stands for all of them.

Maps that are added share their units: a unit goes only if it can go for all readers of all these
maps. Each layer keeps at least one unit, with zero weights if nothing needs it.
"""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.errors import UserError, reason
from startsparse.masks import SparseLayer, sparse_layers
from startsparse.sparse_rows import symmetric_product
from startsparse.traced import module_name, source_of

_SMALLEST = 0.01  # size of a unit relative to those it stands for; rounding grows by its inverse


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """A network in evaluation mode that computes what ``model`` does there, without dead units.

    Equal within rounding. It is a copy with smaller layers in the same places; layers may have
    gained a bias.

    Args:
        model: of `startsparse.models`: plain layers without masks, zeros in their weights.

    Raises:
        UserError: it is not known what a part of the network does to units; names the first.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a network's own code raises when it is traced
        raise UserError(f"--compact: the network cannot be traced ({reason(error)})") from None
    # From last to first: a unit that goes takes its incoming edges with it.
    while sum(_shrink(model, stream) for stream in reversed(_Analysis(model).run(graph))):
        pass
    return model


def resize(layer: SparseLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Give a convolution or linear layer other parameters, and the sizes of these."""
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    else:
        layer.out_features, layer.in_features = weight.shape


def keep_units(norm: _BatchNorm, remaining: Tensor) -> None:
    """Keep only the units ``remaining``, int64 [k], of a BatchNorm."""
    norm.num_features = len(remaining)
    for name in ("running_mean", "running_var"):
        setattr(norm, name, norm.get_buffer(name)[remaining])
    if norm.affine:
        norm.weight = nn.Parameter(norm.weight[remaining])
        norm.bias = nn.Parameter(norm.bias[remaining])


@dataclass(eq=False)
class _Stream:
    """Units that must go together from all layers that write and read them.

    Attributes:
        writers: names of the layers whose outputs they are, at least one unless ``fixed``.
        norms: names of their BatchNorms.
        readers: names of the layers whose inputs they are, and the constants there: float64
            [units], the value of a unit that is the same for every input and pixel, else NaN.
        fixed: whether they are the input or output of the network.
    """

    writers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    readers: list[tuple[str, Tensor]] = field(default_factory=list)
    fixed: bool = False


class _Analysis:
    """Follows units through a traced network."""

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, sparse_layers(model)
        self.streams: list[_Stream] = []
        self.values: dict[fx.Node, tuple[_Stream, Tensor]] = {}  # node -> units, constants

    def run(self, graph: fx.Graph) -> list[_Stream]:
        """The streams, in the order in which they begin."""
        for node in graph.nodes:
            getattr(self, f"_{self._kind(node)}")(node)
        return self.streams

    def _kind(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr", "output"):
            return node.op
        target = node.target
        if node.op == "call_module":
            module = self.model.get_submodule(module_name(node))
            name = type(module).__name__
            kind = next((kind for kind, types in _MODULES.items() if type(module) in types), None)
        else:
            name, kind = getattr(target, "__name__", str(target)), _FUNCTIONS.get(target)
        if kind is None:
            raise UserError(f"--compact: it is not known what {name} ({node}) does to units")
        return kind

    def _placeholder(self, node: fx.Node) -> None:
        self._begin(node, _Stream(fixed=True), torch.tensor([torch.nan], dtype=torch.float64))

    def _get_attr(self, node: fx.Node) -> None:
        """A constant of the network: no units."""

    def _output(self, node: fx.Node) -> None:
        self.values[source_of(node)][0].fixed = True

    def _product(self, node: fx.Node) -> None:
        name = module_name(node)
        layer = self.layers[name]
        if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros"):
            raise UserError(f"--compact: {name}: groups or padding other than with zeros")
        stream, constants = self.values[source_of(node)]
        inputs = layer.weight.shape[1]
        if len(constants) not in (1, inputs):
            raise UserError(f"--compact: {name}: {len(constants)} maps, {inputs} inputs")
        constants = constants.expand(inputs)
        stream.readers.append((name, constants))
        self._begin(node, _Stream(writers=[name]), _output_constants(layer, constants))

    def _norm(self, node: fx.Node) -> None:
        name = module_name(node)
        norm = self.model.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            raise UserError(f"--compact: {name}: BatchNorm without running statistics")
        stream, constants = self.values[source_of(node)]
        stream.norms.append(name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(scale)
        if norm.affine:
            scale, shift = scale * norm.weight.double(), norm.bias.double()
        constants = (constants - norm.running_mean.double()) * scale + shift
        self.values[node] = stream, torch.where(scale == 0, shift, constants)

    def _relu(self, node: fx.Node) -> None:
        stream, constants = self.values[source_of(node)]
        self.values[node] = stream, constants.relu()

    def _add(self, node: fx.Node) -> None:
        if len(node.args) != 2 or any(arg not in self.values for arg in node.args):
            raise UserError(f"--compact: {node}: an addition of something other than two maps")
        (one, constants), (other, others) = (self.values[source_of(node, i)] for i in (0, 1))
        if one is not other:
            for name in ("writers", "norms", "readers"):
                getattr(one, name).extend(getattr(other, name))
            one.fixed |= other.fixed
            self.streams.remove(other)
            for key, (stream, value) in self.values.items():
                if stream is other:
                    self.values[key] = one, value
        self.values[node] = one, constants + others

    def _graph_product(self, node: fx.Node) -> None:
        """A sum over nodes keeps zeros, and no other constants."""
        stream, constants = self.values[source_of(node)]
        self.values[node] = stream, torch.where(constants == 0, constants, torch.nan)

    def _flatten(self, node: fx.Node) -> None:
        first = node.args[1:2] or (0,)
        if node.op != "call_module" and first != (1,):
            raise UserError(f"--compact: {node}: a flatten that does not begin at 1")
        self._same(node)

    def _mean(self, node: fx.Node) -> None:
        where = node.kwargs.get("dim") or (node.args[1] if len(node.args) > 1 else None)
        if where not in ((2, 3), [2, 3]):
            raise UserError(f"--compact: {node}: a mean over something other than all pixels")
        self._same(node)

    def _slice(self, node: fx.Node) -> None:
        where, every = node.args[1], slice(None, None, None)
        if not isinstance(where, tuple) or where[:2] != (every, every):
            raise UserError(f"--compact: {node}: a slice of something other than pixels")
        self._same(node)

    def _same(self, node: fx.Node) -> None:
        self.values[node] = self.values[source_of(node)]

    def _begin(self, node: fx.Node, stream: _Stream, constants: Tensor) -> None:
        self.streams.append(stream)
        self.values[node] = stream, constants


def _edges(layer: SparseLayer) -> Tensor:
    """Bool [out, in]: whether an output has a weight for an input."""
    return layer.weight.ne(0).reshape(*layer.weight.shape[:2], -1).any(2)


def _sums(weight: Tensor) -> Tensor:
    """[out, in] of [out, in, *kernel]: what an input of constantly 1 adds, without padding."""
    return weight.reshape(*weight.shape[:2], -1).sum(2)


def _pads(layer: SparseLayer) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid")


def _foldable(layer: SparseLayer, constants: Tensor) -> Tensor:
    """Bool [in]: which inputs of ``layer`` are constants that can be folded into its bias."""
    return constants == 0 if _pads(layer) else constants.isfinite()


def _output_constants(layer: SparseLayer, constants: Tensor) -> Tensor:
    """The constants in the outputs of ``layer``, float64 [out], by those in its inputs."""
    foldable = _foldable(layer, constants)
    outputs = _sums(layer.weight.double()) @ torch.where(foldable, constants, 0)
    if layer.bias is not None:
        outputs += layer.bias.double()
    return torch.where(_edges(layer)[:, ~foldable].any(1), torch.nan, outputs)


def _shrink(model: nn.Module, stream: _Stream) -> bool:
    """Remove the units that can go; whether anything changed."""
    if stream.fixed:
        return False
    layers = sparse_layers(model)
    gone, stands_in = _dead(layers, stream)
    names = [*stream.writers, *(name for name, _ in stream.readers)]
    if not gone.any() or (len(gone) == 1 and not any(_edges(layers[n]).any() for n in names)):
        return False
    remaining = (~gone).nonzero().squeeze(1)
    if not len(remaining):
        remaining = torch.zeros(1, dtype=torch.long)  # one has to stay; it has no edges from now on
    for name, constants in stream.readers:
        _shrink_reader(layers[name], constants, gone, remaining, stands_in)
    for name in stream.writers:
        _shrink_writer(layers[name], gone, remaining)
    for name in stream.norms:
        norm = model.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        keep_units(norm, remaining)
    return True


def _dead(layers: dict[str, SparseLayer], stream: _Stream) -> tuple[Tensor, int | None]:
    """Which units can go, bool [units]; the constant unit, if any, that stands for others."""
    count = len(layers[stream.writers[0]].weight)
    free, constant = torch.ones(2, count, dtype=torch.bool)
    size = torch.ones(count, dtype=torch.float64)  # relative to the largest constant merged
    for name, constants in stream.readers:
        layer = layers[name]
        read, foldable = _edges(layer).any(0), _foldable(layer, constants)
        free &= ~read | foldable
        constant &= ~read | constants.isfinite()
    merged = constant & ~free
    for name, constants in stream.readers:
        layer = layers[name]
        if (merged & _edges(layer).any(0) & ~_foldable(layer, constants)).any():
            sizes = torch.where(merged & constants.isfinite(), constants.abs(), 0)
            size = size.minimum(sizes / sizes.max())
    size = torch.where(merged, size, 0)
    if merged.sum() < 2 or size.max() < _SMALLEST:
        return free, None
    stands_in = int(size.argmax())
    merged[stands_in] = False
    return free | merged, stands_in


def _shrink_reader(
    layer: SparseLayer, constants: Tensor, gone: Tensor, remaining: Tensor, stands_in: int | None
) -> None:
    """Keep the inputs ``remaining`` of ``layer``; the bias or a unit stands in for the others."""
    weight = layer.weight.double()
    lost = torch.where(gone & _edges(layer).any(0), constants, 0)
    bias = layer.bias
    if lost.any() and _pads(layer):
        ratio = lost / constants[stands_in]
        weight[:, stands_in] += (weight * ratio[:, None, None]).sum(1)
    elif lost.any():
        bias = (0 if bias is None else bias.double()) + _sums(weight) @ lost
    weight[:, gone] = 0
    dtype = layer.weight.dtype
    resize(layer, weight[:, remaining].to(dtype), None if bias is None else bias.to(dtype))


def _shrink_writer(layer: SparseLayer, gone: Tensor, remaining: Tensor) -> None:
    """Keep the outputs ``remaining`` of ``layer``; one that is gone but has to stay becomes 0."""
    live = ~gone[remaining]
    weight = layer.weight[remaining] * live.view(-1, *[1] * (layer.weight.dim() - 1))
    resize(layer, weight, None if layer.bias is None else layer.bias[remaining] * live)


_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "product": (nn.Conv2d, nn.Linear),
    "norm": (nn.BatchNorm1d, nn.BatchNorm2d),
    "relu": (nn.ReLU,),
    "flatten": (nn.Flatten,),
    "same": (nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
}

_FUNCTIONS: dict[str | Callable, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((torch.flatten, "flatten"), "flatten"),
    **dict.fromkeys((torch.mean, "mean"), "mean"),
    operator.getitem: "slice",
    symmetric_product: "graph_product",
    **dict.fromkeys((F.dropout, "to"), "same"),
}
