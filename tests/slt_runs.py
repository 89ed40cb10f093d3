"""Shared by the tests of ER_SLT: small runs, and what they leave behind."""

import json
import shlex
from pathlib import Path

import torch
from script_runs import ROOT, newest

from ER_SLT import main as script
from ER_SLT.edge_popup import count
from ER_SLT.ticket import Ticket, load_ticket
from startsparse import masks

DEMO = [
    *("--config", str(ROOT / "ER_SLT/configs/digits.yaml"), "--width", "4"),
    *("--epochs", "2", "--batch-size", "256", "--sparse-compute", "off"),
]
MLP = [
    *("--dataset", "DIGITS", "--model", "mlp", "--width", "16", "--batch-size", "256"),
    *("--levels", "2", "--epochs", "2", "--er-sampling", "exact"),
]
PUBLISHED = shlex.split(
    "--model Resnet18 --save-model --er-init-density 0.5 --save_file "
    "runs-strong-tick-anneal-lr-0.1-2 --sparsity 0.2 --anneal False --initBias kn-zero-bias "
    "--epochs 100 --levels 5 --lr 0.1 --seed 2"
)


def slt(where: Path, *argv: str) -> Path:
    """Run ER_SLT/main.py in this process; returns the run folder."""
    script.main([*argv, "--log-dir", f"{where}/runs", "--result-dir", str(where)])
    return newest(where)


def ticket(folder: Path, level: int | None = None) -> Ticket:
    """The ticket of a level, or of the whole run."""
    name = "ticket.safetensors" if level is None else f"levels/level-{level}.safetensors"
    return load_ticket(folder / name)


def result(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def asked(ticket: Ticket, density: float, ranking: str) -> dict[str, int]:
    """Entries that a ticket should have, per layer or in total, by the sizes of its masks."""
    layers = {}
    for name, mask in ticket.found.items():
        layer, _, kind = name.rpartition(".")
        inside = int(ticket.er_masks[layer].sum()) if kind == "weight" else mask.numel()
        size, allowed = layers.get(layer, (0, 0))
        layers[layer] = size + mask.numel(), allowed + inside
    if ranking == "global":
        layers = {"total": tuple(map(sum, zip(*layers.values())))}
    return {name: count(density, size, allowed) for name, (size, allowed) in layers.items()}


def used(ticket: Ticket, ranking: str) -> dict[str, int]:
    """Entries that a ticket has, per layer or in total."""
    layers = {}
    for name, mask in ticket.found.items():
        layer = "total" if ranking == "global" else name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + int(mask.sum())
    return layers


def is_inside(ticket: Ticket) -> bool:
    """Whether the found masks lie inside the random masks."""
    return not any(
        bool((ticket.found[f"{name}.weight"] & ~mask).any())
        for name, mask in ticket.er_masks.items()
    )


def random_masks(options) -> dict[str, torch.Tensor]:
    """The random masks that a run begins with."""
    model, requested = script.plan(options, script.data.SHAPES[options.set])
    script.er.attach_er_masks(model, requested, options)
    return {name: mask for name, _, mask in masks.masked_weights(model)}
