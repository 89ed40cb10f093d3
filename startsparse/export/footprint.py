"""What a network costs: parameters, FLOPs, and time on this machine now."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from startsparse import flops
from startsparse.masks import sparse_layers

_TIME_LIMIT = 20.0  # seconds for the latencies of a batch size, after the first _LEAST passes
_LEAST = 3


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
    """FLOPs of one example [1, ...]: of the dense network, and if zeros were free.

    A multiply-add counts as two. Only convolutions and linear layers count.
    """
    dense = flops.forward_flops(model, example)
    return sum(dense.values()), flops.inference(dense, densities(model))


@torch.inference_mode()
def latencies(networks: Sequence[nn.Module], inputs: Tensor, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each network. The networks take turns, after a warm-up.

    There are ``repeats`` passes, or fewer, but at least three, if they take over 20 seconds.
    """
    seconds: list[list[float]] = [[] for _ in networks]
    for network in networks:
        network(inputs)
    begun = time.perf_counter()
    for done in range(repeats):
        if done >= _LEAST and time.perf_counter() - begun > _TIME_LIMIT:
            break
        for network, times in zip(networks, seconds):
            start = time.perf_counter()
            network(inputs)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]
