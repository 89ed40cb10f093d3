"""Products of effective weights: which of them are zero changes from step to step.

The entries of the whole mask are listed once. Each forward and backward pass takes those from the
lists whose value is not zero, which costs one look at each entry; or all of them
where most are used and `winograd` is faster.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from startsparse.engine import winograd
from startsparse.engine.entries import Entries, Listed, Window
from startsparse.engine.kernels import kernels_for
from startsparse.engine.layers import Gradients, Part, Product
from startsparse.engine.maps import Space


class Nonzero(Listed):
    """The entries of a list whose value is not zero.

    Attributes:
        order: int32 [entries], which of the values each is.
        values: [entries].
    """

    def __init__(self, first: Tensor, offset: Tensor, rows: int, order: Tensor, values: Tensor):
        super().__init__(first, offset, rows)
        self.order, self.values = order, values


def nonzero(part: Entries, values: Tensor, stride: int) -> Nonzero:
    """The entries of ``part`` whose value, ``values[part.order]``, is not zero.

    Args:
        stride: numbers from one input channel to the next.
    """
    assert part.order is not None  # as `CompactedProduct` leaves it
    listed = part.for_stride(stride)
    first, *rest = kernels_for(values.dtype).list_nonzero(listed, part.order, values)
    offset, order, left = rest
    return Nonzero(first, offset, part.rows, order, left)


class CompactedProduct(Product):
    """A convolution or linear layer that computes with those of its values that are not zero.

    ``values`` is no parameter but what the layer computes with, one for each entry of the mask, in
    the order of the flattened mask, which `Product` has only within blocks of channels. So whoever
    ranks them breaks ties as in the dense weight.
    """

    entries: Entries

    def __init__(self, window: Window, input: Space, output: Space, zeros_learn: bool):
        """``zeros_learn``: whether values that are zero have a gradient; else it is left zero."""
        super().__init__(window, input, output)
        self.zeros_learn = zeros_learn

    def set_mask(self, mask: Tensor) -> None:
        """List the entries of ``mask``, bool of the weight's shape [out, in, (ky, kx)]."""
        mask = mask.contiguous().view(*mask.shape[:2], *self.window.kernel)
        self._list(mask)
        rank = mask.flatten().cumsum(0, dtype=torch.int32).sub_(1)[self.flat]
        self.flat = mask.flatten().nonzero().squeeze(1).int()
        for part in (self.entries, *self.transposed):
            part.order = rank if part.order is None else rank[part.order]
            part.flat = self.flat
        sizes = self.window, self.input, self.output
        self.whole, self._many = None, winograd.break_even(*sizes) * mask.numel()
        if len(self.flat) >= self._many:
            self.whole = winograd.Winograd(mask, *sizes)

    def forward(self, x: Tensor, images: int) -> tuple[Tensor, tuple[Tensor, Tensor, Part]]:  # noqa: ARG002
        """The product; the border of its output is not set."""
        values, positions = self.values.detach(), self.positions(x.shape[1])[0]
        part: Part
        if self.whole and int(values.count_nonzero()) >= self._many:
            part, used = self.whole.forward, values
        else:
            part = listed = nonzero(self.entries, values, positions.input_stride)
            used = listed.values
        y = self.output.empty(x.shape[1], x)
        part.gather(x, y, used, positions, add=False)
        return y, (x, self.values, part)

    def backward(
        self, saved: tuple[Tensor, Tensor, Part], d_y: Tensor, into: Gradients | None
    ) -> tuple[Gradients, Gradients]:
        """``into`` None: the gradient of x is not needed."""
        x, values, part = saved
        needs_gradient, values = values.requires_grad, values.detach()
        d_values = self._gradient(part, x, d_y, values) if needs_gradient else None
        if into is None:
            return [None], [d_values]
        parts: Iterable[tuple[Part, Tensor]]
        if self.whole is None or isinstance(part, Nonzero):
            stride = self.output.stride(x.shape[1])
            listed = (nonzero(part, values, stride) for part in self.transposed)
            parts = ((part, part.values) for part in listed)
        else:
            parts = ((part, values) for part in self.whole.backward)
        return [self.to_input(d_y, into[0], parts)], [d_values]

    def _gradient(self, part: Part, x: Tensor, d_y: Tensor, values: Tensor) -> Tensor:
        positions = self.positions(x.shape[1])[0]
        if not isinstance(part, Nonzero):
            gradient = part.weight_gradient(x, d_y, positions)
            return gradient if self.zeros_learn else gradient.masked_fill_(values == 0, 0)
        learn = self.entries if self.zeros_learn else part
        gradient = torch.zeros_like(values)
        gradient[learn.order] = learn.weight_gradient(x, d_y, positions)
        return gradient
