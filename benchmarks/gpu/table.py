"""The JSON of the benchmark as Markdown: goals first, then a table for each part."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.networks import BARE, DENSE, DROP_AND_GROW, POPUP

Row = dict[str, Any]

SPEED = 74_000  # images/s on an H200
LIMITS = {"ConvMask": 1.02, DROP_AND_GROW: 1.02, "STRConv": 1.05, "STRConvER": 1.05}
LIMITS |= dict.fromkeys(POPUP, 1.10)
PYTHON = 0.3
UPDATE_EVERY = 100  # steps, the default

# part -> columns: title -> (name in a row, format)
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "steps": {
        "network": ("kind", ""), "batch": ("batch", ""), "compiled": ("compiled", ""),
        "images/s": ("images_per_second", ",.0f"), "ms": ("ms", ".2f"),
        "over dense": ("over_dense", ".3f"), "Python, ms": ("python_ms", ".2f"),
        "Python's share": ("python_share", ".0%"), "GPU's share": ("gpu_share", ".0%"),
        "launches": ("launches", ".0f"), "copies": ("copies", ".0f"), "MiB": ("peak_MiB", ",d"),
    },
    "waits": {"network": ("kind", ""), "waits in a step": ("waits", "")},
    "updates": {
        "growth": ("growth", ""), "flow preservation": ("flow_preservation", ""),
        "a step, ms": ("step_ms", ".2f"), "an update adds, ms": ("update_ms", ".2f"),
        "launches": ("update_launches", ".0f"), "copies": ("update_copies", ".0f"),
        "waits": ("waits_of_an_update", ""),
    },
    "same": {
        "run": ("name", ""), "twice": ("repeated", ""),
        "resumed after 3 steps": ("resumed after step 3", ""),
        "after 8": ("resumed after step 8", ""), "compiled, s": ("compile_s", ".0f"),
    },
    "graphs": {
        "run": ("name", ""), "graphs": ("graphs", ""), "steps": ("steps", ""),
        "after two epochs": ("after_two_epochs", ""), "in the test": ("in_the_test", ""),
        "breaks": ("breaks", ""),
    },
    "input": {"batch": ("batch", ""), "images/s": ("images_per_second", ",.0f")},
    "several": {
        "run": ("name", ""), "start": ("start", ""), "seconds": ("seconds", ".1f"),
        "validation": ("valid_accuracy", ".3f"),
    },
    "cpu": {
        "threads": ("threads", ""), "sparse, ms": ("sparse_ms", ".1f"),
        "dense, ms": ("dense_ms", ".1f"), "over dense": ("over_dense", ".3f"),
    },
}  # fmt: skip


def markdown(path: Path) -> str:
    """The whole file."""
    found = json.loads(path.read_text())
    facts = {k: v for k, v in found.get("machine", {}).items() if k not in ("rows", "took_s")}
    where = ", ".join(f"{name} {value}" for name, value in facts.items())
    parts = [f"`{found.get('command', '')}`, {found.get('seconds', 0):.0f} s: {where}"]
    if "card" not in facts:
        parts[0] += ". **A rehearsal on a CPU: the figures say nothing about a GPU.**"
    if any(name in found for name in ("steps", "same", "waits", "graphs")):
        parts.append(_table(("goal", "asked", "measured", "met"), _goals(found)))
    for name, columns in COLUMNS.items():
        if name in found:
            parts += [f"### {name}", *_state(found[name]), _part(columns, found[name]["rows"])]
    return "\n\n".join(parts)


def _goals(found: Row) -> Iterable[tuple[str, ...]]:
    """Lines of goal, asked, measured, met; of what was measured."""
    steps = [r for r in _rows(found, "steps") if r["kind"] != BARE and "ms" in r]
    fixed = [r for r in steps if r["kind"] in (DENSE, "ConvMask")]
    if fixed:
        best = max(r["images_per_second"] for r in fixed)
        yield _goal("images/s, on an H200", f"{SPEED:,}", f"{best:,.0f}", best >= SPEED)
    for kind, limit in LIMITS.items():
        rows = [r for r in steps if r["kind"] == kind and "over_dense" in r]
        if rows:
            worst = max(r["over_dense"] for r in rows)
            yield _goal(f"{kind} over dense", f"{limit}", _each(rows, "over_dense"), worst <= limit)
    dense = next((r["ms"] for r in steps if r["kind"] == DENSE), None)
    for row in _rows(found, "updates") if dense else ():
        if "update_ms" in row:
            mean = (row["step_ms"] + row["update_ms"] / UPDATE_EVERY) / dense
            name = f"{row['growth']} growth, flow {row['flow_preservation']}, with its updates"
            yield _goal(name, "1.02", f"{mean:.3f}", mean <= 1.02)
    rows = [r for r in fixed if "python_share" in r]
    if rows:
        text = _each(rows, "python_share")
        met = max(r["python_share"] for r in rows) < PYTHON
        yield _goal("Python's share of a step, dense and ConvMask", f"{PYTHON}", text, met)
    yield from _none(found, "waits", "waits in ordinary steps", lambda r: len(r["waits"]), "waits")
    yield from _none(
        found, "graphs", "compilations after two epochs", lambda r: r["after_two_epochs"],
        "after_two_epochs",
    )  # fmt: skip
    yield from _none(
        found, "same", "runs that differ from themselves, or resumed ones",
        lambda r: sum(v != "same" for k, v in r.items() if k.startswith(("repeated", "resumed"))),
        "repeated",
    )  # fmt: skip


def _each(rows: list[Row], name: str) -> str:
    how = {False: "", True: " compiled"}
    return ", ".join(f"{r[name]:.3f}{how[r['compiled']]} ({r['batch']})" for r in rows)


def _none(
    found: Row, part: str, title: str, count: Callable[[Row], int], needed: str
) -> Iterable[tuple[str, ...]]:
    rows = [row for row in _rows(found, part) if needed in row]
    if rows:
        total = sum(map(count, rows))
        yield _goal(title, "0", f"{total} of {len(rows)} rows", total == 0)


def _goal(name: str, asked: str, measured: str, met: bool) -> tuple[str, ...]:
    return name, asked, measured, "yes" if met else "**no**"


def _rows(found: Row, part: str) -> list[Row]:
    return found.get(part, {}).get("rows", [])


def _state(part: Row) -> list[str]:
    """Lines on what went wrong in a part."""
    lines = [f"Error: {part['error']}"] if "error" in part else []
    lines += ["Time ran out."] if "cut" in part else []
    late = part.get("not finished")
    return [*lines, f"Not finished: {', '.join(late)}"] if late else lines


def _part(columns: dict[str, tuple[str, str]], rows: list[Row]) -> str:
    used = {t: c for t, c in columns.items() if any(row.get(c[0]) is not None for row in rows)}
    errors = any("error" in row for row in rows)
    lines = [
        [*(_cell(row.get(name), shape) for name, shape in used.values()),
         *[row.get("error", "")] * errors]
        for row in rows
    ]  # fmt: skip
    return _table([*used, *["error"] * errors], lines)


def _cell(value: Any, shape: str) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:g}" for key, number in value.items()) or "none"
    return format(value, shape)


def _table(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in rows
    )
