"""The command: a finished run -> its tested network as a file, and what that saves."""

import copy
import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from startsparse.commandline import from_flags
from startsparse.errors import OptionError, UserError
from startsparse.export import footprint
from startsparse.export.compact import compact
from startsparse.export.formats import PACKAGES, write_csr, write_dense, write_onnx
from startsparse.export.trained import Trained, read_run
from startsparse.fields import PATH, choice, default_is
from startsparse.options import require_range
from startsparse.places import check_file, check_folder

ENDINGS = {"safetensors": ".safetensors", "csr": ".csr.safetensors", "onnx": ".onnx"}
"""Ending of a file's name, by --format."""


@dataclasses.dataclass
class ExportOptions:
    """The tested network of a finished run as a file."""

    run: Annotated[str, PATH, tyro.conf.Positional] = ""
    """Run folder"""
    format: Annotated[str, choice(ENDINGS)] = "safetensors"
    """safetensors: dense, with zeros; csr: layers as compressed sparse rows; onnx"""
    compact: bool = False
    """Remove the units that are dead on either side, and all that only they feed"""
    output: Annotated[str, PATH, default_is("in RUN/export")] = ""
    """File to write; it must not exist"""
    repeats: int = 20
    """Forward passes per latency, which is their median (0: do not measure)"""

    def check(self) -> None:
        """Raise `OptionError` or `UserError`, which name the option, for what cannot be done."""
        if not self.run:
            raise OptionError("RUN: name the folder of a finished run")
        require_range(self, "repeats", low=0)
        if self.output and not self.output.endswith(ENDINGS[self.format]):
            raise OptionError(f"--output: {self.output} should end in {ENDINGS[self.format]}")
        if self.output and Path(self.output).exists():
            raise OptionError(f"--output: {self.output} exists; remove it or name another file")
        if self.output:
            check_file("--output", Path(self.output))
        elif Path(self.run).is_dir():
            check_folder("--output", Path(self.run) / "export")
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if self.format == "onnx" and missing:
            raise UserError(f"--format onnx: packages are missing; pip install {' '.join(missing)}")


def export(options: ExportOptions) -> Path:
    """Write the file that checked ``options`` ask for, print what it saves, and return its path."""
    folder = Path(options.run)
    trained = read_run(folder)
    if options.format == "onnx" and json.loads(trained.facts["network"])["arch"] == "gcn":
        raise OptionError("--format: a gcn has a sparse matrix, which onnx lacks; take csr")
    model, facts = trained.model, trained.facts
    if options.compact:
        model, facts = compact(model), {**facts, "compact": "true"}
    name = ("compact" if options.compact else "network") + ENDINGS[options.format]
    path = Path(options.output) if options.output else folder / "export" / name
    try:
        if options.format == "onnx":
            write_onnx(path, model, facts, trained.input)
        else:
            (write_csr if options.format == "csr" else write_dense)(path, model, facts)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror})") from None
    print(comparison(trained, model, path, options.repeats))
    return path


def comparison(trained: Trained, model: nn.Module, path: Path, repeats: int) -> str:
    """A table that compares the network of a run with ``model``, which is in the file ``path``."""
    both, files = (trained.model, model), (trained.source, path)
    counts = [footprint.parameters(network) for network in both]
    example = torch.zeros(trained.input)
    cost = [footprint.forward_flops(network, example) for network in both]
    rows = [
        ("", trained.source.name, path.name),
        ("parameters", *(f"{stored:,}" for stored, _ in counts)),
        ("of them not zero", *(f"{kept:,}" for _, kept in counts)),
        ("bytes on disk", *(f"{file.stat().st_size:,}" for file in files)),
        ("FLOPs of one input, dense", *(f"{dense:.4g}" for dense, _ in cost)),
        ("FLOPs, were zeros free", *(f"{sparse:.4g}" for _, sparse in cost)),
    ]
    if repeats:
        changed = model is not trained.model
        rows += _latency_rows(both[: 1 + changed], trained.input, repeats)
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}" for a, b, c in rows]
    if repeats:
        lines.append(
            f"Latencies are of this machine now: PyTorch, dense, {torch.get_num_threads()} "
            f"thread(s), median of up to {repeats} passes in turns."
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "\n".join([*lines, "", f"network  {path.resolve()}", f"sha256   {digest}"])


def _latency_rows(
    networks: Sequence[nn.Module], shape: Sequence[int], repeats: int
) -> list[tuple[str, str, str]]:
    """A row per batch size: its name, and the latencies of two networks, or of one twice."""
    networks = [copy.deepcopy(n).to(memory_format=torch.channels_last) for n in networks]
    graph, rows = shape[0] > 1, []
    for batch in (1,) if graph else (1, 64):
        inputs = torch.randn(batch * shape[0], *shape[1:]).to(memory_format=torch.channels_last)
        times = [f"{1e3 * t:.3g} ms" for t in footprint.latencies(networks, inputs, repeats)]
        name = "latency, whole graph" if graph else f"latency, batch {batch}"
        rows.append((name, times[0], times[1] if len(times) > 1 else "the same"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Export one run."""
    options = from_flags(
        ExportOptions, list(sys.argv[1:] if argv is None else argv), ExportOptions()
    )
    options.check()
    export(options)
