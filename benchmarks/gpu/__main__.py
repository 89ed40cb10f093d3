"""What only a GPU can tell about the scripts, in eight minutes, as JSON.

    python -m benchmarks.gpu                  # on a machine with a GPU
    python -m benchmarks.gpu --rehearse       # the same on a CPU with tiny networks
    python -m benchmarks.gpu --table FILE     # the Markdown table of a JSON

The JSON is benchmarks/results/<card>.json, and is written after each row, so that nothing is lost
when time runs out. Needs the checkout, torch, torchvision and what requirements.txt names; no
network. Goals: ResNet18 for images of 32x32, bf16, augmentation included, 74,000 images/s on an
H200; steps with fixed masks and with drop and grow at most 1.02 of dense, soft thresholds 1.05,
edge-popup 1.10; no wait in an ordinary step; no recompilation after the second epoch; the same
twice and resumed to the bit; Python's share of a step below 30 %.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import runs, speed, table
from benchmarks.gpu.networks import Sizes, full, synchronize, tiny
from benchmarks.gpu.parts import Found, Report

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 480.0


def machine(found: Found, sizes: Sizes) -> None:
    """Versions, card, and how fast the card copies its own memory."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True, text=True,
    )  # fmt: skip
    found.content |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "commit": commit.stdout.strip(),
    }
    if sizes.rehearsal:
        return
    card = torch.cuda.get_device_properties(sizes.device)
    found.content |= {
        "card": card.name,
        "cards": torch.cuda.device_count(),
        "capability": f"{card.major}.{card.minor}",
        "memory_GiB": round(card.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "copied_TB_per_s": _copied(sizes.device),
    }


def _copied(device: torch.device) -> float:
    """TB/s that are read and written when a GiB is copied."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(20):
        target.copy_(source)
    end.record()
    synchronize(device)
    return 20 * 2 * 2**30 / (start.elapsed_time(end) / 1e3) / 1e12


PARTS: dict[str, Callable[[Found, Sizes], None]] = {
    "machine": machine,
    "same": runs.same,  # compiles ahead for steps
    "steps": speed.steps,
    "waits": speed.waiting,
    "updates": speed.updates,
    "graphs": runs.graphs,
    "input": speed.pipeline,
    "several": runs.several,
    "cpu": speed.cpu,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON (benchmarks/results/<card>.json)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts, as in a,b")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all parts")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny networks")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a JSON as Markdown")
    chosen = parser.parse_args(argv)
    if chosen.table:
        print(table.markdown(chosen.table))
        return
    names = chosen.parts.split(",")
    for name in names:
        if name not in PARTS:
            parser.error(f"--parts: '{name}' is none of {', '.join(PARTS)}")
    if not (chosen.rehearse or torch.cuda.is_available()):
        parser.error("there is no GPU here; --rehearse needs none")
    sizes = tiny() if chosen.rehearse else full()
    report = Report(chosen.out or RESULTS / f"{_card(sizes)}.json", chosen.seconds, {})
    report.content["command"] = " ".join(
        ["python -m benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]
    )
    for name in names:
        report.do(name, partial(PARTS[name], sizes=sizes))
    print(f"{report.path}: {report.content['seconds']:.0f} s")


def _card(sizes: Sizes) -> str:
    """The name of the card as that of a file."""
    if sizes.rehearsal:
        return "rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(sizes.device).lower()).strip("-")


if __name__ == "__main__":
    main()
