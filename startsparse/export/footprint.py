"""What a network costs: parameters, FLOPs, and time on this machine now."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from startsparse import flops
from startsparse.masks import sparse_layers

_PATIENCE = 20.0  # seconds for the latencies of one batch size, once each has been measured thrice
_THRICE = 3


def parameters(model: nn.Module) -> tuple[int, int]:
    """Number of all parameters, and of those that are not zero."""
    tensors = list(model.parameters())
    return sum(t.numel() for t in tensors), sum(int(t.count_nonzero()) for t in tensors)


def densities(model: nn.Module) -> dict[str, float]:
    """Layer -> share of its weights that are not zero, for a network without masks."""
    return {
        name: layer.weight.count_nonzero().item() / layer.weight.numel()
        for name, layer in sparse_layers(model).items()
    }


def density(model: nn.Module) -> float:
    """The same for all layers together."""
    weights = [layer.weight for layer in sparse_layers(model).values()]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def forward_flops(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """FLOPs of one example [1, ...]: as a dense network, and if zeros were free.

    A multiply-add is two; convolutions and linear layers only.
    """
    dense = flops.forward_flops(model, example)
    return sum(dense.values()), flops.inference(dense, densities(model))


@torch.inference_mode()
def latencies(networks: Sequence[nn.Module], inputs: Tensor, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each network, in turns, after one that does not count.

    ``repeats`` passes, or fewer, three at least, where they take longer than 20 seconds.
    """
    seconds: list[list[float]] = [[] for _ in networks]
    for network in networks:
        network(inputs)
    begun = time.perf_counter()
    for done in range(repeats):
        if done >= _THRICE and time.perf_counter() - begun > _PATIENCE:
            break
        for network, taken in zip(networks, seconds):
            start = time.perf_counter()
            network(inputs)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
