"""Checkpoints: written whole or not at all, checked when they are read."""

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from startsparse import processes
from startsparse.atomic import replacing
from startsparse.errors import UserError, reason
from startsparse.processes import by_rank_0
from startsparse.reading import regular

_TAG = b"startsparse blake2b "
_SEAL = len(_TAG) + 64


@by_rank_0
def save_by_rank_0(path: Path, state: dict) -> None:
    """Write tensors and plain values, whole or not at all; the folder has to exist.

    Equal states make equal files.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path, make_folder=False) as temporary, temporary.open("w+b") as file:
        try:
            torch.save(state, file)
            _seal(file)
        except RuntimeError as error:  # PyTorch's writer closes its archive even after an error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what `save_by_rank_0` wrote, tensors on ``device``. Executes nothing from the file.

    Raises:
        UserError: the file is missing, incomplete, damaged or no checkpoint.
    """
    return _load(path, device, lambda: path.open("rb"))


def load_by_rank_0(path: Path, device: torch.device | str = "cpu") -> dict:
    """`load` for all processes, of which only the machine of rank 0 needs to have the file."""
    if processes.world_size() == 1:
        return load(path, device)
    return _load(path, device, lambda: io.BytesIO(processes.all_from_rank_0(path.read_bytes)))


def _load(path: Path, device: torch.device | str, opened: Callable[[], BinaryIO]) -> dict:
    try:
        if processes.rank() == 0:
            regular(path)
        with opened() as file:
            _check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: not a complete checkpoint ({reason(error)})") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever damaged bytes make of zipfile, pickle and torch
        raise UserError(f"{path}: not a complete checkpoint ({reason(error)})") from None
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in model.items()
    ):
        raise UserError(f"{path}: not a checkpoint of this project (no entry 'model')")
    return state


def _seal(file: BinaryIO) -> None:
    """Add a digest of all bytes to an archive, as its comment.

    The checksums of an archive cover the content of its entries, but not their names and places.
    """
    file.seek(-2, os.SEEK_END)  # the length of the comment
    file.write(struct.pack("<H", _SEAL))
    file.write(_TAG + _digest(file, file.tell()))


def _check_archive(file: BinaryIO) -> None:
    """Raise `zipfile.BadZipFile` if bytes are not as `save_by_rank_0` wrote them.

    Older files have the checksums of their entries only.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL))
    tail = file.read()
    if tail.startswith(_TAG):
        if tail != _TAG + _digest(file, size - _SEAL):
            raise zipfile.BadZipFile("damaged, its digest does not match")
        return
    with zipfile.ZipFile(file) as archive:
        if archive.comment or not tail.endswith(b"\0\0"):
            raise zipfile.BadZipFile("damaged at its end")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"damaged, a checksum does not match: {damaged}")


def _digest(file: BinaryIO, length: int) -> bytes:
    """Of the first ``length`` bytes, in hexadecimal; moves to their end."""
    digest, left = hashlib.blake2b(digest_size=32), length
    file.seek(0)
    while left and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    return digest.hexdigest().encode()


def load_model(model: nn.Module, state: dict, path: Path) -> None:
    """Copy the weights and masks of a `load`-ed checkpoint into ``model``, in place.

    Raises:
        UserError: names, shapes or types do not fit, or masks are not 0 and 1; names the first.
    """
    expected, saved = model.state_dict(), state["model"]
    for name in sorted(expected.keys() ^ saved.keys()):
        where = "the checkpoint" if name in expected else "the network"
        raise UserError(f"{path}: does not fit the network: {where} has no '{name}'")
    for name, tensor in expected.items():
        if fault := tensor_fault(saved[name], tensor):
            raise UserError(f"{path}: does not fit the network: '{name}' {fault}")
    model.load_state_dict(saved)


def tensor_fault(tensor: object, expected: Tensor) -> str:
    """What is wrong with a tensor that is to replace ``expected``; "" if nothing is."""
    if not torch.is_tensor(tensor):
        return f"is {type(tensor).__name__}, not a tensor"
    if tensor.shape != expected.shape:
        return f"is {tuple(tensor.shape)} instead of {tuple(expected.shape)}"
    if tensor.dtype != expected.dtype:
        return f"is {tensor.dtype} instead of {expected.dtype}"
    if tensor.layout != expected.layout:
        return f"is {tensor.layout} instead of {expected.layout}"
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return "has values that are not finite"
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        return "has values that are neither 0 nor 1"
    return ""
