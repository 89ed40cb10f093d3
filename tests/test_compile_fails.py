"""--compile where nothing can be compiled: one line, before the data is read if it can be."""

import pytest
import torch
from script_runs import MLP

from startsparse import data, parallel
from startsparse.errors import OptionError, UserError

SAID = "InvalidCxxCompiler: none found: (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE=1\n"


class InductorError(RuntimeError):
    """As that of PyTorch, which takes long to import."""

    __module__ = "torch._dynamo.exc"


def fails(error):
    def compile(_function, **_):
        def run(*_):
            raise error

        return run

    return compile


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InductorError(SAID), "InvalidCxxCompiler: none found: (None, 'g++')"),
        (InductorError("C++ compile error\n\nCommand:\nx\n\nOutput:\nx.cpp:3: error: no\nmore"),
         "C++ compile error; x.cpp:3: error: no"),
        (KeyError("getpwuid(): uid not found: 7"), "'getpwuid(): uid not found: 7'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (MemoryError(), "MemoryError"),
    ],
)  # fmt: skip
def test_it_is_tried_before_the_data_is_read(error, reason, run, monkeypatch):
    monkeypatch.setattr(torch, "compile", fails(error))
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(OptionError) as raised:
        run(*MLP, "--compile")
    assert str(raised.value) == f"--compile: does not work here ({reason})"


def test_a_failure_in_training_is_one_line(run, few_images, monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "check_compile", lambda _: None)
    monkeypatch.setattr(torch, "compile", fails(InductorError(SAID)))
    with pytest.raises(UserError, match=r"^--compile: failed \(InvalidCxxCompiler: none found"):
        run(*MLP, "--compile")


def test_other_errors_in_training_stay_as_they_are():
    with pytest.raises(ZeroDivisionError), parallel.compiling():
        raise ZeroDivisionError
