"""An update of all masks at once, for GPUs: few operations, and one wait for the device.

It gives the masks that the update layer by layer gives on a CPU, from the same weights, gradients
and momentum. Random growth draws from another generator: only the distribution is the same.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ER_DST.joined import Joined
from ER_DST.record import row, sets
from ER_DST.topology import GROWTH, METHODS, PRUNE, Change, prune_globally, prune_uniformly
from startsparse import flow, masks
from startsparse.masks import gradient, keep_inside, mask_gradients, masked_weights, sparse_layers
from startsparse.pruning import layer_counts, weights_left
from startsparse.seeding import generator


def possible(model: nn.Module, method: str) -> bool:
    """Whether `move` can do it: the network is on a GPU, and the pruning one of the project's."""
    prune, device = METHODS[method].prune, next(model.parameters()).device
    return device.type != "cpu" and (prune is None or prune in _KEEP)


@torch.no_grad()
def move(
    model: nn.Module, optimizer: torch.optim.Optimizer, change: Change
) -> tuple[dict[str, float], dict[str, int]]:
    """`dynamic.move` on all layers at once.

    Raises:
        ValueError: a score is NaN; nothing has changed then.
    """
    names, weights, held = zip(*masked_weights(model))
    layers = [sparse_layers(model)[name] for name in names]
    joined = Joined(weights)
    evers = [layer.get_buffer("ever_active") for layer in layers]
    firsts = [layer.get_buffer("initial_mask") for layer in layers]
    before, first, ever = joined.join(held, firsts, evers)
    mask = before
    parts = METHODS[change.method]
    grows = parts.grow and change.fraction > 0
    (importance,) = joined.join(PRUNE[change.prune](weights))
    bad = [importance.isnan() & mask]
    if parts.prune:
        mask = joined.highest(importance, mask, _KEEP[parts.prune](model, joined, mask, change))
    if grows:
        source = generator(change.seed, "grow", 0, change.step, joined.device)
        draw = functools.partial(joined.random, source)
        (growth,) = joined.join(GROWTH[change.growth].score(layers, draw))
        inside = first | mask if change.within_initial else joined.everywhere()
        count = joined.count(mask)
        # A hair less, as in `topology.drop_and_grow`
        dropped = (count.double() * change.fraction * (1 - 1e-12)).ceil().long()
        mask = joined.highest(importance, mask, count - dropped)
        candidates = inside & ~mask
        bad.append(growth.isnan() & candidates)
        mask = mask | joined.highest(growth, candidates, dropped)
    more: dict[str, int] = {}
    if change.preserve_flow:
        mask, more = _preserve_flow(joined, mask, names, change)
    ever = ever | mask

    counted = joined.count(torch.stack([*bad, *sets(before, mask, first, ever)]))
    dead = joined.dead_units(mask).view(1)
    *numbers, dead_units = torch.cat([counted.flatten(), dead]).tolist()  # the wait
    found = [numbers[i : i + len(names)] for i in range(0, len(numbers), len(names))]
    _refuse(names, found[: len(bad)])
    counts = list(zip(*found[len(bad) :]))

    mask_gradients([gradient(weight) for weight in weights], held)
    torch._foreach_copy_([*held, *evers], joined.split(torch.stack([mask, ever])))
    keep_inside(model, optimizer)
    for buffer, (_, _, kept, *_) in zip(held, counts):
        masks.note_nnz(buffer, kept)
    return row(model, counts, dead_units), more


def _keep_globally(model: nn.Module, joined: Joined, mask: Tensor, change: Change) -> Tensor:
    """int64 []: as `topology.prune_globally`."""
    return joined.count(mask).sum().clamp(max=weights_left(model, change.density))


def _keep_uniformly(model: nn.Module, joined: Joined, _: Tensor, change: Change) -> Tensor:
    """int64 [L]: as `topology.prune_uniformly`. Waits if the masks were not counted before."""
    entries = list(masked_weights(model))
    known = masks.nnz(model)
    nnz = [known[name] for name, _, _ in entries]
    total = min(sum(nnz), weights_left(model, change.density))
    counts = layer_counts("uniform", [mask.shape for _, _, mask in entries], nnz, total)
    return flow.to_device(torch.from_numpy(counts), joined.device)


_KEEP: dict[Callable, Callable[[nn.Module, Joined, Tensor, Change], Tensor]] = {
    prune_globally: _keep_globally,
    prune_uniformly: _keep_uniformly,
}


def _preserve_flow(
    joined: Joined, mask: Tensor, names: Sequence[str], change: Change
) -> tuple[Tensor, dict[str, int]]:
    """The repaired mask, by the CPU, and how many more weights layers have. Waits once."""
    here = mask.to("cpu", copy=True)
    parts = {name: (part, None) for name, part in zip(names, joined.parts(here))}
    more = flow.repair_masks(parts, change.seed, change.step)
    return flow.to_device(here, joined.device), more


def _refuse(names: Sequence[str], bad: Sequence[Sequence[int]]) -> None:
    for name, *layer in zip(names, *bad):
        for kind, count in zip(("importance", "growth"), layer):
            if count:
                raise ValueError(f"{name}: {kind}: a score is NaN")
