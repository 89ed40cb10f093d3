"""Tickets: files that stand alone.

A ticket holds the options of the run, both masks of every layer as bits, and the running statistics
of BatchNorm. The frozen weights are drawn again from the options. It is a `sealed` file: reading
one executes nothing, its digest covers every byte, and equal runs write equal bytes.

To rebuild a network: build it, `attach_masks` the ticket's random masks, draw the weights by
`init_weights`, swap the layers by `popup`, and `put_in_place`.
"""

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ER_SLT.edge_popup import found_masks, popup_layers
from startsparse import sealed
from startsparse.errors import UserError
from startsparse.masks import masked_weights
from startsparse.processes import by_rank_0
from startsparse.reading import strict_json
from startsparse.seeding import generator

log = logging.getLogger("startsparse")

SHUFFLES = ("mask", "mask+weights")

_KIND = "startsparse ticket 1"


@dataclasses.dataclass
class Ticket:
    """What a ticket file holds.

    Attributes:
        description: what the caller of `save_ticket_by_rank_0` passed: options, accuracy.
        er_masks: layer name -> bool mask; dense layers have none.
        found: parameter name -> bool mask, as `edge_popup.found_masks` gives it.
        statistics: buffer name -> running mean (float32), variance or count of a BatchNorm.
        weights: digest of the frozen weights and biases, to recognise them.
    """

    description: dict
    er_masks: dict[str, Tensor]
    found: dict[str, Tensor]
    statistics: dict[str, Tensor]
    weights: str


@by_rank_0
def save_ticket_by_rank_0(path: Path, model: nn.Module, description: Mapping[str, object]) -> None:
    """Write what ``model``, in edge-popup form, uses now; whole or not at all.

    Args:
        description: all that is needed to build the network and draw its weights again, and any
            other facts about it; plain values, as in JSON.

    Raises:
        TypeError: JSON cannot express the description.
        OSError: the file cannot be written.
    """
    masks = {f"er/{name}": mask for name, _, mask in masked_weights(model)}
    masks |= {f"found/{name}": mask for name, mask in found_masks(model).items()}
    tensors = {f"statistics/{n}": buffer.cpu() for n, buffer in _statistics(model).items()}
    tensors |= {name: _bits(mask) for name, mask in masks.items()}
    facts = {
        "kind": _KIND,
        "description": json.dumps(dict(description)),
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "weights": _weights_digest(model),
    }
    sealed.write(path, tensors, facts)


def load_ticket(path: Path) -> Ticket:
    """Read what `save_ticket_by_rank_0` wrote, on the CPU.

    Raises:
        UserError: the file is missing, is no ticket, is damaged in as much as one bit, or has a
            right digest of content that no run writes.
    """
    tensors, facts = sealed.read(path, "ticket", _KIND)
    try:
        return _unpack(tensors, facts)
    except _Odd as error:
        raise UserError(f"{path}: not a ticket that this project wrote: {error}") from None


def put_in_place(model: nn.Module, ticket: Ticket) -> None:
    """Make ``model`` compute with exactly the masks and statistics of ``ticket``, in place.

    Scores become 1 inside the mask and 0 elsewhere. A warning is logged if the frozen weights are
    not, to the bit, those in which the ticket was found: other versions of the libraries or another
    processor can change the last digits of orthogonal weights.

    Args:
        model: edge-popup form of the network that ``ticket.description`` describes.

    Raises:
        UserError: layers, shapes or random masks are not those of the ticket; names the first.
    """
    er_masks = {name: mask for name, _, mask in masked_weights(model)}
    _compare("random mask", er_masks, ticket.er_masks)
    for name, mask in er_masks.items():
        if not torch.equal(mask.cpu(), ticket.er_masks[name]):
            raise UserError(f"the ticket does not fit: its random mask of '{name}' differs")
    _compare("mask", found_masks(model), ticket.found)
    _compare("running statistic", _statistics(model), ticket.statistics)
    _select(model, ticket.found)
    for name, buffer in _statistics(model).items():
        buffer.copy_(ticket.statistics[name])
    if _weights_digest(model) != ticket.weights:
        log.warning("warning: the frozen weights drawn here are not, to the bit, the ticket's")


