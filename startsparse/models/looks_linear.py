"""Looks-linear weights: a ReLU network that begins as a linear one."""

import torch
from torch import Tensor, nn


def looks_linear(
    shape: torch.Size | tuple[int, ...], draw: torch.Generator, *, first: bool, last: bool
) -> Tensor:
    """Mirrored orthogonal blocks, float32 of ``shape`` = [out, in, *kernel], on the CPU.

    Balduzzi et al. 2017 (arXiv:1702.08591, "looks linear" initialization), in the form for plain
    ReLU, where mirrored weights stand in for their concatenated ReLU. A hidden layer is
    [[Q, -Q], [-Q, Q]], the first one [[Q], [-Q]], the last one [Q, -Q], and a layer that is both is
    Q. As Q.flatten(1) comes from a QR decomposition, its rows or columns, whichever are fewer, are
    orthonormal.

    The two halves of a hidden layer carry z and -z, and ReLU makes them h+ and h-; the next layer
    sees their difference h+ - h- = z again. So a feed-forward network of convolutions or linear
    layers, ReLU, average pooling and fresh BatchNorm in evaluation mode, without biases, is exactly
    linear. Max-pooling and shortcuts break this. No gain is needed: z keeps its size from layer to
    layer where Q is square, since nothing is lost at the ReLU.

    Args:
        draw: a CPU generator.
        first: the inputs are data, not two halves.
        last: the outputs are logits, not two halves.

    Raises:
        ValueError: the number of inputs or outputs to halve is odd.
    """
    outputs, inputs, *kernel = shape
    if not last:
        outputs = _half(outputs, "outputs")
    if not first:
        inputs = _half(inputs, "inputs")
    weight = torch.empty(outputs, inputs, *kernel, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of a QR decomposition depend on the number of threads
    try:
        nn.init.orthogonal_(weight, generator=draw)
    finally:
        torch.set_num_threads(threads)
    if not first:
        weight = torch.cat([weight, -weight], dim=1)
    if not last:
        weight = torch.cat([weight, -weight], dim=0)
    return weight


def _half(units: int, which: str) -> int:
    if units % 2:
        raise ValueError(f"{units} {which} cannot be halved: the number is odd")
    return units // 2
