"""The compiled kernels: built once on first use, kept for the next, one library per dtype."""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import startsparse
from startsparse import stopping
from startsparse.atomic import replacing
from startsparse.errors import UserError

log = logging.getLogger("startsparse")

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


class NoCompilerError(UserError):
    """The kernels are not there and cannot be built."""


def built(dtype: torch.dtype) -> Path:
    """The library of the kernels for float32 or float64, which is built if it is not there.

    Raises:
        NoCompilerError: no C++ compiler, or it fails; says in one line why.
    """
    command = compiler(dtype)
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
    texts = [(path.name, path.read_bytes()) for path in sources]
    key = repr((command, torch.__version__, texts))
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    path = startsparse.cache_folder() / f"{_SCALARS[dtype]}-{digest}.so"
    if not path.exists():
        if not shutil.which(command[0]):
            reason = f"there is no C++ compiler {command[0]} (set CXX, or install g++)"
            raise NoCompilerError(reason)
        log.info("building the sparse kernels, about 15 s, once")
        build(command, sorted(_FOLDER.glob("*.cpp")), path)
    return path


def compiler(dtype: torch.dtype) -> list[str]:
    """The command that compiles for numbers of ``dtype`` and for this CPU, without files."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        *(os.environ.get("CXX", "g++"), "-std=c++20", "-O3", "-fPIC", "-fopenmp"),
        *_FLAGS.get(capability, []),
        *(f"-DCPU_CAPABILITY={capability}", f"-DSCALAR={_SCALARS[dtype]}"),
        *("-isystem", str(_TORCH / "include")),
        *shlex.split(os.environ.get("STARTSPARSE_CXXFLAGS", "")),
    ]


def build(command: list[str], sources: Sequence[Path], path: Path) -> None:
    """Compile to ``path``; two processes that do so at the same time do not disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = ["-shared", f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    with replacing(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:  # most of the time goes into PyTorch's headers
            commands = [
                [*command, "-c", str(source), "-o", target]
                for source, target in zip(sources, objects)
            ]
            list(pool.map(_run, commands))
        _run([*command, *objects, *link, "-o", str(temporary)])


def _run(command: list[str]) -> None:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    stopping.adopt(process)
    _, said = process.communicate()
    if process.returncode:
        lines = [line for line in said.splitlines() if "error" in line]
        reason = lines[0].strip() if lines else f"exit code {process.returncode}"
        raise NoCompilerError(f"{command[0]} cannot build the sparse kernels: {reason}")
