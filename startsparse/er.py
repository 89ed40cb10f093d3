"""From options to the random mask of a network."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from startsparse import checkpoint, ratios, runs
from startsparse.effective import formulas
from startsparse.errors import OptionError
from startsparse.masks import attach_masks, draw_masks, sparse_layers
from startsparse.options import Options
from startsparse.ratios import layer_densities


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
        profile = read_densities(runs.source(options, "er_sparsity_file"))
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
        try:
            content = json.loads(path.read_text())
            rows = {k: v["density"] if isinstance(v, dict) else v for k, v in content.items()}
            return {name: float(density) for name, density in rows.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise OptionError(
                f"--er-sparsity-file: {path} should be JSON, layer -> density"
            ) from None
    state = checkpoint.load(path)["model"]
    for layer, formula in formulas(state).items():
        raise OptionError(
            f"--er-sparsity-file: {path}: '{layer}' computes with another weight than the one "
            f"stored there ({formula}); name the run folder instead"
        )
    densities = {}
    for key, value in state.items():
        if key.endswith(".weight") and value.dim() > 1:
            mask = state.get(f"{key}_mask", value != 0)
            densities[key.removesuffix(".weight")] = mask.to(torch.float64).mean().item()
    return densities


def _in_order(densities: Mapping[str, float], names: list[str], options: Options) -> list[float]:
    source = options.er_sparsity_file
    for name in names:
        if not 0 <= densities.get(name, -1) <= 1:
            what = "is not in [0, 1]" if name in densities else "is missing"
            raise OptionError(f"--er-sparsity-file: {source}: the density of '{name}' {what}")
    return [densities[name] for name in names]
