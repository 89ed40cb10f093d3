"""What a network would cost if zeros were free: FLOPs at the densities of its layers.

The dense cost of each layer is what `torch.utils.flop_counter` counts; a layer of density d costs
the d-th part of it. Convolutions and linear layers only: everything else is a percent or so, but
for a small graph, where the products with its adjacency matrix can be a tenth.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from startsparse.masks import kept, sparse_layers


@torch.no_grad()
def forward_flops(model: nn.Module, example: Tensor) -> dict[str, float]:
    """FLOPs of each sparse layer, were it dense, in one forward pass of ``example`` [1, ...].

    A graph is one example, [nodes, ...]; its layers work on every node.

    A multiply-add is two.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    counter = FlopCounterMode(display=False)
    with counter:
        model(example)
    for module, mode in training.items():
        module.training = mode
    # Modules go by Class.name in the counter's table.
    counts = {key.partition(".")[2]: sum(v.values()) for key, v in counter.flop_counts.items()}
    return {name: float(counts.get(name, 0)) for name in sparse_layers(model)}


def densities(model: nn.Module) -> dict[str, float]:
    """Share of the weights of each sparse layer that take part."""
    return {
        name: torch.count_nonzero(kept(layer)).item() / layer.weight.numel()
        for name, layer in sparse_layers(model).items()
    }


def inference(forward: Mapping[str, float], density: Mapping[str, float]) -> float:
    """FLOPs of a forward pass."""
    return sum(density[name] * flops for name, flops in forward.items())


def training(forward: Mapping[str, float], density: Mapping[str, float]) -> float:
    """FLOPs of forward and backward pass: a product for each of output, input and weight gradient.

    The first layer's input needs no gradient. The weight gradient is counted inside the mask.
    """
    first = next(iter(forward))
    return 3 * inference(forward, density) - density[first] * forward[first]


def dense_gradients(forward: Mapping[str, float], density: Mapping[str, float]) -> float:
    """FLOPs that the weight gradients outside the masks add, in steps that look at them."""
    return sum((1 - density[name]) * flops for name, flops in forward.items())
