"""The kernels of CPUs: the functions of the compiled library, behind what `protocol` asks for."""

# ruff: noqa: D102 - protocol.py says what each method does

from __future__ import annotations

import ctypes
import functools
from ctypes import c_bool, c_char_p, c_int32, c_int64, c_void_p
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from startsparse.engine import build, memory, structs
from startsparse.engine.compiler import NoKernelsError
from startsparse.engine.protocol import Call, Kernels, Norm, Plane
from startsparse.engine.structs import (
    address,
    entries_of,
    map_of,
    norm_of,
    plane_of,
    positions_of,
)

if TYPE_CHECKING:
    from startsparse.engine.entries import Listed, Positions
    from startsparse.engine.protocol import Map


_NAMES: dict[type | None, str] = {
    **{None: "none", c_bool: "bool", c_int32: "int32", c_int64: "int64", c_void_p: "pointer"},
    **{kind: kind.__name__ for kind in structs.STRUCTURES},
}
_B, _I, _N, _P = c_bool, c_int32, c_int64, c_void_p
_MAP, _NORM, _PLANE = structs.Map, structs.Norm, structs.Plane
_ENTRIES, _POSITIONS = structs.Entries, structs.Positions

# Every exported function: what it returns, and its arguments.
FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    # lists.cpp
    "count_entries": (None, [_P, _N, _N, _N, _N, _P]),
    "list_entries": (None, [_P, _N, _N, _N, _N, _P, _P]),
    "count_transposed": (None, [_ENTRIES, _P, _I, _I, _P, _I, _P]),
    "list_transposed": (None, [_ENTRIES, _P, _I, _I, _P, _I, _P, _P]),
    "set_offsets": (None, [_P, _P, _N, _N, _N, _N, _P, _N, _P]),
    "list_nonzero": (None, [_P, _P, _P, _P, _N, _P, _P, _P, _P]),
    # products.cpp
    "gather": (None, [_P, _P, _P, _ENTRIES, _POSITIONS, _B]),
    "weight_gradient": (None, [_P, _P, _P, _P, _ENTRIES, _POSITIONS]),
    "scratch_size": (_N, [_N, _N]),
    # whole.cpp
    "whole_gather": (None, [_P, _P, _P, _P, _N, _N, _POSITIONS, _B]),
    "whole_weight_gradient": (None, [_P, _P, _P, _P, _P, _N, _N, _POSITIONS]),
    "whole_scratch_size": (_N, [_N, _N]),
    # winograd.cpp
    "winograd_gather": (None, [_MAP, _MAP, _P, _N, _N, _P, _B]),
    "winograd_weight_gradient": (None, [_MAP, _MAP, _P, _N, _N, _P]),
    "winograd_scratch_size": (_N, [_MAP, _MAP]),
    # affine.cpp, pooling.cpp
    "affine": (None, [_MAP, _B, _P, _NORM, _MAP, _B, _N, _MAP]),
    "affine_backward": (None, [_MAP, _MAP, _MAP, _B, _NORM, _B, _N, _MAP, _MAP, _P, _P, _P]),
    "max_pool": (None, [_MAP, _N, _N, _N, _MAP]),
    "max_pool_backward": (None, [_MAP, _MAP, _MAP, _N, _N, _N, _MAP]),
    # planes.cpp
    "split": (None, [_PLANE, _N, _N, _PLANE]),
    "plane_affine": (None, [_PLANE, _B, _P, _NORM, _PLANE, _B, _PLANE]),
    "plane_max_pool": (None, [_PLANE, _N, _N, _N, _PLANE]),
    "plane_mean": (None, [_PLANE, _PLANE]),
    "dot": (None, [_P, _P, _P, _P, _N, _P]),
    # constants.cpp
    "constant": (_N, [_P]),
}


class MismatchError(NoKernelsError):
    """The library is not what the table says."""


