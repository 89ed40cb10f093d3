"""The record of an update: a row of topology.csv."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from startsparse.masks import density_table, masked_weights, sparse_layers

SETS = ("dropped", "grown", "kept", "inside_initial", "ever_active")
"""What is counted in each layer, in this order."""


def sets(before: Tensor, mask: Tensor, first: Tensor, ever: Tensor) -> list[Tensor]:
    """`SETS` from the masks before and after an update, and the buffers."""
    return [before & ~mask, mask & ~before, mask, mask & first, ever]


def describe(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """What an update did, and the state of the masks after it: a row of topology.csv."""
    counts = []
    for name, _, mask in masked_weights(model):
        layer = model.get_submodule(name)
        first, ever = layer.get_buffer("initial_mask"), layer.get_buffer("ever_active")
        each = sets(before[name], mask, first, ever)
        counts.append(torch.stack([torch.count_nonzero(s) for s in each]))
    total = density_table(model).iloc[-1]
    dead = int(total["dead_outputs"] + total["dead_inputs"])
    return row(model, torch.stack(counts).tolist(), dead)


def row(model: nn.Module, counts: Sequence[Sequence[int]], dead: int) -> dict[str, float]:
    """A row of topology.csv from the counts of `SETS` in each masked layer.

    density: of all weights; dropped, grown: weights, in total and per layer; ever_active: share of
    all weights that were in the mask at some time (in-time over-parametrization, Liu et al. 2021);
    inside_initial: share of the mask that lies in the initial one; dead_units: without an incoming
    or an outgoing edge.
    """
    names, weights, _ = zip(*masked_weights(model))
    every = sum(layer.weight.numel() for layer in sparse_layers(model).values())
    dense = every - sum(weight.numel() for weight in weights)
    dropped, grown, kept, inside, ever = map(sum, zip(*counts))
    record = {
        "density": (kept + dense) / every,
        "dropped": dropped,
        "grown": grown,
        "ever_active": (ever + dense) / every,
        "inside_initial": inside / max(kept, 1),
        "dead_units": dead,
    }
    for name, (gone, new, *_) in zip(names, counts):
        record |= {f"dropped/{name}": gone, f"grown/{name}": new}
    return record
