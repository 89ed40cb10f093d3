"""The table of the compiled library, against the library."""

import ctypes
import inspect

import pytest
import torch

from startsparse.engine import build, kernels, structs
from startsparse.engine.kernels import CpuKernels, MismatchError, kernels_for
from startsparse.engine.protocol import Kernels

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def path():
    kernels_for(torch.float32)
    return build.opened(torch.float32, lambda path: path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_above_32_bits_arrive_whole(dtype):
    library = build.opened(dtype, kernels.load)
    width = library.scratch_size(1, 65)  # numbers of a vector register
    assert width in (1, 2, 4, 8, 16)
    for count in (2**27 + 1, 2**31 + 3, 2**40 + 1):
        assert library.scratch_size(count, 2**31 + 64) == count * width
        assert library.whole_scratch_size(count, 5) == 8 * count * width


def test_a_function_that_is_not_there_is_named(path, monkeypatch):
    monkeypatch.setitem(kernels.FUNCTIONS, "gatherer", (None, [ctypes.c_bool]))
    with pytest.raises(MismatchError, match=r"^the kernels have no function gatherer: none \(bool"):
        kernels.load(path)


@pytest.mark.parametrize(
    ("result", "arguments"),
    [
        (ctypes.c_int64, [ctypes.c_int64, ctypes.c_int32]),
        (ctypes.c_int64, [ctypes.c_int64]),
        (ctypes.c_int32, [ctypes.c_int64, ctypes.c_int64]),
        (None, [ctypes.c_int64, structs.Map]),
    ],
)
def test_a_wrong_type_is_named(path, monkeypatch, result, arguments):
    monkeypatch.setitem(kernels.FUNCTIONS, "scratch_size", (result, arguments))
    reason = r"^the kernel scratch_size is int64 \(int64, int64\), and in kernels.py "
    with pytest.raises(MismatchError, match=reason):
        kernels.load(path)


def test_a_structure_of_another_size_is_named(path, monkeypatch):
    class Map(ctypes.Structure):
        _fields_ = structs.Map._fields_[:-1]

    mapped = {structs.Map: Map}
    changed = {
        name: (result, [mapped.get(kind, kind) for kind in arguments])
        for name, (result, arguments) in kernels.FUNCTIONS.items()
    }
    monkeypatch.setattr(kernels, "FUNCTIONS", changed)
    monkeypatch.setattr(kernels, "_NAMES", kernels._NAMES | {Map: "Map"})
    monkeypatch.setattr(structs, "STRUCTURES", [mapped.get(k, k) for k in structs.STRUCTURES])
    with pytest.raises(MismatchError, match="structure Map has 48 bytes, and in kernels.py 40"):
        kernels.load(path)


def test_a_constant_that_is_not_there_is_named(path):
    with pytest.raises(MismatchError, match="no constant 'rows'"):
        kernels._constant(kernels.load(path), "rows")


def test_every_exported_function_is_in_the_table():
    """A kernel that the table lacks would be called without types."""
    sources = "".join(file.read_text() for file in build._FOLDER.glob("*.cpp"))
    exported = [line[9:-1] for line in sources.splitlines() if line.startswith("EXPORTED(")]
    assert sorted(exported) == sorted(kernels.FUNCTIONS)


def test_cpus_have_every_kernel_of_the_protocol():
    asked = {name: f for name, f in vars(Kernels).items() if inspect.isfunction(f)}
    asked = {name: f for name, f in asked.items() if not name.startswith("_")}
    for name, function in asked.items():
        parameters = inspect.signature(getattr(CpuKernels, name)).parameters
        assert list(parameters) == list(inspect.signature(function).parameters), name
    for name in Kernels.__annotations__:
        assert isinstance(getattr(kernels_for(torch.float32), name), int), name
    assert len(asked) > 15
