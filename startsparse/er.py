"""From options to the random mask of a network."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from startsparse import checkpoint, finding, ratios
from startsparse.effective import formulas
from startsparse.errors import OptionError, UserError, reason
from startsparse.masks import attach_masks, draw_masks, sparse_layers
from startsparse.names import shortened
from startsparse.options import Options
from startsparse.ratios import layer_densities
from startsparse.reading import is_number, read_bytes, strict_json

_LARGEST_JSON = 16 << 20  # bytes; a file of a network with a thousand layers has 0.1 MiB


def dense_layers(model: nn.Module, options: Options) -> list[str]:
    """Names of the layers that --first-layer-dense and --last-layer-dense keep dense."""
    names = list(sparse_layers(model))
    return names[:1] * options.first_layer_dense + names[-1:] * options.last_layer_dense


def requested_densities(
    model: nn.Module, options: Options, profile: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The density of each layer, in forward order, that the --er-sparse-* options ask for.

    Args:
        profile: layer -> density of a network to take the ratio of, instead of --er-sparsity-file.
    """
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparse_layers(model).items()}
    names = list(shapes)
    if profile is None and options.er_sparsity_file:
        profile = read_densities(finding.source(options, "er_sparsity_file"))
    try:
        densities = layer_densities(
            options.er_sparse_method if profile is None else "network",
            list(shapes.values()),
            options.er_sparse_init,
            budget=options.er_budget,
            dense=[names.index(name) for name in dense_layers(model, options)],
            profile=None if profile is None else _in_order(profile, names, options),
        )
    except ValueError as error:
        raise OptionError(f"--er-sparse-init: {error}") from None
    return dict(zip(names, densities.tolist()))


def attach_er_masks(model: nn.Module, densities: dict[str, float], options: Options) -> None:
    """Draw the random masks and put them beside the weights; dense layers get none."""
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparse_layers(model).items()}
    masks = draw_masks(shapes, list(densities.values()), options.seed, options.er_sampling)
    for name in dense_layers(model, options):
        del masks[name]
    attach_masks(model, masks)


def read_densities(path: Path) -> dict[str, float]:
    """Density of each layer of a saved network.

    Args:
        path: a run folder (`ratios.file_of`), a checkpoint, or JSON, layer -> density or
            {"density": ...}.

    Raises:
        OptionError: the file is missing or holds something else.
    """
    path = ratios.file_of(path)
    if not path.exists():
        raise OptionError(f"--er-sparsity-file: {path} does not exist")
    if path.suffix == ".json":
        return _json_densities(path)
    try:
        state = checkpoint.load(path)["model"]
    except UserError as error:
        raise OptionError(f"--er-sparsity-file: {error}") from None
    for layer, formula in formulas(state).items():
        raise OptionError(
            f"--er-sparsity-file: {path}: '{layer}' computes with another weight than the one "
            f"stored there ({formula}); name the run folder instead"
        )
    densities = {}
    for key, value in state.items():
        if key.endswith(".weight") and value.dim() > 1:
            mask = state.get(f"{key}_mask", value != 0)
            if mask.dtype != torch.bool or mask.shape != value.shape:
                raise OptionError(f"--er-sparsity-file: {path}: {key + '_mask'!r} is no mask of it")
            densities[key.removesuffix(".weight")] = mask.to(torch.float64).mean().item()
    return densities


def _json_densities(path: Path) -> dict[str, float]:
    """Layer -> density of a JSON file; every value is checked, whether a layer needs it or not."""
    try:
        content = strict_json(read_bytes(path, _LARGEST_JSON), nan=True)
    except OSError as error:
        raise OptionError(f"--er-sparsity-file: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        content, why = None, f" ({reason(error)})"
    else:
        why = ""
    if not isinstance(content, dict):
        raise OptionError(f"--er-sparsity-file: {path} should be JSON, layer -> density{why}")
    densities = {}
    for name, value in content.items():
        density = value.get("density") if isinstance(value, dict) else value
        if not is_number(density) or not 0 <= density <= 1:
            what = f"is {shortened(repr(density), 40)}, not a number from 0 to 1"
        elif 0 < density < sys.float_info.min:
            what = f"is {density!r}, too small to compute with; write 0"
        else:
            densities[name] = float(density)
            continue
        raise OptionError(f"--er-sparsity-file: {path}: the density of {name!r} {what}")
    return densities


def _in_order(densities: Mapping[str, float], names: list[str], options: Options) -> list[float]:
    source = f"--er-sparsity-file: {options.er_sparsity_file}"
    for name in names:
        if name not in densities:
            raise OptionError(f"{source}: the density of '{name}' is missing")
    for name in sorted(densities.keys() - set(names)):
        raise OptionError(f"{source}: has a layer {name!r}, which the network has not")
    return [densities[name] for name in names]
