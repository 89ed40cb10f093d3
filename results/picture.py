"""The picture of the README: what starting sparse buys, drawn from the committed tables.

``python results/picture.py`` writes picture.png beside this file. Left: test accuracy against
density, of results/cifar10-jpeg. Right: training steps on a CPU, times faster than dense, of
benchmarks/sparse_compute.csv.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import cifar10
import pandas as pd
from matplotlib.figure import Figure

from startsparse import labels, plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
NETWORKS = {"resnet18": "ResNet18", "vgg16": "VGG16", "mlp": "MLP"}


def accuracy_against_density(axis: "Axes") -> None:
    """A line per ratio: mean over seeds, with its 95 % confidence interval; dense as a band."""
    cifar10.draw_random_masks(axis, cifar10.read())
    axis.set_title("VGG11 (width 16), 15 epochs, CIFAR-10 (JPEG)")


def speed_against_density(axis: "Axes") -> None:
    """A line per network: training steps that compute only inside the masks."""
    table = pd.read_csv(ROOT / "benchmarks/sparse_compute.csv")
    table = table[table["form"] == "sparse"]
    for network, label in NETWORKS.items():
        rows = table[table["network"] == network]
        axis.plot(rows["density"], rows["times_faster"], "o-", label=label)
    axis.axhline(1, color="black", lw=1, ls=":", label="dense")
    densities = sorted(set(table["density"]))
    axis.set(xscale="log", ylim=(0, None), xlabel=labels.DENSITY, ylabel="times faster than dense")
    axis.set_xticks(densities, [f"{density:g}" for density in densities])
    axis.invert_xaxis()
    axis.set_title("A training step on two CPU cores")
    axis.legend(loc="upper left", fontsize=8)


def draw(path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = (accuracy_against_density, speed_against_density)
    for axis, panel in zip(figure.subplots(1, 2), panels, strict=True):
        panel(axis)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    plots.save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
