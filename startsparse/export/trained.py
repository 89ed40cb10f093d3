"""The tested network of a finished run, in plain layers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from startsparse import checkpoint, data, models, runs
from startsparse.effective import formulas
from startsparse.errors import OptionError, UserError
from startsparse.export import footprint
from startsparse.export.formats import KIND, Facts, rebuild


@dataclasses.dataclass
class Trained:
    """The network of a finished run.

    Attributes:
        model: plain layers, in evaluation mode.
        source: the file of its weights.
        facts: the metadata of its exports.
        input: shape of one example, or of the whole graph.
    """

    model: nn.Module
    source: Path
    facts: Facts
    input: tuple[int, int, int, int]


def read_run(folder: Path) -> Trained:
    """The tested network of the finished run in ``folder``.

    Raises:
        UserError: there is no such run, it is not finished, or a file is damaged.
    """
    if not (folder / "options.yaml").exists():
        raise OptionError(f"RUN: {folder} is no run folder (it has no options.yaml)")
    result = runs.summary(folder)
    if result is None:
        raise UserError(f"{folder}: not finished; go on with --resume {folder}, then export it")
    options, name, arch = _read_options(folder / "options.yaml")
    state, source = _tested_state(folder, options.get("select", "best"))
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    shape, images = data.SHAPES[name], runs.images(folder)
    size = images.size if images else shape.size
    network = {
        "arch": arch,
        "classes": len(weights[-1]),
        "channels": weights[0].shape[1] // (1 if weights[0].dim() > 2 else size**2),
        "size": size,
        "width": options.get("width", 0),
        "resnet_type": options.get("resnet_type", ""),
        "imagenet": name == "imagenet",
    }
    adjacency = _adjacency(name, options) if shape.nodes else None
    model = rebuild(network, _plain(state, source, network), source, adjacency)
    facts = {
        "kind": KIND,
        "network": json.dumps(network),
        "set": name,
        "density": repr(footprint.density(model)),
        "test_accuracy": repr(result["test_accuracy"]),
        **({"images": images.to_json()} if images else {}),
    }
    nodes = 1 if adjacency is None else len(adjacency)
    return Trained(model, source, facts, (nodes, network["channels"], size, size))


def _read_options(path: Path) -> tuple[dict[str, Any], str, str]:
    """The options of a run, and the names of its data set and network."""
    try:
        options = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        options = {}
    # The three scripts name these options differently; where data is the set, data_dir is there.
    name = options.get("set") or options.get("dataset") or options.get("data")
    arch = options.get("arch") or options.get("model")
    width, kind = options.get("width", 0), options.get("resnet_type", "")
    known = isinstance(name, str) and isinstance(arch, str) and isinstance(kind, str)
    if not known or name not in data.SHAPES or arch not in models.MODELS or type(width) is not int:
        raise UserError(f"{path}: names no known network and data set")
    return options, name, arch


def _adjacency(name: str, options: Mapping[str, Any]) -> Tensor:
    root = data.data_root(options.get("data_dir", options.get("data", "")))
    graph = data.SETS[name](root, options.get("mirror", ""))
    assert isinstance(graph, data.Graph)
    return graph.adjacency


def _tested_state(folder: Path, select: str) -> tuple[dict[str, Tensor], Path]:
    """The state of the tested network, and the file that holds it."""
    path = folder / runs.PLAIN_WEIGHTS
    if path.exists():
        return checkpoint.load(path)["model"], path
    path = runs.selected_weights(folder, select)
    state = checkpoint.load(path)["model"]
    for layer, formula in formulas(state).items():
        raise UserError(
            f"{folder}: has no {runs.PLAIN_WEIGHTS}, and '{layer}' computes with another weight "
            f"than the one in {path.name} ({formula}); run it again"
        )
    return state, path


def _plain(state: dict[str, Tensor], source: Path, network: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the network itself, inside its masks, without other buffers of the scripts."""
    names = state.keys()
    if source.name != runs.PLAIN_WEIGHTS:
        with torch.device("meta"):
            names = models.build(**network).state_dict().keys()
    masks = {name: state.get(f"{name}_mask", 1) for name in names if name in state}
    return {name: state[name] * mask + 0 for name, mask in masks.items()}  # + 0: no -0
