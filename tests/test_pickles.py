"""Pickles: numbers, text and containers come back, and nothing else is ever called."""

import pickle
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from data_files import pixels, python2_pickle

from startsparse.data import pickles

VALUES = {
    "images": pixels(2, 5, 3),
    "fortran": np.asfortranarray(pixels(4, 3)),
    "big-endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "floats": np.array([0.5, -np.inf]),
    "bools": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "text": np.array(["é", "long"]),
    "big-endian text": np.array(["é", "long"]).astype(">U4"),
    "no text": np.array([], "U4"),
    "bytes": np.array([b"ab", b"c"]),
    "scalar": np.array(3),
}


def array(dtype, shape=b"(K\x02t", data=b"U\x02ab"):
    """A pickled uint8 array of two numbers, with another dtype, shape or data if given."""
    new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return b"\x80\x02" + new + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


def dtype(code, state=b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"):
    return b"cnumpy\ndtype\n(U" + bytes([len(code)]) + code + b"K\x00K\x01tR" + state + b"b"


BYTE = dtype(b"u1")


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_text_and_containers_come_back(protocol):
    content = {"list": [1, 2.5, None, True, 10**30], b"raw": (b"\xff", "é"), "deep": {"a": [{}]}}
    content["graph"] = defaultdict(list, {0: [1, 2]})
    assert pickles.loads(pickle.dumps(content, protocol)) == content
    arrays = pickles.loads(pickle.dumps(VALUES, protocol))
    for name, expected in VALUES.items():
        assert arrays[name].dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(arrays[name], expected)
    labels = pickles.loads(pickle.dumps([np.int64(3), np.uint8(4), np.True_], protocol))
    assert labels == [3, 4, True] and type(labels[0]) is int


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_old_and_new_numpy(module):
    for protocol in (2, 4, 5):
        data = pickle.dumps(VALUES["images"], protocol)
        other = {"numpy.core": "numpy._core", "numpy._core": "numpy.core"}[module]
        for name in (b"multiarray", b"numeric"):
            old, new = (f"{m}.{name.decode()}".encode() for m in (other, module))
            if protocol > 3:  # a length comes before the name
                old, new = (bytes([len(x)]) + x for x in (old, new))
            data = data.replace(old, new)
        if protocol > 3:  # and one before the whole
            data = data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]
        np.testing.assert_array_equal(pickles.loads(data), VALUES["images"])


def test_python_2():
    value = {b"data": pixels(3, 4), b"labels": [1, 2], b"name": b"\xe9"}
    with warnings.catch_warnings():  # of NumPy 2.4.0 to 2.4.4, about dtypes
        warnings.simplefilter("error")
        found = pickles.loads(python2_pickle(value))
    np.testing.assert_array_equal(found["data"], value[b"data"])
    assert (found["labels"], found["name"]) == ([1, 2], "é")
    np.testing.assert_array_equal(pickles.loads(array(BYTE)), [97, 98])


class Runs:
    """Creates a file when a pickle of it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(6))
def test_no_code_runs(tmp_path, protocol):
    path = tmp_path / "ran"
    objects = np.array([1, Runs(path)], dtype=object)
    for value in (Runs(path), {"data": [Runs(path)]}, objects, {"data": objects}):
        data = pickle.dumps(value, protocol)
        with pytest.raises(pickle.UnpicklingError, match="^it (asks for|has an array of dty)"):
            pickles.loads(data)
        assert not path.exists()
        pickle.loads(data)
        assert path.exists()  # the plain unpickler does run it
        path.unlink()


# Bytes that would be taken for the address of an object, if a pickle could say so.
FIELDS = b"NU\x01f\x85}U\x01f" + dtype(b"O8") + b"K\x00\x86s"
HOLLOW = dtype(b"V8", b"(K\x03U\x01|" + FIELDS + b"K\x08K\x01K\x00t")
EVIL = {
    "it asks for os.system": b"cos\nsystem\n(U\x02lstR.",
    "it asks for builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
    "it asks for numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "it asks for numpy.load": b"cnumpy\nload\n.",
    "it has an array of dtype 'O8'": array(dtype(b"O8"), data=b"](K\x01K\x02e"),
    "it has an array of dtype 'V8'": array(HOLLOW, data=b"U\x10" + bytes(16)),
    "it has an array of dtype 'u1,O'": array(dtype(b"u1,O")),
    "it has an array of byte order 'O,'": array(dtype(b"u1", b"(K\x03U\x02O,NNNK\x00K\x00K\x00t")),
    "it has an array of text that": array(dtype(b"U1"), b"(K\x01t", b"U\x04\xff\xff\xff\xff"),
    "it has an array without a dtype": array(b"U\x02u1"),
    "it has a list for the bytes": array(BYTE, data=b"](K\x01K\x02e"),
    "it has an array whose bytes do not fill": array(BYTE, b"(K\x03t"),
    "it has an array whose shape": array(BYTE, b"(J\xff\xff\xff\xffJ\xfe\xff\xff\xfft"),
    "it changes a function": b"cnumpy.core.multiarray\nscalar\n}b.",
    "it has bytes encoded as 'rot13'": b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x05rot13tR.",
    "it numbers an object 2147483647": b"\x80\x02]r\xff\xff\xff\x7f.",
    "it numbers an object 268435455": b"]p268435455\n.",
    "pickle data was truncated": array(BYTE)[:40],
    "pickle data was truncated or": b"",
    "pickle data was truncated or is": b"\x80\x04\x8e" + (1 << 32).to_bytes(8, "little") + b".",
}  # fmt: skip


@pytest.mark.parametrize("message", EVIL)
def test_what_is_refused_is_said_on_one_line(message):
    with pytest.raises(pickle.UnpicklingError) as error:
        pickles.loads(EVIL[message])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


class Standin:
    def __setstate__(self, state):
        self.state = state


def test_other_classes_are_filled_and_not_changed():
    classes = {("far.away", "Thing"): Standin}
    name = b"\x80\x02cfar.away\nThing\n"
    state = b"}U\x01aK\x01s"
    thing = pickles.loads(name + b")\x81" + state + b"b.", classes)
    assert isinstance(thing, Standin) and thing.state == {"a": 1}
    for target in (name, b"\x80\x02cnumpy\ndtype\n", b"\x80\x02c__builtin__\nlist\n"):
        for change in (state, b"N" + state + b"\x86"):  # its __dict__, its attributes
            with pytest.raises(pickle.UnpicklingError):
                pickles.loads(target + change + b"b.", classes)
    assert not hasattr(Standin, "a")
    with pytest.raises(pickle.UnpicklingError, match="it asks for far.away.Thing"):
        pickles.loads(name + b".")
