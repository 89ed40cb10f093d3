"""What a network would cost if zeros were free: FLOPs at the densities of its layers.

At density d a layer costs d times what it costs dense. Only convolutions and linear layers count:
the rest is about one percent. In a small graph network, the products with the adjacency matrix,
which do not count either, can be a tenth. Zeros of an input (`SparseRows`) count, though they cost
nothing.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from startsparse.masks import SparseLayer, nnz, sparse_layers
from startsparse.method import Method


@torch.no_grad()
def forward_flops(model: nn.Module, example: Tensor) -> dict[str, float]:
    """FLOPs of each sparse layer, if it were dense, in one forward pass of ``example`` [1, ...].

    A graph is one example, [nodes, ...]; its layers work on every node. A multiply-add is two.
    """
    counts = dict.fromkeys(sparse_layers(model), 0.0)

    def counter(name: str) -> Callable:
        def count(layer: SparseLayer, _inputs: tuple, output: Tensor) -> None:
            # Each number of the output takes a multiply-add per weight of its unit.
            counts[name] += 2.0 * output.numel() * layer.weight[0].numel()

        return count

    hooks = [
        layer.register_forward_hook(counter(name)) for name, layer in sparse_layers(model).items()
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(example)
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return counts


def densities(model: nn.Module) -> dict[str, float]:
    """The density of each sparse layer: active weights of all its weights."""
    layers = sparse_layers(model)
    return {name: count / layers[name].weight.numel() for name, count in nnz(model).items()}


def inference(forward: Mapping[str, float], density: Mapping[str, float]) -> float:
    """FLOPs of a forward pass."""
    return sum(density[name] * flops for name, flops in forward.items())


def training(forward: Mapping[str, float], density: Mapping[str, float]) -> float:
    """FLOPs of forward and backward pass: per layer output, input gradient and weight gradient.

    The first layer needs no input gradient. The weight gradient counts inside the mask only.
    """
    first = next(iter(forward))
    return 3 * inference(forward, density) - density[first] * forward[first]


def dense_gradients(forward: Mapping[str, float], density: Mapping[str, float]) -> float:
    """FLOPs that the weight gradients outside the masks add, in a step that needs them."""
    return sum((1 - density[name]) * flops for name, flops in forward.items())


class Ledger:
    """What training has cost, and what dense training would have cost: FLOPs of one input per step.

    Attributes:
        forward: `forward_flops` of one example, or of the whole graph.
        training: spent so far.
        dense: what dense training would have spent.
        counted: steps of this phase that ``training`` and ``dense`` include.
    """

    def __init__(self, model: nn.Module, example: Tensor):
        self.model, self.forward = model, forward_flops(model, example)
        self.training, self.dense, self.counted = 0.0, 0.0, 0

    @property
    def dense_step(self) -> float:
        """FLOPs of a step of dense training."""
        return training(self.forward, dict.fromkeys(self.forward, 1.0))

    def before_step(self, step: int, method: Method) -> None:
        """If ``step`` moves masks, first count the steps so far and its dense gradients."""
        if method.moves_masks(step):
            self.count(step, method)
            if method.dense_gradients == "at updates" and method.needs_dense_gradients(step):
                self.training += dense_gradients(self.forward, densities(self.model))

    def count(self, done: int, method: Method) -> None:
        """Count the steps of the phase before ``done`` at the densities of this moment."""
        uncounted, density = range(self.counted, done), densities(self.model)
        self.training += len(uncounted) * training(self.forward, density)
        if method.dense_gradients == "always":
            needing = sum(map(method.needs_dense_gradients, uncounted))
            self.training += needing * dense_gradients(self.forward, density)
        self.dense += len(uncounted) * self.dense_step
        self.counted = done

    def costs(self, batch: float) -> dict[str, float]:
        """FLOPs of the network as it is and of the training so far, and their ratio to dense.

        inference_flops is for one input, training_flops for steps of ``batch`` inputs.
        """
        now = inference(self.forward, densities(self.model))
        return {
            "inference_flops": now,
            "inference_flops_share": now / sum(self.forward.values()),
            "training_flops": batch * self.training,
            "training_flops_share": self.training / max(self.dense, 1),
        }

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"training": self.training, "dense": self.dense, "counted": self.counted}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from the `state` of another ledger."""
        self.training, self.dense = state["training"], state["dense"]
        self.counted = int(state["counted"])
