"""Pruning: one score per weight, and the best k weights stay.

Scores are computed on the current masks, name -> tensor like the weight; the highest should stay.
They assume weights of zero outside the masks (`masks.keep_inside`), and have no meaning there.
Computing them changes nothing: no parameter, buffer, gradient, training mode, or global random
state. `startsparse.pruning` uses the scores.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.masks import active, masked_weights, sparse_layers
from startsparse.precision import full_precision
from startsparse.seeding import generator

TEMPERATURE = 200.0  # of grasp, as published


def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """The absolute value of each weight."""
    return {name: weight.detach().abs() for name, weight, _ in masked_weights(model)}


def random(model: nn.Module, seed: int, level: int = 0) -> dict[str, Tensor]:
    """Uniform in [0, 1), float64: a layer's draw depends on (seed, level, name) and nothing else.

    Two of float32's 2^24 numbers would often be equal in a layer of a million weights.
    """
    return {
        name: torch.rand(
            weight.shape, generator=generator(seed, f"prune/{name}", level), dtype=torch.float64
        ).to(weight.device)
        for name, weight, _ in masked_weights(model)
    }


def snip(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """|w * dL/dw| for the cross-entropy L of one batch (Lee et al. 2019, arXiv:1810.02340, 4.1).

    The paper divides by the sum over all weights, which changes no order. BatchNorm normalises by
    the batch, as in training, and there is no dropout.

    Args:
        inputs: [B, ...] what the network takes, on its device.
        labels: [B] class numbers, int64.
    """
    with _evaluating(model, batch_statistics=True), torch.enable_grad(), full_precision():
        loss, weights = _loss(model, inputs, labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    slopes = dict(zip(weights, gradients))
    return {
        name: (weight.detach() * slopes[name]).abs() for name, weight, _ in masked_weights(model)
    }


def grasp(
    model: nn.Module, inputs: Tensor, labels: Tensor, temperature: float = TEMPERATURE
) -> dict[str, Tensor]:
    """w * (H g), the negative of the paper's score (Wang et al. 2020, arXiv:2002.07376, eq. 8).

    g is the gradient of the cross-entropy of one batch by the weights of all convolutions and
    linear layers, inside their masks, and H the Hessian by the same. The paper prunes the largest
    -w * (H g), whose removal harms the gradient norm least. Here the sign is the opposite: the
    highest score stays, as for all scores. Logits are divided by ``temperature``, as in the paper's
    code but not in its equations; at 1 the loss is that of training. BatchNorm and other arguments:
    as for `snip`.
    """
    with _evaluating(model, batch_statistics=True), torch.enable_grad(), full_precision():
        loss, weights = _loss(model, inputs, labels, temperature)
        leaves = list(weights.values())
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        inside = [active(layer) for layer in sparse_layers(model).values()]
        fixed = [g.detach().where(mask, 0) for g, mask in zip(gradients, inside)]
        along = reduce(torch.add, ((g * along).sum() for g, along in zip(gradients, fixed)))
        products = torch.autograd.grad(along, leaves, materialize_grads=True)
    curvatures = dict(zip(weights, products))
    return {name: weight.detach() * curvatures[name] for name, weight, _ in masked_weights(model)}


def synflow(model: nn.Module, shape: Sequence[int]) -> dict[str, Tensor]:
    """|w * dR/dw|, float64 (Tanaka et al. 2020, arXiv:2006.05467, algorithm 1).

    R is the sum of the outputs for an input of ones, of the network with absolute weights and
    nothing added anywhere: the sum over all paths from an input to an output of the product of
    their weights.

    Args:
        shape: of an input as the network takes it: (1, C, H, W), (1, features), or for a graph
            (nodes, features).

    Raises:
        ValueError: R is too large even for float64.
    """
    # Biases and the shifts of BatchNorm are left out: they start paths that come from no input, and
    # a layer could be emptied while they keep R up. Without them R is linear in each layer, so that
    # every layer has the same sum of scores (theorem 2), which is what keeps layers from emptying.
    # Running variances are left out too: SynFlow looks at no data, and a unit that never fires has
    # a variance near 0, which would multiply the scores of its weights by up to 300. What remains
    # of BatchNorm is the factor |weight| / sqrt(1 + eps). In a network with zero biases and fresh
    # BatchNorm, where the paper prunes, all this is the evaluation mode of the paper's own code.
    tensors = {}
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        fill = _SYNFLOW_FILL.get(name.rpartition(".")[2])
        if fill is not None:
            tensors[name] = torch.full_like(value, fill, dtype=torch.float64)
        elif value.is_floating_point():
            tensors[name] = value.detach().to(torch.float64).abs()
        else:
            tensors[name] = value.clone()
    weights = {n: tensors[_key(n)].requires_grad_() for n, _, _ in masked_weights(model)}
    leaves = list(weights.values())
    ones = torch.ones(*shape, dtype=torch.float64, device=leaves[0].device)
    with (
        _evaluating(model, batch_statistics=False),
        torch.enable_grad(),
        torch.autocast(ones.device.type, enabled=False),
    ):
        flow = functional_call(model, tensors, (ones,)).sum()
        slopes = torch.autograd.grad(flow, leaves, materialize_grads=True)
    if not flow.isfinite():
        raise ValueError("synflow: the sum of the outputs is too large for float64")
    return {
        name: (weight.detach() * slope).abs()
        for (name, weight), slope in zip(weights.items(), slopes)
    }


_SYNFLOW_FILL = {"bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@contextmanager
def _evaluating(model: nn.Module, batch_statistics: bool) -> Iterator[None]:
    """Evaluation mode, but BatchNorm on batch statistics if wanted; restores each module's mode.

    Dropout is off, so nothing draws from the global random state.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = batch_statistics and isinstance(module, _BatchNorm)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _loss(
    model: nn.Module, inputs: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of a batch in the weights' precision, and the weights to differentiate it by.

    These stand for the weights of all convolutions and linear layers: they share memory with them
    but not ``.grad``. Buffers are copies, as BatchNorm writes to them.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: tensors[_key(name)].requires_grad_() for name in sparse_layers(model)}
    with torch.autocast(inputs.device.type, enabled=False):
        logits = functional_call(model, tensors, (inputs,)) / temperature
        return F.cross_entropy(logits, labels), weights


