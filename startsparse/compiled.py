"""A network that torch.compile compiles once for training and once for evaluation."""

import torch
from torch import Tensor, nn


class Compiled:
    """``network``, compiled for whole batches; it computes smaller ones as it is.

    The last batch of an epoch may be smaller. Compiled for it as well, PyTorch would make the
    network a slower one for batches of any size.
    """

    def __init__(self, network: nn.Module, whole: int):
        """``whole``: examples of a whole batch, at least."""
        self.network, self.whole = network, whole
        self._compiled = torch.compile(network, dynamic=False)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[B, ...] -> logits [B, classes]."""
        return (self._compiled if len(inputs) >= self.whole else self.network)(inputs)
