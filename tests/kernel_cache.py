"""Caches, homes and compilers for the tests of how the kernels are built and kept.

The compilers are shell scripts; the good ones copy a library that was built before.
"""

import shlex
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from startsparse.engine import build, compiler, kernels

GOOD = """
for word in "$@"; do [ "$word" = --version ] && echo quick 1.0 && exit; done
echo >> {folder}/runs
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
case $out in *.so) cp {library} "$out";; *) : > "$out";; esac
"""

# Compilers: what they do. Those of USABLE build the library.
SCRIPTS = {
    "good": GOOD,
    "fails": "echo 'x.cpp:1: error: no such thing'; exit 1",
    "silent": "exit 3",
    "latin": "printf 'error: \\351\\033[1m\\n'; exit 1",
    "killed": "kill -9 $$",
    "hangs": "sleep 60",
    "hangs later": GOOD.replace("echo >> {folder}/runs", "sleep 60"),
    "writes nothing": "exit 0",
    "full disk": "echo 'error: cannot write: No space left on device'; exit 1",
}
USABLE = ("good", "words", "launcher")
COMPILERS = [*USABLE, *(name for name in SCRIPTS if name != "good")]
COMPILERS += ["missing", "quote", "no program", "folder", "not executable"]


@cache
def library() -> Path:
    """A library for float32 in the real cache."""
    kernels.kernels_for(torch.float32)
    return build.opened(torch.float32, lambda path: path)


def cxx(kind: str, folder: Path) -> str:
    """The value of CXX for one of `COMPILERS`, whose files are made in ``folder``."""
    path = folder / "a compiler"
    script = SCRIPTS.get(kind, GOOD)
    words = {"folder": shlex.quote(str(folder)), "library": shlex.quote(str(library()))}
    for name, value in words.items():
        script = script.replace(f"{{{name}}}", value)
    path.write_text("" if kind == "no program" else f"#!/bin/sh\n{script}\n")
    path.chmod(0o644 if kind == "not executable" else 0o755)
    launcher = folder / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    quoted = shlex.quote(str(path))
    special = {
        "words": f"{quoted} -O1",
        "launcher": f"{launcher} {quoted}",
        "missing": "no-such-compiler",
        "quote": "g++ '-O1",
        "folder": shlex.quote(str(folder)),
    }
    return special.get(kind, quoted)


def runs(folder: Path) -> int:
    """How often the good compiler of `cxx` has compiled."""
    path = folder / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


@contextmanager
def environment(kind: str = "good", **variables: str | None):
    """Within it these are set, or not set; a ``kind`` of compiler that hangs is noticed at once."""
    unset = {"STARTSPARSE_CXXFLAGS": None, "XDG_CACHE_HOME": None}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**unset, **variables}.items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        seconds = 0.3 if kind.startswith("hangs") else 60
        patch.setattr(compiler, "_ANSWER", seconds)
        patch.setattr(compiler, "_LIMIT", seconds)
        yield patch


def opened() -> kernels.CpuKernels:
    """The kernels, as `kernels.kernels_for` makes them each time it has none."""
    return kernels.kernels_for.__wrapped__(torch.float32)


def works(found: kernels.CpuKernels) -> bool:
    """Whether they list the entries of a mask."""
    mask = torch.tensor([True, False, True, True, False, True]).view(2, 3, 1)
    first, flat = found.list_entries(mask, 3)
    return first.tolist() == [0, 2, 4] and flat.tolist() == [0, 2, 3, 5]


def stem(compiler_key: str = "*") -> str:
    """Begins the names of libraries for float32 in a cache."""
    return f"{build._stem(torch.float32)}-{compiler_key}-"
