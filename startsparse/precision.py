"""float32 that is float32: without the formats of 19 or 16 bits that devices may compute in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import backends


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside it, convolutions and products of float32 tensors keep all 24 bits of the fraction.

    GPUs otherwise round the factors of convolutions to 11 bits (TF32, PyTorch's default), and those
    of products where `torch.set_float32_matmul_precision` says so.
    """
    libraries: Any = backends  # whose types do not know all of these
    kinds = (
        *(libraries.cuda.matmul, libraries.cudnn.conv, libraries.cudnn.rnn),
        *(libraries.mkldnn.matmul, libraries.mkldnn.conv),
    )
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision
