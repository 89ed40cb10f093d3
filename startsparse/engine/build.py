"""The compiled kernels: built once on first use, kept for the next, one library per dtype.

The name of a library in the cache has a key of what it was made from, one of the compiler, and a
checksum of its content: a damaged library would end the process by a signal. A new library is
renamed into its place. So processes that build at the same time need no lock, which some network
file systems do not have.
"""

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

import startsparse
from startsparse.engine.compiler import Compiler, NoKernelsError, find_compiler, split
from startsparse.errors import one_line

log = logging.getLogger("startsparse")

T = TypeVar("T")

_FOLDER, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
_SCALARS = {torch.float32: "float", torch.float64: "double"}
# What PyTorch calls the instructions of this CPU -> how its vector types and g++ are told.
_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-DCPU_CAPABILITY_AVX512",
    ],
}
_WORK = ".startsparse-building-"  # begins the names of temporary folders
_FORGOTTEN = 3600  # seconds after which one is of no live build, which would have timed out
_ITS_OWN = "this run has kernels of its own"
_REMEDY = "STARTSPARSE_CACHE names another folder"


def opened(dtype: torch.dtype, load: Callable[[Path], T]) -> T:
    """What ``load`` makes of the library for float32 or float64, which is built if need be.

    A library that is damaged or cannot be loaded is built anew. Where the cache cannot be used it
    is built in a temporary folder, which is gone when this returns.

    Args:
        load: raises OSError or NoKernelsError if the library is not as it should be.

    Raises:
        NoKernelsError: there is none and it cannot be built; says in one line why.
    """
    stem, cache = _stem(dtype), startsparse.cache_folder()
    compiler = _compiler()
    # If there is no compiler, a library that any has built will do.
    key = compiler.key if isinstance(compiler, Compiler) else "*"
    kept = _kept(cache, f"{stem}-{key}-") if cache else None
    noexec = cache is not None and _noexec(cache)
    if kept and not noexec:
        try:
            return load(kept)
        except (OSError, NoKernelsError):
            with suppress(OSError):
                kept.unlink()
            kept = None
    if not kept and isinstance(compiler, NoKernelsError):
        raise compiler

    def built(work: Path) -> Path:
        if isinstance(compiler, NoKernelsError):
            raise compiler
        log.info("building the sparse kernels, about 15 s, once")
        return compiled(compiler, dtype, sorted(_FOLDER.glob("*.cpp")), work)

    if cache is None:
        reason = "there is no home folder for the kernels"
    elif noexec:
        reason = f"no program can be loaded from {cache}, which is mounted noexec"
    else:
        try:
            with _work(cache) as work:
                new = built(work)
                result = _loaded(load, new)
                with suppress(OSError):  # the next run builds it again
                    new.replace(cache / f"{stem}-{key}-{_checksum(new)}.so")
                return result
        except OSError as error:
            reason = f"{cache} cannot be written ({error.strerror})"
    try:
        with _work(Path(tempfile.gettempdir())) as work:
            if _noexec(work):
                raise NoKernelsError(f"{reason}, nor from {work.parent}; {_REMEDY}")
            log.warning("warning: %s: %s; %s", one_line(reason), _ITS_OWN, _REMEDY)
            if kept:
                with suppress(OSError, NoKernelsError):
                    return load(Path(shutil.copy(kept, work)))
            return _loaded(load, built(work))
    except OSError as error:
        why = f"{reason}, nor a temporary folder ({error.strerror}); {_REMEDY}"
        raise NoKernelsError(why) from None


def _compiler() -> Compiler | NoKernelsError:
    try:
        return find_compiler()
    except NoKernelsError as error:
        return error


def _flags(dtype: torch.dtype) -> list[str]:
    """How to compile for numbers of ``dtype`` and for this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        *("-std=c++20", "-O3", "-fPIC", "-fopenmp"),
        *_FLAGS.get(capability, []),
        *(f"-DCPU_CAPABILITY={capability}", f"-DSCALAR={_SCALARS[dtype]}"),
        *("-isystem", str(_TORCH / "include")),
        *split("STARTSPARSE_CXXFLAGS"),
    ]


def _stem(dtype: torch.dtype) -> str:
    """Begins the name of a library: its dtype, and a key of sources, flags and libraries."""
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
    texts = [(path.name, path.read_bytes()) for path in sources]
    machine = platform.system(), platform.machine(), platform.libc_ver()
    key = repr((_flags(dtype), torch.__version__, machine, texts))
    return f"{_SCALARS[dtype]}-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"


def _checksum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()


def _kept(cache: Path, begin: str) -> Path | None:
    """The library in the cache whose name begins so, and whose content is whole.

    Damaged ones are deleted: loading a truncated library ends the process.
    """
    found = None
    with suppress(OSError):
        for path in sorted(cache.glob(f"{begin}*.so")):
            with suppress(OSError):
                if path.stem.endswith(f"-{_checksum(path)}"):
                    found = found or path
                else:
                    path.unlink()
    return found


def _noexec(folder: Path) -> bool:
    """Whether no program can be loaded from the file system of ``folder``."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with suppress(OSError):
        return bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))
    return False


def _loaded(load: Callable[[Path], T], path: Path) -> T:
    try:
        return load(path)
    except OSError as error:
        raise NoKernelsError(f"the kernels that were built cannot be loaded ({error})") from None


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
    """A temporary folder in ``folder``; deletes those that a killed build has left there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{_WORK}{_machine()}-{os.getpid()}-", dir=folder, ignore_cleanup_errors=True
    ) as name:
        now = Path(name).stat().st_mtime  # by the clock of the file system
        for other in folder.glob(f"{_WORK}*"):
            if _is_left(other, now):
                shutil.rmtree(other, ignore_errors=True)
        yield Path(name)


def _is_left(work: Path, now: float) -> bool:
    """Whether a `_work` folder is of a process that is gone."""
    machine, _, pid = work.name.removeprefix(_WORK).partition("-")
    with suppress(OSError):
        if work.stat().st_mtime < now - _FORGOTTEN:
            return True
    try:
        if machine == _machine():
            os.kill(int(pid.partition("-")[0]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):  # another user's
        return False
    return False


def _machine() -> str:
    """A key of what numbers processes: this machine since its start, or a container."""
    facts = [platform.node()]
    with suppress(OSError):  # no Linux
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()


def compiled(compiler: Compiler, dtype: torch.dtype, sources: Sequence[Path], work: Path) -> Path:
    """The library of these sources for numbers of ``dtype``, in the folder ``work``.

    Raises:
        NoKernelsError: the compiler fails.
        OSError: ``work`` cannot be written.
    """
    flags, library = [*_flags(dtype), f"-I{_FOLDER}"], work / "library.so"
    objects = [f"{work}/{source.stem}.o" for source in sources]
    # Most of the time goes into PyTorch's headers.
    jobs = [[*flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects)]
    compiler.run(jobs, work)
    link = ["-shared", f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    compiler.run([[*flags, *objects, *link, "-o", str(library)]], work)
    return library
