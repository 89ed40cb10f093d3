"""The tested network of a finished run, in plain layers."""

import dataclasses
import json
from pathlib import Path

import yaml
from torch import Tensor, nn

from startsparse import checkpoint, data, models, runs
from startsparse.errors import OptionError, UserError
from startsparse.export import footprint
from startsparse.export.formats import KIND, Facts, rebuild


@dataclasses.dataclass
class Trained:
    """The network of a finished run.

    Attributes:
        model: plain layers, in evaluation mode.
        source: the file its weights are from.
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
        UserError: there is no such run, it is not finished, or its files are not what they should
            be.
    """
    if not (folder / "options.yaml").exists():
        raise OptionError(f"RUN: {folder} is no run folder (it has no options.yaml)")
    result = runs.summary(folder)
    if result is None:
        raise UserError(f"{folder}: not finished; go on with --resume {folder}, then export it")
    try:
        options = dict(yaml.safe_load((folder / "options.yaml").read_text()))
    except (yaml.YAMLError, TypeError, ValueError):
        options = {}
    # The names of the three scripts for one thing; where --data is the set, there is a --data-dir.
    name = options.get("set") or options.get("dataset") or options.get("data")
    arch = options.get("arch") or options.get("model")
    if name not in data.SHAPES or arch not in models.MODELS:
        raise UserError(f"{folder / 'options.yaml'}: tells no known network and data set")

    state, source = _plain_state(folder, options.get("select", "best"))
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    shape = data.SHAPES[name]
    network = {
        "arch": arch,
        "classes": len(weights[-1]),
        "channels": weights[0].shape[1] // (1 if weights[0].dim() > 2 else shape.size**2),
        "size": shape.size,
        "width": options.get("width", 0),
        "resnet_type": options.get("resnet_type", ""),
        "imagenet": name == "imagenet",
    }
    adjacency = None
    if shape.nodes:
        root = data.data_root(options.get("data_dir", options.get("data")))
        adjacency = data.SETS[name](root, options.get("mirror", "")).adjacency
    model = rebuild(network, state, source, adjacency)
    facts = {
        "kind": KIND,
        "network": json.dumps(network),
        "set": name,
        "density": repr(footprint.density(model)),
        "test_accuracy": repr(result["test_accuracy"]),
    }
    nodes = 1 if adjacency is None else len(adjacency)
    size = network["size"]
    return Trained(model, source, facts, (nodes, network["channels"], size, size))


def _plain_state(folder: Path, select: str) -> tuple[dict[str, Tensor], Path]:
    """What the tested network computes with, and the file that says so."""
    path = folder / "dense_weights.pt"  # where weights are not what a layer computes with
    if not path.exists():
        path = runs.selected_weights(folder, select)
    state = checkpoint.load(path)["model"]
    if any(name.endswith((".threshold_logit", ".weight_score")) for name in state):
        raise UserError(
            f"{folder}: has no dense_weights.pt, which runs with soft thresholds or edge-popup "
            "leave at their end since they can be exported; run it again"
        )
    # Buffers that scripts keep beside the weights; adding 0 makes a 0 of every -0.
    own = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    plain = {}
    for name, tensor in state.items():
        if name.rpartition(".")[2] in own:
            mask = state.get(f"{name}_mask")
            plain[name] = (tensor if mask is None else tensor * mask) + 0
    return plain, path
