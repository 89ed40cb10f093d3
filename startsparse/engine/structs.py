"""What Python passes to the kernels: the structures of structs.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from startsparse.engine.entries import Listed
    from startsparse.engine.entries import Positions as PositionsOf
    from startsparse.engine.protocol import Map as MapOf
    from startsparse.engine.protocol import Norm as NormOf
    from startsparse.engine.protocol import Plane as PlaneOf


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class Map(ctypes.Structure):
    """Activations."""

    _fields_ = [
        *_fields(c_void_p, "data"),
        *_fields(c_int64, "blocks", "channels", "height", "columns", "border"),
    ]


class Norm(ctypes.Structure):
    """A BatchNorm."""

    _fields_ = [
        *_fields(c_void_p, "gamma", "beta", "running_mean", "running_variance"),
        *_fields(c_double, "momentum", "epsilon"),
        *_fields(c_int64, "mode"),
        *_fields(c_void_p, "mean", "inverse"),
    ]


class Entries(ctypes.Structure):
    """The entries of a product."""

    _fields_ = [*_fields(c_void_p, "first", "offset"), *_fields(c_int64, "blocks", "rows")]


class Positions(ctypes.Structure):
    """Where a product reads and writes."""

    _fields_ = [
        *_fields(c_void_p, "in", "out"),
        *_fields(c_int64, "count", "group", "row_stride", "channels", "channel_stride", "reach"),
    ]


class Plane(ctypes.Structure):
    """The map of one image."""

    _fields_ = [
        *_fields(c_void_p, "data"),
        *_fields(c_int64, "channels", "height", "columns", "channel", "line"),
    ]


STRUCTURES = (Map, Norm, Entries, Positions, Plane)

_NO_MAP, _NO_PLANE = Map(), Plane()


def address(tensor: Tensor | None) -> int | None:
    """Where ``tensor`` begins."""
    return None if tensor is None else tensor.data_ptr()


def map_of(both: MapOf | None) -> Map:
    """Of activations, which must live as long."""
    if both is None:
        return _NO_MAP
    space, data = both
    sizes = space.channels, space.height, space.width, space.border
    return Map(data.data_ptr(), data.shape[1], *sizes)


def norm_of(norm: NormOf, modes: dict[str, int]) -> Norm:
    """Of a BatchNorm; made once."""
    if norm.handle is None:
        four = norm.gamma, norm.beta, norm.running_mean, norm.running_variance
        mean = norm.statistics.data_ptr()
        inverse = mean + norm.statistics.stride(0) * norm.statistics.element_size()
        numbers = norm.momentum, norm.epsilon, modes[norm.mode]
        norm.handle = Norm(*map(address, four), *numbers, mean, inverse)
    return norm.handle


def entries_of(listed: Listed) -> Entries:
    """Of a list of entries; made once."""
    if listed.handle is None:
        lists, at = len(listed.first) - 1, (listed.first.data_ptr(), listed.offset.data_ptr())
        listed.handle = Entries(*at, lists // listed.rows, listed.rows)
    return listed.handle


def positions_of(positions: PositionsOf, group: int = 0) -> Positions:
    """Of so many in a group; made once for each."""
    if group not in positions.handles:
        at = positions.input.data_ptr(), positions.output.data_ptr()
        ahead = positions.channels, positions.input_stride, positions.reach
        positions.handles[group] = Positions(
            *at, positions.count, group, positions.output_stride, *ahead
        )
    return positions.handles[group]


def plane_of(plane: PlaneOf | None) -> Plane:
    """Of the map of one image, which must live as long."""
    if plane is None:
        return _NO_PLANE
    sizes = plane.channels, plane.height, plane.columns, plane.channel, plane.line
    return Plane(plane.data.data_ptr(), *sizes)
