"""Scripts as a user starts them: a request for `script_server`, and what came of it."""

import atexit
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from startsparse import cache_folder

TESTS = Path(__file__).parents[1]
TRAINED = 99  # exit code of a script that was stopped after its first optimizer step
LIMIT = 60  # CPU seconds


@dataclasses.dataclass
class Start:
    """How a script is started; see `script_server`. {tmp} stands for the folder of the case."""

    module: str
    argv: list[str] = dataclasses.field(default_factory=list)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    without: list[str] = dataclasses.field(default_factory=list)
    umask: int = 0o022
    closed: list[int] = dataclasses.field(default_factory=list)
    encoding: str = ""
    unprivileged: bool = False
    whole: bool = False


@dataclasses.dataclass
class Ended:
    """How it ended: exit code (minus a signal; None: it hung), output, and a traceback."""

    code: int | None
    out: str
    err: str
    traceback: str
    seconds: float


@functools.cache
def _server() -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    # Kernels are compiled once, whatever the HOME of a case is.
    if folder := cache_folder():
        environment["STARTSPARSE_CACHE"] = str(folder)
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "script_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return server


def run(start: Start, folder: Path, where: Path) -> Ended:
    """Start a script in the folder ``where``; its output goes to ``folder``."""
    output = folder / ".output"
    output.mkdir(exist_ok=True)
    put = functools.partial(_put, folder=folder)
    request = dataclasses.asdict(start) | {
        "argv": [put(word) for word in start.argv],
        "environment": {name: put(value) for name, value in start.environment.items()},
        "folder": str(where),
        "output": str(output),
        "limit": LIMIT,
    }
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    texts = [_read(output / name) for name in ("stdout", "stderr", "traceback")]
    return Ended(answer["code"], *texts, answer["seconds"])


def check(ended: Ended, start: Start) -> None:
    """A script trains a step, or succeeds, or ends with one line that says why.

    Raises:
        AssertionError: it did something else; shows the end of what it said.
    """
    shown = f"exit code {ended.code}; {ended.traceback[-1500:]}{ended.err[-600:]}"
    assert not ended.traceback, shown
    assert "Traceback" not in ended.err, shown
    assert ended.code in (0, 1, 2, TRAINED), shown
    if ended.code in (1, 2) and not {2} & set(start.closed):
        lines = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, shown
        assert lines[0].startswith("error: "), shown


def _put(word: str, folder: Path) -> str:
    return word.replace("{tmp}", str(folder))


def _read(path: Path) -> str:
    return path.read_text("utf-8", "backslashreplace") if path.exists() else ""
