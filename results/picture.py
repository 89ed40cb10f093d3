"""The picture of the README: what starting sparse buys, drawn from the committed tables.

``python results/picture.py`` writes picture.png beside this file. Left: test accuracy against the
FLOPs of the whole training, of results/dst-digits. Right: training steps on a CPU, times faster
than dense, of benchmarks/sparse_compute.csv.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from startsparse import labels, plots, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
METHODS = {  # name of the runs -> what the picture calls it; growth by gradients is unstable there
    "static": "random mask, fixed",
    "DST-random": "random mask, random growth",
    "GMP": "pruned while training (GMP)",
    "GraNet": "pruned, dropped and grown (GraNet)",
}
RATIOS = {"balanced": "o", "ERK": "s"}
NETWORKS = {"resnet18": "ResNet18", "vgg16": "VGG16", "mlp": "MLP"}


def accuracy_against_flops(axis: "Axes") -> None:
    """A point per method and ratio: mean over seeds, with its 95 % confidence interval.

    Random masks that stay and that move cost the same; their points stand side by side.
    """
    table = pd.read_csv(ROOT / "results/dst-digits/results.csv")
    table = table[(table["epochs"] == 12) & (table["flow_preservation"] == "False")]
    of = ["training_flops_share", "test_accuracy"]
    means = report.summarise(table, ["name", "er_sparse_method"], of)
    for i, (method, label) in enumerate(METHODS.items()):
        for ratio, marker in RATIOS.items():
            rows = means[(means["name"] == method) & (means["er_sparse_method"] == ratio)]
            axis.errorbar(
                100 * rows["training_flops_share"] * (0.98, 1.02)[i % 2],
                100 * rows["test_accuracy"],
                plots.bars(rows, "test_accuracy"),
                fmt=marker,
                color=f"C{i}",
                ms=7,
                capsize=3,
                label=f"{label}, {ratio}",
            )
    ticks = (2, 5, 10, 20, 50, 100)
    axis.set(xscale="log", xlim=(1.6, 100), ylim=(90, 100.5))
    axis.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axis.set(xlabel="FLOPs of the training (dense: 100 %)", ylabel="test accuracy (%)")
    axis.set_title("VGG11 of density 0.01 on digits")
    axis.legend(loc="lower right", fontsize=7.5)


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
    for axis, panel in zip(figure.subplots(1, 2), (accuracy_against_flops, speed_against_density)):
        panel(axis)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    plots.save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
