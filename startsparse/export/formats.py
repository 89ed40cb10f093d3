"""The files of `startsparse.export`, written and read.

safetensors  the plain network, zeros and all: no masks, no scores, no thresholds
csr          the same with the weights of layers as compressed sparse rows of weight.flatten(1):
             ``NAME.values`` float32, ``NAME.columns`` and ``NAME.rows`` int32
onnx         for other programs, with a batch of any size; onnxruntime has to agree with PyTorch

Their metadata says what the network is: ``network`` (JSON, what `startsparse.models.build` takes),
``set``, ``density`` (of the run), ``test_accuracy``, and for images ``images``, how they are
prepared (JSON of `startsparse.data.Images`). The first two are `sealed`: a digest covers every
byte, and a damaged file is refused.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from startsparse import checkpoint, models, sealed
from startsparse.atomic import replacing
from startsparse.data import Images
from startsparse.errors import OptionError, UserError, reason
from startsparse.export.compact import keep_units, resize
from startsparse.masks import sparse_layers
from startsparse.reading import strict_json

KIND = "startsparse network 2"
_UNSEALED = "startsparse network 1"  # of older versions, without a digest
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What --format onnx needs."""

_LARGEST = 2**31  # weights of a network; none of `models` has so many
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
    sealed.write(path, state, {**facts, "format": "dense"})


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
    sealed.write(path, state, {**facts, "format": "csr", "shapes": json.dumps(shapes)})


def load_csr(path: Path) -> dict[str, Tensor]:
    """The dense state_dict of a file of --format csr.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    state, facts = _read(path)
    if facts["format"] != "csr":
        raise UserError(f"{path}: is of --format {facts['format']}, not csr; use load")
    return state


def load(path: Path, adjacency: Tensor | None = None) -> nn.Module:
    """The network of a file of --format safetensors or csr, in evaluation mode.

    A compacted network equals its original in that mode only. Its attribute ``images`` is a
    `startsparse.data.Images`, the classes and how an image becomes its input; None without images.
    A file that an older version wrote has no digest, and is read with a warning.

    Args:
        adjacency: of the graph, for a gcn; without it that network cannot be called.

    Raises:
        UserError: the file is missing, damaged in as much as one bit, or of another kind.
    """
    state, facts = _read(path)
    try:
        network = _network(facts, state)
        images = Images.from_json(facts["images"]) if "images" in facts else None
    except _ODD as error:
        raise _other(path, error) from None
    model = rebuild(network, state, path, adjacency)
    object.__setattr__(model, "images", images)  # neither a tensor nor a module
    return model


# what content that no export writes can raise
_ODD = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, OptionError)


def _other(path: Path, error: Exception) -> UserError:
    what = f"no '{error.args[0]}'" if isinstance(error, KeyError) else reason(error)
    return UserError(f"{path}: not a network that startsparse.export wrote ({what})")


def _read(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """The dense state_dict and the metadata of a file of either format."""
    state, facts = sealed.read(path, "network", KIND, _UNSEALED)
    try:
        if facts["format"] not in ("dense", "csr"):
            raise ValueError(f"--format {facts['format']!r}")
        return _from_csr(state, facts) if facts["format"] == "csr" else state, facts
    except _ODD as error:
        raise _other(path, error) from None


def _network(facts: Facts, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `models.build` takes, where such a network can have these tensors, or less of each."""
    network = strict_json(facts["network"])
    with torch.device("meta"):  # nothing is allocated for what the file claims
        whole = models.build(**network).state_dict()
    if sum(tensor.numel() for tensor in whole.values()) > _LARGEST:
        raise ValueError(f"its network has more than {_LARGEST:,} weights")
    for name in sorted(whole.keys() & state.keys()):
        most, found = whole[name].shape, state[name].shape
        fits = len(most) == len(found) and most[2:] == found[2:]
        if not fits or any(a > b for a, b in zip(found, most)):
            raise ValueError(f"{name!r} is {tuple(found)} in a network where it is {tuple(most)}")
    return network


def _from_csr(state: dict[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    state = dict(state)
    for name, shape in strict_json(facts["shapes"]).items():
        if not all(type(size) is int and size > 0 for size in shape) or len(shape) < 2:
            raise ValueError(f"the shape of {name!r} is not one of sizes")
        outputs, inner = shape[0], math.prod(shape[1:])
        if outputs * inner > _LARGEST:
            raise ValueError(f"{name!r} has more than {_LARGEST:,} weights")
        values, columns, rows = (state.pop(f"{name}.{x}") for x in ("values", "columns", "rows"))
        _check_csr(name, values, columns, rows, outputs, inner)
        weight = torch.zeros(outputs, inner, dtype=values.dtype)
        row_of = torch.arange(outputs).repeat_interleave(rows.diff())
        weight[row_of, columns.long()] = values
        state[name] = weight.view(shape)
    return state


def _check_csr(
    name: str, values: Tensor, columns: Tensor, rows: Tensor, outputs: int, inner: int
) -> None:
    fits = (
        values.dtype.is_floating_point
        and {columns.dtype, rows.dtype} == {torch.int32}
        and columns.shape == values.shape == (values.numel(),)
        and rows.shape == (outputs + 1,)
        and (int(rows[0]), int(rows[-1])) == (0, values.numel())
        and bool((rows.diff() >= 0).all())
        and bool(((columns >= 0) & (columns < inner)).all())
    )
    if not fits:
        raise ValueError(f"{name!r} is no matrix of {outputs} compressed rows of {inner} columns")


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
