"""A model that, for a while, computes and stores only what its masks allow.

The model itself, dense weights beside their masks, is what everything else in the project knows:
pruning, topology, checkpoints, tables. `SparseForm.enter` takes the weights of its sparse layers
out of it, with the optimizer's state, as vectors of the entries inside the masks; in between, the
form is called in the model's place; `leave` puts everything back. Nothing is approximated: the
numbers are those of the masked model but for the order in which they are summed.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from startsparse.engine.build import library
from startsparse.engine.layers import Product
from startsparse.engine.lowering import lower
from startsparse.engine.single import SingleImage
from startsparse.masks import masked_weights

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
            NoCompilerError: the kernels are not there and cannot be built.
        """
        self.model = model
        self.program = lower(model, shape)
        library(next(model.parameters()).dtype)
        self.entered = False
        self._single: SingleImage | None = None
        self._listed: dict[str, tuple[Tensor, int]] = {}  # mask and version that entries are of

    @property
    def computes(self) -> frozenset[str]:
        """Names of the layers that compute sparsely; the others are PyTorch's."""
        return frozenset(self.program.sparse)

    @property
    def layers(self) -> dict[str, Product]:
        """The layers that could compute sparsely, because they have a mask."""
        masked = {name for name, _, _ in masked_weights(self.model)}
        return {n: both.sparse for n, both in self.program.products.items() if n in masked}

    def compute_sparsely(self, names: Collection[str]) -> None:
        """Let exactly these layers compute sparsely; not while entered."""
        self.program.sparse.clear()
        self.program.sparse.update(names)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes], as the model in the mode that it is in."""
        few = len(images) <= FEW and not torch.is_grad_enabled() and not self.model.training
        if not few or not self.entered:
            return self.program(images)
        if self._single is None and SingleImage.fits(self.program):
            with torch.inference_mode(False):  # else its memory is for that mode alone
                self._single = SingleImage(self.program, self.model)
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
        layers = {name: self.program.products[name].sparse for name in self.program.sparse}
        for name, weight, mask in masked_weights(self.model):
            if name not in layers:
                continue
            layer = layers[name]
            self._list(name, layer, mask)
            flat = layer.flat
            shape, stride = weight.shape, weight.stride()

            def vector(tensor: Tensor, flat: Tensor = flat) -> Tensor:
                return tensor.reshape(-1).index_select(0, flat)

            layer.values = nn.Parameter(vector(weight), requires_grad=weight.requires_grad)
            layer.values.dense = shape, stride
            if optimizer is not None:
                _exchange(optimizer, weight, layer.values, vector)
            weight.grad = None
            weight.data = weight.data.new_empty(0)
        self.entered = True

    @torch.no_grad()
    def leave(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put everything back into the model, zero outside the masks."""
        if not self.entered:
            return
        for name, weight, _ in masked_weights(self.model):
            if name not in self.program.sparse:
                continue
            layer = self.program.products[name].sparse
            values, flat = layer.values, layer.flat.long()

            def dense(vector: Tensor, values: Tensor = values, flat: Tensor = flat) -> Tensor:
                shape, stride = values.dense
                whole = torch.zeros(shape.numel(), dtype=vector.dtype).scatter_(0, flat, vector)
                whole = whole.view(shape)
                if whole.stride() == stride:
                    return whole
                return torch.empty_strided(shape, stride, dtype=vector.dtype).copy_(whole)

            weight.data = dense(values)
            if optimizer is not None:
                _exchange(optimizer, values, weight, dense)
            layer.values = nn.Parameter(torch.empty(0))
        self.entered, self._single = False, None

    def _list(self, name: str, layer: Product, mask: Tensor) -> None:
        """List the entries of ``mask``, unless that was done and it has not changed since."""
        last = self._listed.get(name)
        if last is None or last[0] is not mask or last[1] != mask._version:
            layer.set_mask(mask)
            self._listed[name] = mask, mask._version


def _exchange(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    convert: Callable[[Tensor], Tensor],
) -> None:
    """Let ``optimizer`` hold ``new`` in the place of ``old``; state of its shape is converted."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    shape = old.shape
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: convert(value) if torch.is_tensor(value) and value.shape == shape else value
            for key, value in state.items()
        }
