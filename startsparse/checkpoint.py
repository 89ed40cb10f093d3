"""Checkpoints: written whole or not at all, checked when they are read."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from startsparse.atomic import replacing
from startsparse.errors import UserError
from startsparse.processes import by_rank_0


@by_rank_0
def save_by_rank_0(path: Path, state: dict) -> None:
    """Write tensors and plain values, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save_by_rank_0` wrote, tensors on ``device``. Executes nothing from the file.

    Raises:
        UserError: the file is missing, incomplete or no checkpoint.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the checksum of every tensor
        if damaged:
            raise UserError(f"{path}: damaged, a checksum does not match ({damaged})")
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a complete checkpoint ({reason})") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path}: not a checkpoint of this project (no entry 'model')")
    return state


def load_model(model: nn.Module, state: dict, path: Path) -> None:
    """Copy the weights and masks of a `load`-ed checkpoint into ``model``, in place.

    Raises:
        UserError: names or shapes do not fit; the message names the first.
    """
    expected, saved = model.state_dict(), state["model"]
    for name in sorted(expected.keys() ^ saved.keys()):
        where = "the checkpoint" if name in expected else "the network"
        raise UserError(f"{path}: does not fit the network: {where} has no '{name}'")
    for name, tensor in expected.items():
        if tensor.shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"{path}: does not fit the network: '{name}' is {shapes}")
    model.load_state_dict(saved)