@contextmanager
def shuffled(model: nn.Module, seed: int, what: str, number: int = 0) -> Iterator[None]:
    """Ablation: shuffle the found masks of ``model`` inside the block, and restore them after it.

    In each layer the entries of the random mask trade places, and so do the biases. So each layer
    keeps as many weights and as many biases as before, and the random mask stays the same.

    Args:
        seed: the run's; the permutation depends on (seed, "shuffle/" + parameter name, number).
        what: ``mask`` shuffles the mask only; ``mask+weights`` also shuffles the frozen values in
            the same way, so that the same values are kept in other places.
        number: of the shuffle; each number is another permutation.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = found_masks(model)
    try:
        with torch.no_grad():
            for name, mask in found.items():
                frozen = model.get_parameter(name)
                inside = before.get(f"{name}_mask", torch.ones_like(mask))
                positions = inside.flatten().nonzero().squeeze(1)
                draw = generator(seed, f"shuffle/{name}", number)
                shuffle = torch.randperm(len(positions), generator=draw).to(positions.device)
                for tensor in (mask, frozen) if what == "mask+weights" else (mask,):
                    flat = tensor.flatten()
                    flat = flat.index_copy(0, positions, flat[positions[shuffle]])
                    tensor.copy_(flat.view(tensor.shape))
            _select(model, found)
        yield
    finally:
        model.load_state_dict(before)


@torch.no_grad()
def _select(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Set scores and counts so that exactly ``found`` is used."""
    for name, layer in popup_layers(model).items():
        layer.keep.zero_()
        for kind, score in (("weight", layer.weight_score), ("bias", layer.bias_score)):
            if score is not None:
                mask = found[f"{name}.{kind}" if name else kind]
                score.copy_(mask)
                layer.keep.add_(int(mask.sum()))


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}" if name else kind: buffer
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for kind, buffer in module.named_buffers(recurse=False)
    }


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for layer in popup_layers(model).values():
        for frozen in (layer.weight, layer.bias):
            if frozen is not None:
                digest.update(frozen.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compare(what: str, network: Mapping[str, Tensor], ticket: Mapping[str, Tensor]) -> None:
    for name in sorted(network.keys() ^ ticket.keys()):
        lacks = "the ticket" if name in network else "the network"
        raise UserError(f"the ticket does not fit: {lacks} has no {what} of '{name}'")
    for name, tensor in network.items():
        if tensor.shape != ticket[name].shape:
            shapes = f"{tuple(ticket[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"the ticket does not fit: the {what} of '{name}' is {shapes}")


def _bits(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)] of a bool tensor with n entries, the first one in the highest bit."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


class _Odd(Exception):
    """What in a file with a right digest is not as a run writes it."""


def _unpack(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Ticket:
    """The ticket in a file whose digest is right. Nothing is allocated before its size is known."""
    description, shapes = (_mapping(facts, name) for name in ("description", "shapes"))
    if not re.fullmatch("[0-9a-f]{64}", facts.get("weights", "")):
        raise _Odd("'weights' is no digest")
    ticket = Ticket(description, {}, {}, {}, facts["weights"])
    for name in sorted(shapes.keys() - tensors.keys()):
        raise _Odd(f"has no mask {name!r}")
    for name, tensor in tensors.items():
        part, _, key = name.partition("/")
        if part == "statistics" and key:
            ticket.statistics[key] = _statistic(name, tensor)
        elif part in ("er", "found") and key and name in shapes:
            masks = ticket.er_masks if part == "er" else ticket.found
            masks[key] = _mask(name, tensor, shapes[name])
        else:
            raise _Odd(f"has an entry {name!r}")
    for name, mask in ticket.er_masks.items():
        found = ticket.found.get(f"{name}.weight" if name else "weight")
        if found is None or found.shape != mask.shape or bool((found & ~mask).any()):
            raise _Odd(f"its mask of '{name}' does not lie inside the random mask")
    return ticket


def _mapping(facts: Mapping[str, str], name: str) -> dict:
    try:
        value = strict_json(facts.get(name, ""), nan=True)  # an accuracy may be none
    except ValueError as error:
        raise _Odd(f"'{name}' is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise _Odd(f"'{name}' is a {type(value).__name__}, no mapping")
    return value


def _mask(name: str, bits: Tensor, shape: object) -> Tensor:
    """The bool mask whose `_bits` these are."""
    if not (isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)):
        raise _Odd(f"the shape of {name!r} is not one of sizes")
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != (size + 7) // 8:
        what = f"{bits.dtype} {list(bits.shape)}".removeprefix("torch.")
        raise _Odd(f"{name!r} is {what}, not the bits of a mask {shape}")
    values = np.unpackbits(bits.numpy())
    if values[size:].any():
        raise _Odd(f"{name!r} has bits beyond its mask")
    return torch.from_numpy(values[:size]).bool().view(shape)


def _statistic(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.int64) or tensor.dim() > 1:
        what = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise _Odd(f"{name!r} is {what}, no statistic of a BatchNorm")
    least = -math.inf if name.endswith("mean") else 0
    if not bool((tensor.isfinite() & (tensor >= least)).all()):
        raise _Odd(f"{name!r} is negative or not finite")
    return tensor