def load(path: Path) -> ctypes.CDLL:
    """The compiled library; its functions take Python's numbers, and addresses as such.

    Raises:
        MismatchError: names the first function or structure that differs from the table here.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        here = f"{_NAMES[result]} ({', '.join(_NAMES[kind] for kind in arguments)})"
        try:
            function, signature = getattr(library, name), getattr(library, f"{name}_signature")
        except AttributeError:
            raise MismatchError(f"the kernels have no function {name}: {here}") from None
        signature.restype, signature.argtypes = c_char_p, []
        if (there := signature().decode()) != here:
            raise MismatchError(f"the kernel {name} is {there}, and in kernels.py {here}")
        function.restype, function.argtypes = result, arguments
    for kind in structs.STRUCTURES:
        name = kind.__name__
        own, size = ctypes.sizeof(kind), _constant(library, f"size of {name}")
        if own != size:
            raise MismatchError(f"the structure {name} has {size} bytes, and in kernels.py {own}")
    return library


def _constant(library: ctypes.CDLL, name: str) -> int:
    text = ctypes.create_string_buffer(name.encode())
    value = library.constant(ctypes.addressof(text))
    if value == -1:
        raise MismatchError(f"the kernels have no constant {name!r}")
    return value


@functools.cache
def kernels_for(dtype: torch.dtype) -> Kernels:
    """The kernels for float32 or float64.

    Raises:
        NoKernelsError: the library is not there and cannot be built; says in one line why.
    """
    return build.opened(dtype, lambda path: CpuKernels(load(path)))


class CpuKernels:
    """`Kernels` by the compiled library."""

    def __init__(self, library: ctypes.CDLL):
        self._c = library
        known = partial(_constant, library)
        self.lanes, self.sums, self.rows_at_once = map(known, ("lanes", "sums", "rows_at_once"))
        self.no_tap = known("no_tap")
        self._modes = {mode: known(mode) for mode in ("plain", "running", "batch")}

    def list_entries(self, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
        rows, channels, taps = mask.shape
        sizes = mask.data_ptr(), rows, channels, taps, size
        counts = torch.zeros(-(-channels // size) * rows + 1, dtype=torch.int32)
        self._c.count_entries(*sizes, counts[1:].data_ptr())
        first = counts.cumsum(0, dtype=torch.int32)
        flat = torch.empty(int(first[-1]), dtype=torch.int32)
        self._c.list_entries(*sizes, first.data_ptr(), flat.data_ptr())
        return first, flat

    def list_transposed(
        self, entries: Listed, flat: Tensor, channels: int, tap: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        what = entries_of(entries), flat.data_ptr(), channels, len(tap), tap.data_ptr(), size
        counts = torch.zeros(-(-entries.rows // size) * channels + 1, dtype=torch.int32)
        self._c.count_transposed(*what, counts[1:].data_ptr())
        first = counts.cumsum(0, dtype=torch.int32)
        order, following = torch.empty(int(first[-1]), dtype=torch.int32), first.clone()
        self._c.list_transposed(*what, following.data_ptr(), order.data_ptr())
        return first, order

    def set_offsets(
        self, offset: Tensor, flat: Tensor, order: Tensor | None, divisor: int, modulus: int,
        stride: int, tap: Tensor,
    ) -> None:  # fmt: skip
        sizes = len(offset), divisor, modulus, stride
        taps = tap.data_ptr(), len(tap)
        self._c.set_offsets(flat.data_ptr(), address(order), *sizes, *taps, offset.data_ptr())

    def list_nonzero(
        self, entries: Listed, order: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, most = torch.empty_like(entries.first), int(values.count_nonzero())
        offset, order_left = torch.empty(2, most, dtype=torch.int32)
        left = torch.empty(most, dtype=values.dtype)
        pointers = (t.data_ptr() for t in (entries.first, entries.offset, order, values))
        results = (t.data_ptr() for t in (first, offset, order_left, left))
        self._c.list_nonzero(*pointers, len(first) - 1, *results)
        count = int(first[-1])  # a phase of a strided convolution has not all of them
        return first, offset[:count], order_left[:count], left[:count]

    def gather(
        self, x: Tensor, y: Tensor, values: Tensor, entries: Listed, positions: Positions, add: bool
    ) -> None:
        where = positions_of(positions, entries.group)
        maps = x.data_ptr(), y.data_ptr()
        self._c.gather(*maps, values.data_ptr(), entries_of(entries), where, add)

    def weight_gradient(
        self, x: Tensor, d_y: Tensor, entries: Listed, positions: Positions
    ) -> Tensor:
        gradient = x.new_empty(entries.count)
        scratch = self._scratch(x, self._c.scratch_size(entries.count, positions.count))
        pointers = (t.data_ptr() for t in (x, d_y, gradient, scratch))
        where = positions_of(positions, entries.group)
        self._c.weight_gradient(*pointers, entries_of(entries), where)
        return gradient

    def whole_gather(
        self, x: Tensor, y: Tensor, packed: Tensor, offset: Tensor, rows: int,
        positions: Positions, add: bool,
    ) -> None:  # fmt: skip
        pointers = (t.data_ptr() for t in (x, y, packed, offset))
        self._c.whole_gather(*pointers, len(offset), rows, positions_of(positions), add)

    def whole_weight_gradient(
        self, x: Tensor, d_y: Tensor, offset: Tensor, rows: int, positions: Positions
    ) -> Tensor:
        sizes, four = (len(offset), rows), self.rows_at_once
        scratch = self._scratch(x, self._c.whole_scratch_size(*sizes))
        packed = x.new_empty(-(-rows // four) * four * len(offset))
        pointers = (t.data_ptr() for t in (x, d_y, packed, scratch, offset))
        self._c.whole_weight_gradient(*pointers, *sizes, positions_of(positions))
        return packed

    def winograd_gather(
        self, x: Map, y: Map, packed: Tensor, padding: tuple[int, int], add: bool
    ) -> None:
        maps = map_of(x), map_of(y)
        scratch = self._scratch(packed, self._c.winograd_scratch_size(*maps))
        self._c.winograd_gather(*maps, packed.data_ptr(), *padding, scratch.data_ptr(), add)

    def winograd_weight_gradient(
        self, x: Map, d_y: Map, size: int, padding: tuple[int, int]
    ) -> Tensor:
        maps, packed = (map_of(x), map_of(d_y)), x[1].new_empty(size)
        scratch = self._scratch(packed, self._c.winograd_scratch_size(*maps))
        self._c.winograd_weight_gradient(*maps, packed.data_ptr(), *padding, scratch.data_ptr())
        return packed

    def affine(
        self, y: Map, first: bool, bias: Tensor | None, norm: Norm, residual: Map | None,
        relu: bool, last: int, z: Map,
    ) -> None:  # fmt: skip
        how, other = norm_of(norm, self._modes), map_of(residual)
        self._c.affine(map_of(y), first, address(bias), how, other, relu, last, map_of(z))

    def affine_backward(
        self, d_z: Map, z: Map | None, y: Map, first: bool, norm: Norm, relu: bool, last: int,
        d_y: Map, d_residual: Map | None, d_gamma: Tensor, d_beta: Tensor, d_bias: Tensor,
    ) -> None:  # fmt: skip
        learned = d_gamma.data_ptr(), d_beta.data_ptr(), d_bias.data_ptr()
        self._c.affine_backward(
            map_of(d_z), map_of(z), map_of(y), first, norm_of(norm, self._modes), relu, last,
            map_of(d_y), map_of(d_residual), *learned,
        )  # fmt: skip

    def max_pool(self, x: Map, kernel: int, stride: int, padding: int, y: Map) -> None:
        self._c.max_pool(map_of(x), kernel, stride, padding, map_of(y))

    def max_pool_backward(
        self, d_y: Map, y: Map, x: Map, kernel: int, stride: int, padding: int, d_x: Map
    ) -> None:
        maps = map_of(d_y), map_of(y), map_of(x)
        self._c.max_pool_backward(*maps, kernel, stride, padding, map_of(d_x))

    def plane_gather(
        self, x: Tensor, y: Tensor, values: Tensor, entries: Listed, positions: Positions
    ) -> Call:
        pointers = (t.data_ptr() for t in (x, y, values))
        where = positions_of(positions, entries.group)
        return self._prepared("gather", *pointers, entries_of(entries), where, False)

    def split(self, x: Plane, stride: tuple[int, int], y: Plane) -> Call:
        return self._prepared("split", plane_of(x), *stride, plane_of(y))

    def plane_affine(
        self, y: Plane, first: bool, bias: Tensor | None, norm: Norm, residual: Plane | None,
        relu: bool, z: Plane,
    ) -> Call:  # fmt: skip
        how, other = norm_of(norm, self._modes), plane_of(residual)
        before = plane_of(y), first, address(bias), how, other, relu
        return self._prepared("plane_affine", *before, plane_of(z))

    def plane_max_pool(self, x: Plane, kernel: int, stride: int, padding: int, y: Plane) -> Call:
        sizes = kernel, stride, padding
        return self._prepared("plane_max_pool", plane_of(x), *sizes, plane_of(y))

    def plane_mean(self, x: Plane, y: Plane) -> Call:
        return self._prepared("plane_mean", plane_of(x), plane_of(y))

    def dot(self, x: Plane, y: Tensor, values: Tensor, entries: Listed) -> Call:
        pointers = (t.data_ptr() for t in (x.data, values, entries.first, entries.offset))
        return self._prepared("dot", *pointers, entries.rows, y.data_ptr())

    def _prepared(self, name: str, *arguments: object) -> Call:
        """The function with its arguments, which are converted now and not at each call."""
        function, kinds = self._c[name], FUNCTIONS[name][1]
        function.restype = None
        pairs = zip(kinds, arguments)
        return partial(function, *(a if isinstance(a, kind) else kind(a) for kind, a in pairs))

    def _scratch(self, like: Tensor, size: int) -> Tensor:
        return memory.empty([size], like.dtype)