def _key(layer: str) -> str:
    """The name of a layer's weight; in a model of a single layer, that layer is called ""."""
    return f"{layer}.weight" if layer else "weight"


def keep_top(model: nn.Module, scores: Mapping[str, Tensor], count: int) -> None:
    """Shrink the masks, in place, to the ``count`` highest scores of the whole network.

    Exactly ``count`` weights stay; of tied scores those of earlier layers and positions stay.

    Args:
        scores: layer name -> floating point tensor like the weight, in any memory format. Only
            scores inside the mask count; they may be infinite.

    Raises:
        ValueError: fewer than ``count`` weights are left, or a score is NaN; names the layer.
    """
    shrink({name: mask for name, _, mask in masked_weights(model)}, scores, count)


@torch.no_grad()
def shrink(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], count: int) -> None:
    """`keep_top` among these masks only: layer name -> bool tensor, changed in place."""
    left = int(torch.stack([torch.count_nonzero(mask) for mask in masks.values()]).sum())
    if not 0 <= count <= left:
        raise ValueError(f"{count} weights cannot be kept: {left} are left")
    values = _candidates(masks, scores, count, left)
    if values.isnan().any():
        bad = next(name for name, mask in masks.items() if scores[name][mask].isnan().any())
        raise ValueError(f"{bad}: a score is NaN")
    if count == left:
        return
    if count == 0:
        for mask in masks.values():
            mask.zero_()
        return
    last = _lowest_of_top(values, count)
    if int((values >= last).sum()) == count:  # no ties to break: nearly always
        for name, mask in masks.items():
            mask.logical_and_(scores[name].to(values.dtype) >= last)
    else:
        same = {name: scores[name].to(values.dtype) for name in masks}
        _shrink_breaking_ties(masks, same, last, count)


def _shrink_breaking_ties(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], last: Tensor, count: int
) -> None:
    """Keep the scores above ``last``, and of those equal to it the first, ``count`` in all."""
    missing: Tensor | int = count
    ties = []
    for name, mask in masks.items():
        ties.append((scores[name] == last) & mask)
        missing -= mask.logical_and_(scores[name] > last).sum()
    for mask, tied in zip(masks.values(), ties):
        rank = tied.flatten().cumsum(0).view(tied.shape)
        mask |= tied & (rank <= missing)
        missing -= rank.max() if rank.numel() else 0


def _candidates(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], count: int, left: int
) -> Tensor:
    """The scores inside the masks, in any order; if few stay, only those that may be the highest.

    On a CPU, gathering millions of scores to keep a few would be most of the work. A sample gives a
    lower bound of those few. If the bound is wrong, or a score is NaN, all scores are gathered.
    """
    if count * 4 < left and left > 10_000 and next(iter(masks.values())).device.type == "cpu":
        pairs = [_flat(scores[name], mask) for name, mask in masks.items()]
        sample = torch.cat([score[::_STRIDE][mask[::_STRIDE]] for score, mask in pairs])
        expected = len(sample) * count / left
        rank = math.ceil(expected + 6 * math.sqrt(expected) + 2)  # six standard deviations
        if rank < len(sample) and all(score.max() < torch.inf for score, _ in pairs):
            bound = sample.topk(rank, sorted=False).values.min()
            values = torch.cat([score[mask & (score >= bound)] for score, mask in pairs])
            if len(values) >= count:
                return values
    return torch.cat([scores[name][mask] for name, mask in masks.items()])


_STRIDE = 61  # a prime, so that the sample covers all rows, channels and kernel positions


def _flat(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dimension and the same order, which is that of memory if they agree in it."""
    if score.stride() == mask.stride():
        return in_memory_order(score), in_memory_order(mask)
    return score.flatten(), mask.flatten()


def in_memory_order(tensor: Tensor) -> Tensor:
    """All entries in one dimension, without a copy where the tensor is dense."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten()


def _lowest_of_top(values: Tensor, count: int) -> Tensor:
    """The ``count``-th largest of ``values`` [n], 0 < count <= n, without sorting them."""
    if values.is_cuda:
        return _by_topk(values, count)
    return values.kthvalue(len(values) - count + 1).values


def _by_topk(values: Tensor, count: int) -> Tensor:
    """The same for GPUs, where kthvalue works on one multiprocessor only and topk on all."""
    rest = len(values) - count + 1
    if count <= rest:
        return values.topk(count, sorted=False).values.min()
    return values.topk(rest, largest=False, sorted=False).values.max()
