"""Pickles of arrays, lists, dicts, strings and numbers, whoever wrote them.

A pickle says what to call, and with what. Here it reaches nothing but the stand-ins of this file,
under the names of Python 2 and 3 and of old and new NumPy, so it runs no code. Not even NumPy's own
dtype is among them: its pickled state may claim that bytes are the addresses of objects.
"""

import io
import math
import pickle
import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from startsparse.errors import reason

_NONE: Mapping[tuple[str, str], type] = MappingProxyType({})


def loads(data: bytes, classes: Mapping[tuple[str, str], type] = _NONE) -> Any:
    """What the pickle ``data`` holds; strings of Python 2 are read as Latin-1.

    Args:
        classes: (module, name) of other classes -> the class that stands for it. It needs a
            ``__setstate__``, without which a pickle could change the class itself.

    Raises:
        pickle.UnpicklingError: the pickle is damaged or asks for anything else; one line.
    """
    try:
        _check_memo(data)
        return _Unpickler(data, classes).load()
    except Exception as error:  # a damaged pickle raises anything
        raise pickle.UnpicklingError(reason(error)) from error


def _check_memo(data: bytes) -> None:
    """Refuse the number of an object that no pickle of this length has.

    The unpickler makes room for as many objects as the number says: 34 GB for four bytes.
    """
    try:
        for opcode, number, _ in pickletools.genops(data):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(data):
                raise pickle.UnpicklingError(f"it numbers an object {number}")
    except ValueError:
        raise pickle.UnpicklingError("pickle data was truncated or is damaged") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, classes: Mapping[tuple[str, str], type]) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._known = {**_STANDINS, **classes}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._known[module, name]


class _Function:
    """A function that a pickle can call but not change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Dtype:
    """A dtype of numbers or text, known by kind, size and byte order alone."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufcSU][1-9]\d{0,5}", code):
            raise pickle.UnpicklingError(f"it has an array of dtype {code!r}, not of numbers")
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"it has an array of byte order {state[1]!r}")
        self._order = state[1]

    def true(self) -> np.dtype:
        return np.dtype(self._order + self._code)


class _Array(np.ndarray):
    """An array whose state is checked before it is set."""

    def __setstate__(self, state: Any) -> None:
        *_, shape, dtype, fortran, content = state
        fitting: Any = _checked(content, dtype, shape, fortran)
        super().__setstate__((1, shape, *fitting))


def _checked(content: Any, dtype: Any, shape: Any, fortran: Any) -> tuple[np.dtype, bool, bytes]:
    """dtype, order and bytes of an array, if they fit its shape."""
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("it has an array without a dtype")
    if isinstance(content, str):  # Python 2 has no other bytes
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError(f"it has a {type(content).__name__} for the bytes of an array")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise pickle.UnpicklingError("it has an array whose shape is no sizes")
    true = dtype.true()
    if math.prod(shape) * true.itemsize != len(content):
        raise pickle.UnpicklingError("it has an array whose bytes do not fill its shape")
    if true.kind == "U":
        codes = np.frombuffer(content, f"{true.byteorder}u4")
        if codes.max(initial=0) > sys.maxunicode:
            raise pickle.UnpicklingError("it has an array of text that is no text")
    return true, bool(fortran), bytes(content)


def _array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    array = _Array(0)
    array.__setstate__((shape, dtype, order == "F", content))
    return array


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes encoded as {encoding!r}")
    return text.encode("latin1")


_STANDINS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("collections", "defaultdict"): _Function(lambda *_: {}),
    ("_codecs", "encode"): _Function(_encoded),
}
for _module in ("numpy.core", "numpy._core"):
    _STANDINS |= {
        (f"{_module}.multiarray", "_reconstruct"): _Function(lambda *_: _Array(0)),
        (f"{_module}.multiarray", "scalar"): _Function(
            lambda dtype, content: _array(content, dtype, (), "C").item()
        ),
        (f"{_module}.numeric", "_frombuffer"): _Function(_array),
    }
for _module in ("__builtin__", "builtins"):
    _STANDINS |= {
        (_module, "list"): list,  # an argument, as object is
        (_module, "object"): None,
        (_module, "bytes"): _Function(lambda: b""),  # Python 3 writes none so for Python 2
    }
for _module in ("copy_reg", "copyreg"):
    _STANDINS[_module, "_reconstructor"] = _Function(lambda kind, *_: kind())
