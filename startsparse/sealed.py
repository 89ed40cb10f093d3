"""safetensors files with a digest of every byte, for tickets and exported networks.

The metadata ``sha256`` is the digest of the file with `_BLANK` in its place. Equal tensors and
metadata give equal bytes: safetensors itself writes metadata in the order of a hash table.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from startsparse.atomic import replacing
from startsparse.console import log
from startsparse.errors import UserError
from startsparse.reading import read_bytes

_BLANK = "the digest of this file with this text in its place".center(64)


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write contiguous tensors and metadata, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    file = safetensors.torch.save(dict(tensors), {**facts, "sha256": _BLANK})
    header, data = _parts(file)
    facts = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": facts, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    file = len(text).to_bytes(8, "little") + text + data
    with replacing(path) as temporary:
        temporary.write_bytes(_filled(file, _BLANK, hashlib.sha256(file).hexdigest()))


def read(
    path: Path, what: str, kind: str, before: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of what `write` wrote.

    Args:
        what: what the file should be, for messages.
        kind: its metadata ``kind``.
        before: the ``kind`` of older files, which have no digest; they are read with a warning.

    Raises:
        UserError: the file is missing, is of another kind, or is damaged in as much as one bit.
    """
    try:
        file = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: no {what} can be read there ({error.strerror})") from None
    tensors: dict[str, Tensor] = {}
    try:
        # checks the header before anything is allocated; its order is that of a hash table
        tensors = dict(sorted(safetensors.torch.load(file).items()))
        facts = _parts(file)[0].get("__metadata__") or {}
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError):
        facts = {}  # KeyError: a type that PyTorch has not
    if any(not name.isprintable() for name in (*tensors, *facts)):
        facts = {}
    if facts.get("kind") not in (kind, before or kind):
        raise UserError(f"{path}: not a {what} of this project, or a damaged one")
    if facts["kind"] == before and "sha256" not in facts:
        log.warning("warning: %s has no checksum, as older versions wrote; export it again", path)
        return tensors, facts
    digest = facts.get("sha256", "")
    whole = re.fullmatch("[0-9a-f]{64}", digest) is not None
    if not whole or hashlib.sha256(_filled(file, digest, _BLANK)).hexdigest() != digest:
        raise UserError(f"{path}: damaged, the checksum does not match")
    return tensors, facts


def _parts(file: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def _filled(file: bytes, old: str, new: str) -> bytes:
    """The file with another digest. Inside a JSON string its quotes would be escaped."""
    before, after = (f'"sha256":"{text}"'.encode() for text in (old, new))
    return file.replace(before, after, 1)
