"""What the parts of the benchmark find, kept in one JSON that is written after each row."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from startsparse.atomic import write_text


class Report:
    """The JSON file, and the time that is left."""

    def __init__(self, path: Path, seconds: float, content: dict[str, Any]):
        self.path, self.content = path, content
        self.began, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def save(self) -> None:
        """Write what there is."""
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")

    def do(self, name: str, part: Callable[["Found"], None]) -> None:
        """Run a part; what it raises is kept, and the next one begins."""
        found = Found(self)
        self.content[name] = found.content
        began = time.monotonic()
        try:
            part(found)
        except Exception as error:
            found.fail(error)
        found.content["took_s"] = round(time.monotonic() - began, 1)
        self.save()
        print(f"{name:<10} {found.content['took_s']:6.1f} s  {self._state(found)}", flush=True)

    def _state(self, found: "Found") -> str:
        errors = [row["error"] for row in (found.content, *found.rows) if "error" in row]
        cut = ["not all: too little time left"] * ("cut" in found.content)
        return "; ".join([f"{len(found.rows)} rows", *cut, *errors])[:200]


class Found:
    """What one part found: rows, and facts of its own in ``content``."""

    def __init__(self, report: Report):
        self.report = report
        self.rows: list[dict[str, Any]] = []
        self.content: dict[str, Any] = {"rows": self.rows}

    def time_for(self, seconds: float) -> bool:
        """Whether so many seconds are left; notes it where they are not."""
        enough = self.report.left >= seconds
        if not enough:
            self.content["cut"] = len(self.rows)
        return enough

    @contextmanager
    def row(self, **key: Any) -> Iterator[dict[str, Any]]:
        """A row to fill; what is raised becomes its error."""
        row = dict(key)
        try:
            yield row
        except Exception as error:
            row["error"] = _one_line(error)
            row["trace"] = traceback.format_exc()[-1500:]
        self.rows.append({name: value for name, value in row.items() if name != "program"})
        self.report.save()

    def fail(self, error: Exception) -> None:
        """Note why the part ended."""
        self.content["error"] = _one_line(error)
        self.content["trace"] = traceback.format_exc()[-1500:]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
