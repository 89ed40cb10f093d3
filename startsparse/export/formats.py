"""The files of `startsparse.export`, written and read.

safetensors  the plain network, zeros and all: no masks, no scores, no thresholds
csr          the same with the weights of layers as compressed sparse rows of weight.flatten(1):
             ``NAME.values`` float32, ``NAME.columns`` and ``NAME.rows`` int32
onnx         for other programs, with a batch of any size; onnxruntime has to agree with PyTorch

Their metadata says what the network is: ``network`` (JSON, what `startsparse.models.build` takes),
``set``, ``density`` (of the run), ``test_accuracy``, and for images ``images``, how they are
prepared (JSON of `startsparse.data.Images`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from startsparse import checkpoint, models
from startsparse.atomic import replacing
from startsparse.data import Images
from startsparse.errors import UserError
from startsparse.export.compact import keep_units, resize
from startsparse.masks import sparse_layers

KIND = "startsparse network 1"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What --format onnx needs."""

_TOLERANCE = 1e-4  # of onnxruntime against PyTorch, relative to the largest logit

Facts = Mapping[str, str]


def rebuild(
    network: Mapping[str, Any],
    state: Mapping[str, Tensor],
    path: Path,
    adjacency: Tensor | None = None,
) -> nn.Module:
    """A network in evaluation mode with the weights of ``state``, from which it has its sizes.

    Args:
        network: what `models.build` takes.
        path: source of the weights, for messages.

    Raises:
        UserError: names or shapes do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        model = models.build(**network, adjacency=adjacency)
    for name, module in model.named_modules():
        weight = state.get(f"{name}.weight")
        if isinstance(module, nn.Conv2d | nn.Linear) and weight is not None:
            resize(module, torch.empty_like(weight), state.get(f"{name}.bias"))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and weight is not None:
            keep_units(module, torch.arange(min(len(weight), module.num_features)))
    checkpoint.load_model(model, {"model": state}, path)
    return model.eval()


def write_dense(path: Path, model: nn.Module, facts: Facts) -> None:
    """--format safetensors."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _write(path, state, {**facts, "format": "dense"})


def write_csr(path: Path, model: nn.Module, facts: Facts) -> None:
    """--format csr."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    shapes = {}
    for layer in sparse_layers(model):
        name = f"{layer}.weight"
        weight = state.pop(name)
        shapes[name] = list(weight.shape)
        indices = weight.flatten(1).nonzero()  # row by row
        per_row = torch.bincount(indices[:, 0], minlength=len(weight))
        state[f"{name}.values"] = weight[weight != 0]
        state[f"{name}.columns"] = indices[:, 1].to(torch.int32).contiguous()
        state[f"{name}.rows"] = nn.functional.pad(per_row.cumsum(0), (1, 0)).to(torch.int32)
    _write(path, state, {**facts, "format": "csr", "shapes": json.dumps(shapes)})


def _write(path: Path, state: Mapping[str, Tensor], facts: Facts) -> None:
    with replacing(path) as temporary:
        safetensors.torch.save_file(dict(state), temporary, dict(facts))


def load_csr(path: Path) -> dict[str, Tensor]:
    """The dense state_dict of a file of --format csr.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    state, facts = _read(path)
    if facts["format"] != "csr":
        raise UserError(f"{path}: is of --format {facts['format']}, not csr; use load")
    return _from_csr(state, facts)


def load(path: Path, adjacency: Tensor | None = None) -> nn.Module:
    """The network of a file of --format safetensors or csr, in evaluation mode.

    A compacted network equals its original in that mode only. Its attribute ``images`` is a
    `startsparse.data.Images`, the classes and how an image becomes its input; None without images.

    Args:
        adjacency: of the graph, for a gcn; without it that network cannot be called.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    state, facts = _read(path)
    state = _from_csr(state, facts) if facts["format"] == "csr" else state
    model = rebuild(json.loads(facts["network"]), state, path, adjacency)
    images = Images.from_json(facts["images"]) if "images" in facts else None
    object.__setattr__(model, "images", images)  # neither a tensor nor a module
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], Facts]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: no network can be read there ({error.strerror})") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    if facts.get("kind") != KIND:
        raise UserError(f"{path}: not a network that startsparse.export wrote")
    return state, facts


def _from_csr(state: dict[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    state = dict(state)
    for name, (outputs, *rest) in json.loads(facts["shapes"]).items():
        values, columns, rows = (state.pop(f"{name}.{x}") for x in ("values", "columns", "rows"))
        weight = torch.zeros(outputs, torch.Size(rest).numel(), dtype=values.dtype)
        row_of = torch.arange(outputs).repeat_interleave(rows.diff())
        weight[row_of, columns.long()] = values
        state[name] = weight.view(outputs, *rest)
    return state


def write_onnx(path: Path, model: nn.Module, facts: Facts, shape: Sequence[int]) -> None:
    """--format onnx: input ``inputs`` [batch, *shape[1:]], output ``logits`` [batch, classes].

    Raises:
        UserError: onnxruntime computes other logits.
    """
    import onnxruntime  # not in every installation: see PACKAGES

    inputs = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1))
    program = torch.onnx.export(
        model,
        (inputs,),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        verbose=False,
        input_names=["inputs"],
        output_names=["logits"],
    )
    assert program is not None  # with dynamo
    program.model.metadata_props.update(facts)
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        for batch in (inputs, inputs[:1]):
            with torch.inference_mode():
                expected = model(batch)
            (logits,) = session.run(None, {"inputs": batch.numpy()})
            off = (torch.from_numpy(logits) - expected).abs().max()
            if not off <= _TOLERANCE * max(1.0, expected.abs().max().item()):
                raise UserError(f"--format onnx: onnxruntime computes logits that are {off} off")
