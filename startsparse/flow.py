"""Flow preservation: every unit of a masked layer has an incoming and an outgoing edge.

An edge is an active weight. Units are neurons or channels; any kernel position joins two channels.
A random mask of low density, or pruning, may leave dead units, which lack one of the two. Here each
dead unit gets one edge, and edges that can be spared are removed for it (Gadhikar et al. 2023,
arXiv:2210.02412).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from startsparse.masks import masked_weights
from startsparse.seeding import generator


def needed(shape: Sequence[int]) -> int:
    """The fewest edges with which a layer of this weight shape [out, in, ...] has no dead unit."""
    return max(shape[0], shape[1])


def preserve_flow(mask: Tensor, draw: torch.Generator, priority: Tensor | None = None) -> int:
    """Give every dead unit an edge, in place, and remove as many other edges.

    An output unit is dead without an incoming edge, an input unit without an outgoing one. Dead
    outputs and dead inputs are joined in random pairs; each dead unit beyond those is joined to a
    random unit of the other side. In a convolution the kernel position is random too. Then edges
    are removed, one at a time, whose two units both keep another edge.

    Such a removal ends at a *minimal* edge cover, in which no edge can be spared, and that is not
    always a *minimum* one of `needed` edges. Where it ends too early, pairs of random edges are
    replaced by one, so that a mask of at least `needed` edges never grows. With a ``priority``,
    edges only go: they are trained, and two of them are worth more than a new one. Then a mask of
    few edges may grow; one of at least out + in - 1 edges never does.

    Args:
        mask: bool [out, in, *kernel], on any device. Where nothing is dead it is only read.
        draw: a CPU generator, so that the outcome does not depend on the device.
        priority: like ``mask``; the lowest is removed first, of equals the first by position.
            None: a random order.

    Returns:
        How many more edges the mask has than before; 0: the density is unchanged.
    """
    joined = mask.reshape(*mask.shape[:2], -1).any(2)
    dead_outputs, dead_inputs = ((~joined.any(side)).nonzero().flatten().cpu() for side in (1, 0))
    count = max(len(dead_outputs), len(dead_inputs))
    if count == 0:
        return 0
    edges = mask.nonzero().cpu()
    outputs = _ends(dead_outputs, count, mask.shape[0], draw)
    inputs = _ends(dead_inputs, count, mask.shape[1], draw)
    kernel = [torch.randint(size, (count,), generator=draw) for size in mask.shape[2:]]
    new_edges = (outputs, inputs, *kernel)
    mask[new_edges] = True

    # No new edge can be spared: on the side with more dead units, each is its unit's only edge.
    out_degree = torch.cat([edges[:, 0], outputs]).bincount(minlength=mask.shape[0])
    in_degree = torch.cat([edges[:, 1], inputs]).bincount(minlength=mask.shape[1])
    spare = edges[(out_degree[edges[:, 0]] > 1) & (in_degree[edges[:, 1]] > 1)]
    if priority is None:
        order = torch.randperm(len(spare), generator=draw)
    else:
        order = priority[spare.unbind(1)].cpu().argsort(stable=True)
    # The first 3 * count are enough: a removal leaves at most two units with one edge, so it rules
    # out at most two other removals.
    removed = _removable(spare[order[: 3 * count]], out_degree, in_degree, count)
    mask[removed.unbind(1)] = False
    more = count - len(removed)
    if more and priority is None:
        more -= _rejoin(mask, more, draw)
    return more


def _ends(dead: Tensor, count: int, units: int, draw: torch.Generator) -> Tensor:
    """[count] units: the dead ones in random order, then random ones."""
    shuffled = dead[torch.randperm(len(dead), generator=draw)]
    return torch.cat([shuffled, torch.randint(units, (count - len(dead),), generator=draw)])


def _removable(spare: Tensor, out_degree: Tensor, in_degree: Tensor, most: int) -> Tensor:
    """The first ``most`` rows of ``spare`` [n, dims] that can go together, in that order.

    Once through is enough: degrees only fall, so what cannot go now cannot go later.
    """
    outgoing, incoming = out_degree.tolist(), in_degree.tolist()
    rows: list[int] = []
    for row, (output, input_) in enumerate(zip(spare[:, 0].tolist(), spare[:, 1].tolist())):
        if len(rows) == most:
            break
        if outgoing[output] > 1 and incoming[input_] > 1:
            outgoing[output] -= 1
            incoming[input_] -= 1
            rows.append(row)
    return spare[torch.tensor(rows, dtype=torch.int64)]


def _rejoin(mask: Tensor, most: int, draw: torch.Generator) -> int:
    """Replace two edges by one, ``most`` times or as often as possible, in a minimal edge cover.

    Such a cover is made of stars: one unit of each edge has no other edge. An input that shares
    its output is joined with an output that shares its input, and both lose the edge they had. If
    no output, or no input, is shared, there are as many edges as inputs, or outputs: `needed`.

    Returns:
        How many pairs it replaced.
    """
    edges = mask.nonzero().cpu()
    edges = edges[torch.randperm(len(edges), generator=draw)]
    shares_output, shares_input = (_repeated(edges, side)[:most] for side in (0, 1))
    count = min(len(shares_output), len(shares_input))
    shares_output, shares_input = shares_output[:count], shares_input[:count]
    mask[shares_output.unbind(1)] = False
    mask[shares_input.unbind(1)] = False
    kernel = [torch.randint(size, (count,), generator=draw) for size in mask.shape[2:]]
    new_edges = (shares_input[:, 0], shares_output[:, 1], *kernel)
    mask[new_edges] = True
    return count


def _repeated(edges: Tensor, side: int) -> Tensor:
    """Rows of ``edges`` [n, dims] whose unit on ``side`` has an edge in an earlier row."""
    first = np.unique(edges[:, side].numpy(), return_index=True)[1]
    return edges[np.delete(np.arange(len(edges)), first)]


@torch.no_grad()
def repair(model: nn.Module, seed: int, step: int, by_magnitude: bool) -> dict[str, int]:
    """`preserve_flow` in every layer that has a mask.

    Only masks change: call `masks.keep_inside` afterwards. New edges start with the weight that
    lies there, which is 0 in a network whose weights live inside their masks. The masks of a GPU
    are repaired by the CPU, and travel all at once.

    Args:
        seed: the run's; a layer's draw depends on (seed, step, name) and on no other layer.
        step: of training, so that repairs differ.
        by_magnitude: remove the smallest weights, not random ones.

    Returns:
        Layer name -> how many more edges the layer has than before; unchanged ones are left out.
    """
    entries = list(masked_weights(model))
    if not entries:
        return {}
    names, weights, masks = zip(*entries)
    here = on_cpu(masks)
    magnitudes = on_cpu(torch._foreach_abs(weights)) if by_magnitude else [None] * len(names)
    more = repair_masks(dict(zip(names, zip(here, magnitudes))), seed, step)
    if here[0] is not masks[0]:
        flat = to_device(torch.cat([mask.flatten() for mask in here]), masks[0].device)
        sizes = [mask.numel() for mask in masks]
        for mask, part in zip(masks, flat.split(sizes)):
            mask.copy_(part.view(mask.shape))
    return more


def repair_masks(
    masks: Mapping[str, tuple[Tensor, Tensor | None]], seed: int, step: int
) -> dict[str, int]:
    """`repair` of masks on the CPU, in place: layer name -> mask and priority of its edges."""
    grown = {}
    for name, (mask, priority) in masks.items():
        more = preserve_flow(mask, generator(seed, f"flow/{name}", 0, step), priority)
        if more:
            grown[name] = more
    return grown


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves on a CPU, else copies there, by one transfer."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on ``device``; a GPU fetches it while this goes on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
