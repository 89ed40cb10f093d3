"""A model that, for a while, computes and stores only what its masks allow.

The model itself, dense weights beside their masks, is what everything else in the project knows:
pruning, topology, checkpoints, tables. `SparseForm.enter` takes the weights of its sparse layers
out of it, with the optimizer's state, as vectors of the entries inside the masks; in between, the
form is called in the model's place; `leave` puts everything back. Layers that compute with an
effective weight keep their parameters: as such vectors, and without a mask, if they are entrywise,
else as they are. Nothing is approximated: the numbers are those of the masked model but for the
order in which they are summed.
"""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from startsparse.effective import agree
from startsparse.engine import memory
from startsparse.engine.kernels import kernels_for
from startsparse.engine.layers import Product
from startsparse.engine.lowering import lower
from startsparse.engine.single import SingleImage
from startsparse.masks import SparseLayer, can_be_sparse
from startsparse.sparse_rows import SparseRows

FEW = 4  # images up to which inference is faster one by one


class SparseForm:
    """The sparse form of ``model``, for images of ``shape`` [C, H, W] on a CPU.

    Attributes:
        entered: whether the weights of the layers that compute sparsely are here, and not in the
            model.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int]):
        """Make the form; every layer is dense until `compute_sparsely` names some.

        Raises:
            UnsupportedError: the network has a part without a sparse form.
            NoKernelsError: the kernels are not there and cannot be built.
        """
        self.model = model
        self.program = lower(model, shape)
        kernels_for(next(model.parameters()).dtype)
        weakref.finalize(self, memory.release).atexit = False
        self.entered = False
        self._single: SingleImage | None = None
        self._listed: dict[str, tuple[Tensor | None, int]] = {}  # mask, version that entries are of
        self._outside: dict[str, dict[str, Tensor]] = {}  # layer -> its own tensors, while entered

    @property
    def computes(self) -> frozenset[str]:
        """Names of the layers that compute sparsely; the others are PyTorch's."""
        return frozenset(self.program.sparse)

    @property
    def layers(self) -> dict[str, Product]:
        """The layers that could compute sparsely: with a mask, or an effective weight."""
        products = self.program.products.items()
        return {name: both.sparse for name, both in products if can_be_sparse(both.dense.layer)}

    def compute_sparsely(self, names: Collection[str]) -> None:
        """Let exactly these layers compute sparsely; not while entered."""
        self.program.sparse.clear()
        self.program.sparse.update(names)

    def __call__(self, images: Tensor | SparseRows) -> Tensor:
        """[B, C, H, W] -> logits [B, classes], as the model in the mode that it is in."""
        if isinstance(images, SparseRows):
            images = images.dense[:, :, None, None]
        few = len(images) <= FEW and not torch.is_grad_enabled() and not self.model.training
        if not few or not self.entered:
            self._compute_effective()
            return self.program(images)
        if self._single is None or self._single.is_old():
            with torch.inference_mode(False), torch.no_grad():  # its memory is for every mode
                self._compute_effective()
                fits = SingleImage.fits(self.program)
                self._single = SingleImage(self.program, self.model) if fits else None
        return (self._single or self.program)(images)

    @contextmanager
    def within(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Enter, and leave whatever happens."""
        self.enter(optimizer)
        try:
            yield
        finally:
            self.leave(optimizer)

    @torch.inference_mode(False)  # parameters have to keep count of their changes
    @torch.no_grad()
    def enter(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take weights, and their state in ``optimizer``, out of the model."""
        if self.entered:
            return
        for name, product, layer in self._chosen():
            self._list(name, product, layer)
            if name not in self.program.effective:
                product.values = _take(layer.weight, product.flat, optimizer)
                continue
            if not layer.entrywise:
                continue
            shape, parameters = layer.weight.shape, layer.named_parameters(recurse=False)
            own: dict[str, Tensor] = {kind: p for kind, p in parameters if p.shape == shape}
            for kind, parameter in own.items():
                setattr(layer, kind, _take(parameter, product.flat, optimizer))
            if getattr(layer, "weight_mask", None) is not None:
                own["weight_mask"] = layer.get_buffer("weight_mask")
                layer.register_buffer("weight_mask", None)
            self._outside[name] = own
        self.entered = True

    @torch.no_grad()
    def leave(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put everything back into the model, zero outside the masks."""
        if not self.entered:
            return
        for name, product, layer in self._chosen():
            if name not in self.program.effective:
                _put_back(layer.weight, product.values, product.flat, optimizer)
            for kind, tensor in self._outside.pop(name, {}).items():
                if kind != "weight_mask":
                    _put_back(tensor, getattr(layer, kind), product.flat, optimizer)
                setattr(layer, kind, tensor)
            product.values = nn.Parameter(torch.empty(0))
        for source in self.program.effective.values():
            source.both.dense.effective = None
        self.entered, self._single = False, None

    def _chosen(self) -> Iterator[tuple[str, Product, SparseLayer]]:
        """The layers that compute sparsely: name, product, module."""
        for name, both in self.program.products.items():
            if name in self.program.sparse:
                yield name, both.sparse, both.dense.layer

    def _list(self, name: str, product: Product, layer: SparseLayer) -> None:
        """List the entries of a layer's mask, unless that was done and it has not changed since."""
        mask = getattr(layer, "weight_mask", None)
        now, last = (mask, 0 if mask is None else mask._version), self._listed.get(name)
        if last is None or last[0] is not mask or last[1] != now[1]:
            every = torch.ones(layer.weight.shape, dtype=torch.bool) if mask is None else mask
            product.set_mask(every)
            self._listed[name] = now

    def _compute_effective(self) -> None:
        """What the layers compute with that reparameterise their weight, as of now."""
        if self.program.effective:
            agree(self.model)
        for source in self.program.effective.values():
            source.compute()


def _take(parameter: Tensor, flat: Tensor, optimizer: torch.optim.Optimizer | None) -> nn.Parameter:
    """The entries ``flat`` of a parameter, which is left empty; ``optimizer`` holds them then."""

    def entries(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).index_select(0, flat)

    vector = nn.Parameter(entries(parameter), requires_grad=parameter.requires_grad)
    vector.dense = parameter.shape, parameter.stride()  # type: ignore[attr-defined]  # our own
    if optimizer is not None:
        _exchange(optimizer, parameter, vector, entries)
    parameter.grad = None
    parameter.data = parameter.data.new_empty(0)
    return vector


def _put_back(
    parameter: Tensor, vector: Tensor, flat: Tensor,
    optimizer: torch.optim.Optimizer | None,
) -> None:  # fmt: skip
    """Undo `_take`."""
    (shape, stride), indices = vector.dense, flat.long()  # type: ignore[attr-defined]  # our own

    def dense(entries: Tensor) -> Tensor:
        weight = torch.zeros(shape.numel(), dtype=entries.dtype).scatter_(0, indices, entries)
        weight = weight.view(shape)
        if weight.stride() == stride:
            return weight
        return torch.empty_strided(shape, stride, dtype=entries.dtype).copy_(weight)

    parameter.data = dense(vector)
    if optimizer is not None:
        _exchange(optimizer, vector, parameter, dense)


def _exchange(
    optimizer: torch.optim.Optimizer,
    old: Tensor,
    new: Tensor,
    convert: Callable[[Tensor], Tensor],
) -> None:
    """Let ``optimizer`` hold ``new`` instead of ``old``; state of its shape is converted."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    shape = old.shape
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: convert(value) if torch.is_tensor(value) and value.shape == shape else value
            for key, value in state.items()
        }
