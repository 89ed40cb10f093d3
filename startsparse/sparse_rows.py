"""Rows with few numbers that are not 0, such as the words of a paper, and products with them.

A network takes `SparseRows` where it takes dense rows. Its dropout and its first linear layer, with
whatever weight that computes, then cost what the stored numbers cost.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()  # the first one warns that they are in beta


class SparseRows:
    """A constant matrix [N, F] of few stored numbers, as the input of a network.

    No tensor, but PyTorch's functions take it: `F.linear` and `F.dropout` look at the stored
    numbers only, all others get it `dense`.

    Attributes:
        csr: the matrix, a sparse CSR tensor.
        dense: the matrix, a dense tensor; made when it is first asked for, and kept.
    """

    def __init__(self, matrix: Tensor):
        """``matrix``: [N, F] of floating-point numbers, sparse (then as stored) or dense."""
        self.csr = matrix.to_sparse_csr()
        crow, columns = self.csr.crow_indices(), self.csr.col_indices()
        rows = torch.arange(len(self), device=self.device).repeat_interleave(crow.diff())
        order = columns.argsort(stable=True)
        ends = columns.bincount(minlength=self.shape[1]).cumsum(0)
        # What the transposed matrix stores, and which stored number is which.
        self._transposed = F.pad(ends, (1, 0)), rows[order], order

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.csr)

    shape = property(lambda self: self.csr.shape)
    dtype = property(lambda self: self.csr.dtype)
    device = property(lambda self: self.csr.device)

    @cached_property
    def dense(self) -> Tensor:  # noqa: D102 -- see the class
        return self.csr.to_dense()

    @cached_property
    def transposed(self) -> Tensor:
        """The transposed matrix, a sparse CSR tensor [F, N]."""
        crow, columns, order = self._transposed
        return _csr(crow, columns, self.csr.values().index_select(0, order), self.shape[::-1])

    def to(self, *target: Any) -> "SparseRows":
        """On another device or in another precision, as `Tensor.to`."""
        return SparseRows(self.csr.to(*target))

    def flatten(self, *_: int) -> "SparseRows":
        """Itself: it has two dimensions."""
        return self

    def isfinite(self) -> Tensor:
        """Which stored numbers are finite."""
        return self.csr.values().isfinite()

    @classmethod
    def __torch_function__(
        cls,
        function: Callable,
        _types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """What PyTorch calls for a function of its own that gets `SparseRows`."""
        options = options or {}
        if function in _FUNCTIONS:
            return _FUNCTIONS[function](*arguments, **options)
        dense = tree_map_only(cls, lambda rows: rows.dense, (arguments, options))
        return function(*dense[0], **dense[1])

    def _with(self, values: Tensor) -> "SparseRows":
        """Other numbers in the same places."""
        rows = object.__new__(SparseRows)
        rows.csr = _csr(self.csr.crow_indices(), self.csr.col_indices(), values, self.shape)
        rows._transposed = self._transposed
        return rows


def _dropout(
    input: SparseRows,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,  # noqa: ARG001
) -> SparseRows:
    """`F.dropout`; only stored numbers are drawn for, as a 0 that is dropped is a 0."""
    if not training or p == 0:
        return input
    values = input.csr.values()
    # On CPUs this takes a third of the time of F.dropout.
    return input._with(values * (torch.rand_like(values) >= p) / max(1 - p, 1e-12))


def _linear(input: SparseRows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: [N, U] for a weight [U, F]."""
    units = product(input.csr, input.transposed, weight.t())
    return units if bias is None else units + bias


_FUNCTIONS: dict[Callable, Callable] = {F.linear: _linear, F.dropout: _dropout}


class _Product(torch.autograd.Function):
    """Matrix @ units; the gradient by the units is such a product again, to any order."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.matrices = transposed, matrix
        return matrix @ units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        transposed, matrix = ctx.matrices
        return product(transposed, matrix, gradient), None, None


def product(matrix: Tensor, transposed: Tensor, units: Tensor) -> Tensor:
    """``matrix`` @ ``units`` for a constant sparse matrix, in its precision.

    PyTorch has this product, but for the gradient it sorts the transposed matrix in each step.

    Args:
        matrix: sparse CSR [N, M].
        transposed: the same transposed, [M, N].
        units: [M, U].
    """
    # There is no sparse product in bf16.
    with torch.autocast(matrix.device.type, enabled=False):
        return _Product.apply(units.to(matrix.dtype), matrix, transposed)


def symmetric_product(units: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """A times ``units`` [N, U] for a symmetric A [N, N], by the parts of its CSR tensor."""
    if torch.compiler.is_compiling():
        return _compiled_product(units, starts, columns, values)
    matrix = _csr(starts, columns, values, (len(units), len(units)))
    return product(matrix, matrix, units)


@torch.library.custom_op("startsparse::symmetric_product", mutates_args=())
def _compiled_product(units: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`symmetric_product` as one operation for torch.compile, which knows no sparse tensors."""
    return _csr(starts, columns, values, (len(units), len(units))) @ units.to(values.dtype)


@_compiled_product.register_fake
def _(units: Tensor, _starts: Tensor, _columns: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(units, dtype=values.dtype)


def _keep_matrix(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])
    ctx.dtype = inputs[0].dtype


def _product_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _compiled_product(gradient, *ctx.saved_tensors).to(ctx.dtype), None, None, None


_compiled_product.register_autograd(_product_backward, setup_context=_keep_matrix)


def _csr(crow: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """A sparse CSR tensor of these parts, which are not checked."""
    return torch.sparse_csr_tensor(crow, columns, values, tuple(shape), check_invariants=False)
