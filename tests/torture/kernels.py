"""Kernels wherever they are built and kept, and the same bits for any number of threads."""

import contextlib
import pwd
import tempfile

import kernel_cache as kernels
import torch
from hypothesis import strategies as st

from startsparse.engine import build
from startsparse.engine.compiler import NoKernelsError, find_compiler
from torture.promises import promise

HOMES = ["plain", "none", "a file", "below a file"]
CACHES = ["", "folder", "odd name", "relative", "a file", "below a file", "noexec", "~/cache"]
TEMPORARY = ["plain", "plain", "noexec", "below a file"]
# What lies in the cache under the name that the library should have, or would fit.
LIBRARIES = [
    *("none", "whole", "of another compiler", "truncated", "empty", "text"),
    *("without symbols", "folder", "broken link", "of an older version"),
]


@contextlib.contextmanager
def _set(case, folder):
    """The environment of a case; yields the folder of the cache, None if there is none."""
    home, cache, temporary, compiler, _ = case
    file = folder / "file"
    file.write_text("")
    homes = {"none": None, "a file": str(file), "below a file": f"{file}/home"}
    named = {
        "folder": str(folder / "cache"),
        "odd name": str(folder / "a 'cache',\n\u00e9"),
        "relative": "cache",
        "a file": str(file),
        "below a file": f"{file}/cache",
        "noexec": str(folder / "noexec"),
        "~/cache": "~/cache",
    }
    places = {"below a file": file / "tmp", "noexec": folder / "tmp noexec"}
    place = places.get(temporary, folder / "tmp")
    if temporary != "below a file":
        place.mkdir()
    variables = {
        "HOME": homes.get(home, str(folder / "home")),
        "STARTSPARSE_CACHE": named.get(cache),
        "CXX": kernels.cxx(compiler, folder),
    }
    with kernels.environment(compiler, **variables) as patch:
        patch.chdir(folder)
        patch.setattr(build.log, "disabled", True)
        patch.setattr(tempfile, "tempdir", str(place))
        patch.setattr(build, "_noexec", lambda path: "noexec" in str(path))
        if home == "none":
            patch.setattr(pwd, "getpwuid", _unknown)
        yield


def _unknown(uid):
    raise KeyError(uid)


def _put(kind, cache):
    """A library of this kind into the cache."""
    key, whole = "0" * 12, kernels.library().read_bytes()
    if kind != "of another compiler":
        with contextlib.suppress(NoKernelsError):
            key = find_compiler().key
    path = cache / f"{kernels.stem(key)}{build._checksum(kernels.library())}.so"
    if kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "of an older version":
        (cache / f"float-{'0' * 24}.so").write_bytes(whole)
    elif kind == "without symbols":
        path.write_bytes(whole[:100])
        path.rename(cache / f"{kernels.stem(key)}{build._checksum(path)}.so")
    elif kind != "none":
        damaged = {"truncated": whole[:-4096], "empty": b"", "text": b"no library\n"}
        path.write_bytes(damaged.get(kind, whole))


# Without a compiler that answers, a library of any other will do.
SILENT = ("missing", "quote", "no program", "folder", "not executable", "hangs")
COMMANDS = len([*build._FOLDER.glob("*.cpp")]) + 1

CASES = st.tuples(*map(st.sampled_from, (HOMES, CACHES, TEMPORARY, kernels.COMPILERS, LIBRARIES)))


@promise(
    "Kernels are built where they can be, or one line says why not", CASES, cases=1000, sample=15
)
def kernels_or_one_line(case, folder):
    _, named, temporary, compiler, kind = case
    with _set(case, folder):
        cache = build.startsparse.cache_folder()
        writable = cache is not None and "file" not in f"{cache}".replace(str(folder), "")
        if writable:
            cache.mkdir(parents=True)
            _put(kind, cache)
        noexec = named == "noexec"
        there = writable and (
            kind == "whole" or (kind == "of another compiler" and compiler in SILENT)
        )
        can = temporary == "plain"
        expected = (there or compiler in kernels.USABLE) and (can or (writable and not noexec))
        for _ in range(2):
            try:
                assert kernels.works(kernels.opened())
                assert expected
            except NoKernelsError as error:
                assert not expected, error
                assert len(str(error).splitlines()) == 1, error
                assert str(error).isprintable()
        assert not [*folder.rglob(f"{build._WORK}*")]
        if expected and writable and not noexec and not there and kind != "folder":
            assert kernels.runs(folder) == COMMANDS  # the second time it was found


@promise(
    "Kernels give the same bits with 1 to 4 threads",
    st.tuples(
        st.sampled_from(["listed", "whole", "winograd"]),
        st.sampled_from([torch.float32, torch.float64]),
        *[st.integers(1, 40)] * 2,
        st.integers(3, 20),
        st.integers(1, 70),
        st.sampled_from([0.1, 0.5, 1.0]),
    ),
    cases=500,
    sample=10,
)
def same_bits_with_any_number_of_threads(case, folder):
    import test_engine_exact

    test_engine_exact.check_product_bits(*case)
