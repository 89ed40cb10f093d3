"""Masks: which weights of a network exist.

A mask is state of the model: a bool buffer ``weight_mask`` beside the weight of a convolution or
linear layer. It is in the state_dict, follows ``.to()``, and is copied and replicated with the
module. Masks are changed in place and never rebound.

Weights live inside their mask. They are zero outside it when training starts. `mask_gradients`
zeroes the gradients there, so weight decay, momentum and Adam's moments keep them at exactly zero.
That costs one multiply per step, and nothing in the forward pass.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from startsparse.console import number
from startsparse.effective import EffectiveLayer, by_formula
from startsparse.seeding import generator

SAMPLINGS = ("bernoulli", "exact")

CUT = "a layer without weights cuts the network here"

SparseLayer = nn.Conv2d | nn.Linear
"""A layer that can be sparse."""


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The layers that can be sparse, name -> module, in forward order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLayer)}


def masked_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, weight, mask) of every layer that has a mask, in forward order.

    Everything that reads or changes topology goes through this.
    """
    for name, layer in sparse_layers(model).items():
        mask = getattr(layer, "weight_mask", None)
        if mask is not None:
            yield name, layer.weight, mask


def draw_masks(
    shapes: Mapping[str, Sequence[int]], densities: Collection[float], seed: int, sampling: str
) -> dict[str, Tensor]:
    """Random (Erdos-Renyi) masks, name -> bool tensor of that shape.

    Args:
        shapes: layer name -> weight shape.
        densities: one in [0, 1] per layer.
        seed: the run's; a layer's draw depends on (seed, name) and on no other layer.
        sampling: ``bernoulli`` keeps each weight independently with the layer's density;
            ``exact`` keeps a fixed number, rounded so that the total is round(sum(p_l n_l)).
    """
    counts = round_to_total([p * math.prod(s) for p, s in zip(densities, shapes.values())])
    masks = {}
    for (name, shape), density, count in zip(shapes.items(), densities, counts):
        source = generator(seed, f"mask/{name}")
        if sampling == "bernoulli":
            # float64: at densities near 1e-5 the grid of float32's random numbers would show.
            mask = torch.rand(*shape, generator=source, dtype=torch.float64) < density
        else:
            mask = torch.zeros(math.prod(shape), dtype=torch.bool)
            mask[torch.randperm(mask.numel(), generator=source)[: int(count)]] = True
        masks[name] = mask.view(*shape)
    return masks


def round_to_total(expected: ArrayLike) -> np.ndarray:
    """Whole numbers next to ``expected`` [n] with total round(sum): largest remainders go up."""
    exact = np.asarray(expected, float)
    counts = np.floor(exact).astype(int)
    missing = round(float(exact.sum())) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def attach_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put each mask beside the weight of its layer and zero the weight outside it.

    The buffers have the strides of the weights: a product of tensors that lie in memory alike is
    several times faster. `nn.Module.to` and `load_state_dict` keep it so.

    Raises:
        TypeError: a layer computes with another weight, which is not zero there.
    """
    layers = sparse_layers(model)
    for name, mask in masks.items():
        buffer = torch.empty_like(layers[name].weight, dtype=torch.bool)
        layers[name].register_buffer("weight_mask", buffer.copy_(mask))
    keep_inside(model)
    for layer in map(layers.get, masks):
        if isinstance(layer, EffectiveLayer):
            layer.check()


@torch.no_grad()
def keep_inside(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Zero what lies outside the masks: weights, and momentum and moments of the optimizer.

    Needed once after every change of masks or weights; steps in between need `mask_gradients` only.
    """
    inside: list[tuple[Tensor, Tensor]] = []
    for _, weight, mask in masked_weights(model):
        inside.append((weight, mask))
        if optimizer is not None:
            for state in optimizer.state.get(weight, {}).values():
                if torch.is_tensor(state) and state.shape == weight.shape:
                    inside.append((state, mask))
    if inside:
        tensors, masks = zip(*inside)
        torch._foreach_mul_(tensors, _factors(masks, tensors, anew=True))


def gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight after a backward pass."""
    assert weight.grad is not None
    return weight.grad


@torch.no_grad()
def mask_gradients(gradients: list[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero the gradients outside the masks, in place, by one foreach multiply.

    On a GPU it is one launch if gradients are of one dtype and have the strides of their masks.
    """
    if gradients:
        torch._foreach_mul_(gradients, _factors(masks, gradients))


