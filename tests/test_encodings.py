"""Files and pipes are UTF-8 wherever the locale is not, and output that knows less loses no run."""

import ast
import logging
import sys
from pathlib import Path

import pytest

from startsparse import console

ROOT = Path(__file__).parents[1]
SOURCES = [
    p for name in ("startsparse", "STR", "ER_DST", "ER_SLT") for p in (ROOT / name).rglob("*.py")
]
OPENS = ("open", "fdopen", "read_text", "FileHandler", "NamedTemporaryFile", "TextIOWrapper")


def without_encoding(source: str) -> list[str]:
    """The calls that open text files, or pipes, in the encoding of the locale."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        strings = [a.value for a in [*call.args, *keywords.values()] if isinstance(a, ast.Constant)]
        binary = any(isinstance(s, str) and "b" in s and len(s) <= 3 for s in strings)
        opens = name in OPENS and not binary
        opens |= (
            name == "write_text" and isinstance(call.func, ast.Attribute) and len(call.args) == 1
        )
        opens |= bool({"text", "universal_newlines"} & keywords.keys()) and name != "add_argument"
        if opens and "encoding" not in keywords and "mode" not in keywords:
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


def test_the_check_finds_what_it_should():
    assert len(without_encoding("open(p)\np.open('w')\np.read_text()\np.write_text(t)\n")) == 4
    assert without_encoding("subprocess.run(c, text=True)")
    assert not without_encoding("open(p, 'rb')\np.read_text(encoding='utf-8')\nwrite_text(p, t)")


# These open bytes.
BYTES = ("tarfile.open", "gzip.open", "Image.open", "os.open")


def test_text_files_have_an_encoding():
    found = [
        f"{path.relative_to(ROOT)}:{call}"
        for path in SOURCES
        for call in without_encoding(path.read_text(encoding="utf-8"))
        if not any(name in call for name in BYTES)
    ]
    assert not found


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O error")])
def test_without_standard_output_the_run_goes_on(error, tmp_path, capfd, monkeypatch):
    class Full:
        fileno = (tmp_path / "output").open("w").fileno

        def write(self, _text):
            raise error

        def flush(self):
            raise error

    monkeypatch.setattr(sys, "stdout", Full())
    record = logging.LogRecord("startsparse", logging.INFO, "", 0, "a line", None, None)
    console._Console().emit(record)
    monkeypatch.undo()
    said = capfd.readouterr().err
    reason = f"standard output cannot be written ({error.strerror})"
    assert said == f"warning: {reason}; log.txt has what follows\n"
