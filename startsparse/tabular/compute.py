"""Whether many small networks train masked, or one after the other in their sparse forms."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from startsparse.console import log
from startsparse.data.rows import Rows
from startsparse.engine.choice import Seconds, choose, cpu_seconds
from startsparse.engine.compiler import NoKernelsError
from startsparse.engine.kernels import kernels_for
from startsparse.engine.network import SparseForm
from startsparse.masks import density_table
from startsparse.tabular.batched import LOOPS, Recipe, train_loop

_STEPS = 4  # of each network in a trial


def sparse_forms(
    models: Sequence[nn.Module],
    parts: Sequence[Rows],
    recipe: Recipe,
    *,
    mode: str,
    loop: str,
) -> list[SparseForm]:
    """The sparse forms to give to `train_loop`, or [] if ``loop`` should train the masked networks.

    On GPUs there are none.

    Args:
        models: networks of one shape and about the same density; a trial does not change them.
        parts: training data of each.
        mode: on, off, or auto: try both for a few steps, log and take the faster.
        loop: one of `LOOPS`.

    Raises:
        UnsupportedError: a network has a part without a sparse form.
    """
    weight = next(models[0].parameters())
    if mode == "off" or not _is_on_cpu(weight.device, mode) or not _has_kernels(weight.dtype):
        return []
    shape = parts[0].features.shape[1], 1, 1
    forms = [SparseForm(model, shape) for model in models]
    layers = forms[0].layers if mode == "on" else _faster(forms, parts, recipe, loop)
    for form in forms if layers else ():
        form.compute_sparsely(layers)
    return forms if layers else []


@functools.cache
def _is_on_cpu(device: torch.device, mode: str) -> bool:
    """Whether the networks are on the CPU; if not, and it was asked for, says it, once."""
    if mode == "on" and device.type != "cpu":
        log.info("sparse compute: off, it is for CPUs")
    return device.type == "cpu"


@functools.cache
def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether kernels exist here; if not, logs the reason, once."""
    try:
        kernels_for(dtype)
    except NoKernelsError as error:
        log.info("sparse compute: off, %s", error)
        return False
    return True


def _faster(
    forms: Sequence[SparseForm], parts: Sequence[Rows], recipe: Recipe, loop: str
) -> frozenset[str]:
    """The layers to compute sparsely; none if ``loop`` is faster. The first network stands for all.

    `choose` compares with that network alone, masked. If it finds layers, the comparison with all
    networks in ``loop`` decides.
    """
    density = density_table(forms[0].model).iloc[-1]["density"]
    features, labels = next(parts[0].epoch(0))
    computes = choose(forms[0], features, int(labels.max()) + 1).computes
    faster = False
    if computes:
        together = _seconds([f.model for f in forms], parts, recipe, LOOPS[loop])
        alone = _seconds([forms[0].model], parts[:1], recipe, train_loop, forms=forms[:1])
        faster = len(forms) * alone.fastest < together.fastest
    if not faster:
        log.info("sparse compute: not at density %.3g, it would be slower", density)
        return frozenset()
    line = f"{len(computes)} of {len(forms[0].layers)} layers at density {density:.3g}"
    ratio = alone.over(together)
    if ratio is not None:
        line += f", training takes {len(forms) * ratio:.2f} of the masked CPU time"
    log.info("sparse compute: %s", line)
    return computes


def _seconds(
    models: Sequence[nn.Module],
    parts: Sequence[Rows],
    recipe: Recipe,
    train: Callable,
    **how: Sequence[SparseForm],
) -> Seconds:
    """CPU time of a few steps of each network, after which the networks are as before."""
    before = [copy.deepcopy(model.state_dict()) for model in models]
    few = [_first_rows(rows, _STEPS) for rows in parts]
    seconds = cpu_seconds(lambda: train(models, few, recipe, 1, **how))
    for model, state in zip(models, before):
        model.load_state_dict(state)
    return seconds


def _first_rows(rows: Rows, steps: int) -> Rows:
    """The rows of the first ``steps`` steps."""
    size, device = rows.batch_size, rows.labels.device
    features, labels = rows.features[: steps * size], rows.labels[: steps * size]
    return Rows(features, labels, batch_size=size, device=device, seed=rows.seed)