def _factors(
    masks: Sequence[Tensor], tensors: Sequence[Tensor], anew: bool = False
) -> list[Tensor]:
    """The masks as 0 and 1, by which ``tensors`` are multiplied several times faster than by bool.

    On a CPU they are views. On a GPU they are copies, as a foreach function is a single launch only
    where all tensors have one dtype and lie in memory alike.
    """
    if masks[0].device.type == "cpu":
        return [mask.view(torch.uint8) for mask in masks]
    return _copied_factors(masks, tensors, anew)


class _Note:
    """What is true of a mask at one version of it. A copy of the mask has none."""

    def __init__(self, value: Any, version: int = -1):
        self.value, self.version = value, version

    def __deepcopy__(self, _: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def _copied_factors(
    masks: Sequence[Tensor], tensors: Sequence[Tensor], anew: bool = False
) -> list[Tensor]:
    """Copies of the masks, each of the dtype of its tensor, that last until the mask changes.

    PyTorch counts the changes of a tensor (its version), other than through ``.data`` or by a
    collective: call `keep_inside` after these, as after all changes.

    Args:
        anew: make all copies again; else those of masks that have another version.
    """
    factors: list[_Note] = []
    old: dict[int, tuple[_Note, Tensor]] = {}
    for mask, tensor in zip(masks, tensors):
        factor = getattr(mask, "factor", None)
        if factor is None or factor.value.dtype != tensor.dtype:
            factor = mask.factor = _Note(torch.empty_like(mask, dtype=tensor.dtype))  # type: ignore[attr-defined]
        if anew or factor.version != mask._version:
            old[id(factor)] = factor, mask
        factors.append(factor)
    if old:
        torch._foreach_copy_([f.value for f, _ in old.values()], [m for _, m in old.values()])
        for factor, mask in old.values():
            factor.version = mask._version
    return [factor.value for factor in factors]


def can_be_sparse(layer: nn.Module) -> bool:
    """Whether some weights of ``layer`` may not take part: it has a mask or an effective weight."""
    return isinstance(layer, EffectiveLayer) or getattr(layer, "weight_mask", None) is not None


def active(layer: SparseLayer) -> Tensor:
    """Bool tensor: which weights of ``layer`` take part (mask, effective weight, or all)."""
    if isinstance(layer, EffectiveLayer):
        return layer.effective_weight().detach() != 0
    mask = getattr(layer, "weight_mask", None)
    return torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask


@torch.no_grad()
def all_active(model: nn.Module) -> dict[str, Tensor]:
    """`active` of every layer that `can_be_sparse`, name -> bool tensor, in forward order."""
    effective: dict[nn.Module, Tensor] = {
        layer: weight
        for formula, layers in by_formula(model)
        for layer, weight in zip(layers, formula.effective_weights(layers))
    }
    return {
        name: effective[layer] != 0 if layer in effective else active(layer)
        for name, layer in sparse_layers(model).items()
        if can_be_sparse(layer)
    }


def nnz(model: nn.Module) -> dict[str, int]:
    """Active weights of each layer that can be sparse.

    Waits for the device at most once, and not where all masks have been counted before.
    """
    counts = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    unknown: dict[str, Tensor] = {}
    for name, mask in all_active(model).items():
        note = getattr(mask, "nnz", None)
        if note is not None and note.version == mask._version:
            counts[name] = note.value
        else:
            unknown[name] = mask
    if unknown:
        found = torch.stack([torch.count_nonzero(mask) for mask in unknown.values()]).tolist()
        counts |= zip(unknown, found)
        for mask, count in zip(unknown.values(), found):
            if mask.device.type != "cpu" and not mask.is_inference():
                note_nnz(mask, count)
    return counts


def note_nnz(mask: Tensor, count: int) -> None:
    """Note how many weights a mask keeps; `nnz` believes it until the mask changes."""
    mask.nnz = _Note(count, mask._version)  # type: ignore[attr-defined]


def density(model: nn.Module) -> float:
    """Active weights of all weights, of the layers that can be sparse together."""
    return sum(nnz(model).values()) / sum(x.weight.numel() for x in sparse_layers(model).values())


def density_table(model: nn.Module, requested: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per layer and a last one, ``total``.

    Columns: layer, shape, weights, requested (density), kept, density, dead_outputs (units without
    an incoming edge) and dead_inputs (units without an outgoing one).
    """
    layers, masks = sparse_layers(model), all_active(model)
    counts = []  # read at once, for a GPU
    for name, layer in layers.items():
        mask = masks[name] if name in masks else active(layer)
        edges = mask.flatten(2).sum(2) if mask.dim() > 2 else mask.int()
        dead = [(edges.sum(side) == 0).sum() for side in (1, 0)]
        counts.append(torch.stack([edges.sum(), *dead]))
    rows: list[dict[str, Any]] = []
    for (name, layer), numbers in zip(layers.items(), torch.stack(counts).tolist()):
        kept, dead_outputs, dead_inputs = numbers
        rows.append(
            {
                "layer": name,
                "shape": "x".join(map(str, layer.weight.shape)),
                "weights": layer.weight.numel(),
                "requested": (requested or {}).get(name, 1.0),
                "kept": kept,
                "dead_outputs": dead_outputs,
                "dead_inputs": dead_inputs,
            }
        )
    counted = ("weights", "kept", "dead_outputs", "dead_inputs")
    total = {name: sum(row[name] for row in rows) for name in counted}
    target = sum(row["requested"] * row["weights"] for row in rows) / total["weights"]
    table = pd.DataFrame([*rows, {"layer": "total", "shape": "", "requested": target, **total}])
    table.insert(5, "density", table["kept"] / table["weights"])
    return table


def density_text(table: pd.DataFrame, width: int = 80) -> str:
    """A `density_table` as text, at most ``width`` columns wide.

    ``asked`` is the density requested; ``dead_out/in`` counts units without an incoming, and
    without an outgoing edge. ``sparse`` says how many times faster a layer was when tried in sparse
    form, in brackets where it stays masked. To fit, shapes go first; then long names are cut.
    """
    shown = table[["layer", "shape", "weights"]].copy()
    shown["asked"] = table["requested"].map(number)
    shown["kept"] = table["kept"]
    shown["density"] = table["density"].map(number)
    dead = zip(table["dead_outputs"], table["dead_inputs"])
    shown["dead_out/in"] = [f"{outputs}/{inputs}" for outputs, inputs in dead]
    if "computes" in table:
        times = table.get("times_faster", pd.Series(math.nan, table.index))
        shown["sparse"] = [_tried(*pair) for pair in zip(table["computes"] == "sparse", times)]
    if _width(shown) > width:
        shown = shown.drop(columns="shape")
    room = max(9, shown["layer"].map(len).max() - max(0, _width(shown) - width))
    shown["layer"] = [_middle_out(name, room) for name in shown["layer"]]
    return shown.to_string(index=False)


def _tried(computes: bool, times: float) -> str:
    if math.isnan(times):
        return "yes" if computes else ""
    return f"{times:.1f}x" if computes else f"({times:.1f}x)"


def _width(table: pd.DataFrame) -> int:
    return max(map(len, table.to_string(index=False).splitlines()))


def _middle_out(name: str, room: int) -> str:
    """At most ``room`` characters of a name, mostly its end, which tells layers apart."""
    cut = room // 3
    return name if len(name) <= room else f"{name[:cut]}..{name[len(name) - (room - cut - 2) :]}"


def warnings(table: pd.DataFrame) -> list[str]:
    """One line per empty layer, and per kind of dead units, in a `density_table`."""
    layers = table[table["layer"] != "total"]
    lines = []
    for row in layers.itertuples():
        expected = row.requested * row.weights
        if row.kept == 0 or expected < 1:
            lines.append(
                f"{row.layer}: {expected:.2g} weights expected, {row.kept} kept of {row.weights}; "
                f"{CUT}"
            )
    for what, side in (("dead_outputs", "incoming"), ("dead_inputs", "outgoing")):
        dead = layers[(layers[what] > 0) & (layers["kept"] > 0)]
        if len(dead):
            where = ", ".join(f"{row.layer} {getattr(row, what)}" for row in dead.itertuples())
            lines.append(f"units without an {side} edge: {where}")
    return lines


def deviation(model: nn.Module, requested: Mapping[str, float]) -> str:
    """How far random masks are from the requested density, in words; "" if within 1 % of it.

    All weights count, with and without a mask. The message names the layer with the largest
    relative deviation.

    Args:
        requested: the density requested of each layer.
    """
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    drawn = {name: int(mask.sum()) for name, _, mask in masked_weights(model)}
    expected = {name: requested[name] * size for name, size in sizes.items()}
    relative = {name: drawn[name] / expected[name] - 1 for name in drawn if expected[name]}
    target = sum(expected.values())
    excess = sum(drawn.get(name, size) for name, size in sizes.items()) / max(target, 1e-9) - 1
    if not relative or abs(excess) <= 0.01 + 1e-9:
        return ""
    worst, total = max(relative, key=lambda name: abs(relative[name])), target / sum(sizes.values())
    more = "more" if excess > 0 else "fewer"
    return (
        f"the mask has {100 * abs(excess):.1f} % {more} weights than density {total:.4g} asks for; "
        f"{worst} {100 * relative[worst]:+.1f} %"
    )
