"""``make sanitize``: the kernels, with checks of every address and of undefined behaviour.

They are built for every instruction set of this CPU (AVX-512, AVX2, none of both), by g++ or
``CXX``, and run by tests of each kernel. The first error ends it, with exit code 1.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

LEVELS = ["default", "avx2", "avx512"]  # as PyTorch calls them
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
)
BUILD = "import torch; from startsparse.engine.build import opened; "
BUILD += "[opened(dtype, print) for dtype in (torch.float32, torch.float64)]"
TESTS = [
    "test_engine_kernels.py",
    "test_engine_layers.py",
    "test_engine_effective.py::test_compacted_lists_and_products",
    "test_engine_network.py::test_single_images",
    "test_engine_network.py::test_other_networks",
]
OPTIONS = {
    # Python frees little when it ends; the libraries for both dtypes have variables of one name.
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def libraries() -> str:
    """What has to be loaded before Python, since Python itself is not built with checks."""
    names = "libasan.so", "libubsan.so", "libstdc++.so"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    run = [subprocess.run([*compiler, f"-print-file-name={n}"], capture_output=True) for n in names]
    return ":".join(done.stdout.decode().strip() for done in run)


def main() -> int:
    """Test every level that this CPU has; returns the first exit code that is not 0."""
    import torch

    best = torch.backends.cpu.get_cpu_capability().lower()
    folder = Path(__file__).parent
    tests = [str(folder / test) for test in TESTS]
    # What the checks print goes to the file descriptor, which pytest would keep to itself.
    pytest = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--capture=sys", *tests]
    with tempfile.TemporaryDirectory() as cache:
        for level in LEVELS[: LEVELS.index(best) + 1]:
            print(f"sanitize: {level}", flush=True)
            env = os.environ | OPTIONS | {"ATEN_CPU_CAPABILITY": level}
            env |= {"STARTSPARSE_CACHE": cache, "STARTSPARSE_CXXFLAGS": FLAGS}
            subprocess.run([sys.executable, "-c", BUILD], env=env, cwd=folder.parent, check=True)
            env["LD_PRELOAD"] = libraries()  # not before: it would check the compiler
            code = subprocess.run(pytest, env=env, cwd=folder.parent).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
