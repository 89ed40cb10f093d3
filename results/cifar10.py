"""Tables and pictures of results/cifar10-jpeg, from its results.csv and the run folders.

``python results/cifar10.py`` writes table.md and the pictures. With ``--curves`` it first writes
curves.csv, the epochs of the runs whose folders are there.
"""

import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from startsparse import labels, plots, report, results
from startsparse.atomic import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent / "cifar10-jpeg"
RATIOS = ("ERK", "balanced", "uniform")
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
METHODS = {  # name of the runs of E2 -> what it is called here
    "E1-vgg11-dense": "dense, not pruned",
    "E1-vgg11-ERK-0.2": "ERK 0.2, stays",
    "E2-vgg11-dense-rewind-weights": "IMP from dense",
    "E2-vgg11-dense-rewind-none": "LRR from dense",
    "E2-vgg11-ERK-0.2-rewind-weights": "IMP from ERK 0.2",
    "E2-vgg11-ERK-0.2-rewind-none": "LRR from ERK 0.2",
    "E2-vgg11-ERK-0.2-GraNet": "GraNet from ERK 0.2",
    "E2-vgg11-ERK-0.2-GMP": "GMP from ERK 0.2",
    "E2-vgg11-ERK-0.3-STR": "STR from ERK 0.3",
    "E1-vgg11-ERK-0.05": "ERK 0.05, stays",
    "E1-vgg11-balanced-0.05": "balanced 0.05, stays",
}
GROWTH = {"SET": "SET", "RigL": "RigL", "RigL-stop": "RigL, stopped at 0.75"}
TARGETS = (0.6, 0.65, 0.7, 0.75, 0.8)


def read() -> pd.DataFrame:
    """The rows of results.csv, with accuracies in percent."""
    table = results.numbers(results.read(HERE / "results.csv"))
    accuracies = [name for name in table.columns if name.endswith("_accuracy")]
    return table.assign(**{name: 100 * table[name] for name in accuracies})


def named(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The runs of a setting, by seed."""
    return table[table["name"] == name].sort_values("seed")


def mean(table: pd.DataFrame, name: str, column: str = "test_accuracy") -> tuple[float, float]:
    """Mean and 95 % half-width over the seeds of a setting; NaN without runs."""
    rows = named(table, name)
    values = rows[column].astype(float).tolist() if len(rows) else []
    return (fmean(values), report.half_width(values)) if values else (np.nan, np.nan)


def cell(mean_and_half: tuple[float, float]) -> str:
    """``mean ± half``; "" without runs."""
    value, half = mean_and_half
    if np.isnan(value):
        return ""
    return f"{value:.1f}" + ("" if np.isnan(half) else f" ± {half:.1f}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, without rows of which nothing has been run."""
    lines = [head, ["---"] * len(head), *[row for row in rows if any(row[1:])]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --- tables ---------------------------------------------------------------------------------------


def random_masks(table: pd.DataFrame) -> str:
    """E1: accuracy, and below it the difference to dense, paired by seed."""
    head = ["VGG11", *map(str, DENSITIES)]
    rows, differences = [], []
    for ratio in RATIOS:
        names = [f"E1-vgg11-{ratio}-{density}" for density in DENSITIES]
        rows.append([ratio, *[cell(mean(table, name)) for name in names]])
        paired = [report.paired(named(table, n), named(table, "E1-vgg11-dense")) for n in names]
        differences.append([f"{ratio}, minus dense", *map(cell, paired)])
    dense = cell(mean(table, "E1-vgg11-dense"))
    small = [["dense", cell(mean(table, "E1-resnet20-dense"))]]
    small += [[f"ERK {d}", cell(mean(table, f"E1-resnet20-ERK-{d}"))] for d in (0.2, 0.05)]
    text = f"Dense VGG11: {dense}.\n\n{markdown(head, rows + differences)}"
    if any(accuracy for _, accuracy in small):
        text += "\n" + markdown(["ResNet20", "test accuracy"], small)
    return text


def sparse_to_sparse(table: pd.DataFrame) -> str:
    """E2: accuracy, density and cost of what was pruned to 0.05 in 15 epochs, beside what stays."""
    rows = []
    for name, method in METHODS.items():
        share = mean(table, name, "training_flops_share")[0]
        rows.append(
            [
                method,
                cell(mean(table, name)),
                cell(report.paired(named(table, name), named(table, "E1-vgg11-ERK-0.05"))),
                "" if np.isnan(share) else f"{mean(table, name, 'density')[0]:.3f}",
                "" if np.isnan(share) else f"{share:.2f}",
            ]
        )
    head = ["15 epochs in all", "test accuracy", "minus ERK 0.05", "density", "FLOPs of training"]
    return markdown(head, rows)


def drop_and_grow(table: pd.DataFrame) -> str:
    """E3: accuracy, and the difference to the mask that stays, paired by seed."""
    head = ["ERK", *(str(d) for d in DENSITIES[2:])]
    stays = [f"E1-vgg11-ERK-{d}" for d in DENSITIES[2:]]
    rows = [["static", *[cell(mean(table, name)) for name in stays]]]
    for method, label in GROWTH.items():
        names = [f"E3-vgg11-ERK-{d}-{method}" for d in DENSITIES[2:]]
        rows.append([label, *[cell(mean(table, name)) for name in names]])
        pairs = [report.paired(named(table, n), named(table, s)) for n, s in zip(names, stays)]
        rows.append([f"{label}, minus static", *map(cell, pairs)])
    return markdown(head, rows)


def tickets(table: pd.DataFrame) -> str:
    """E4: accuracy of strong lottery tickets, and of the same with shuffled masks."""
    rows = []
    for start in ("1", "0.8", "0.5", "0.3"):
        row = ["dense" if start == "1" else f"ER {start}"]
        for anneal in ("True", "False"):
            name = f"E4-vgg11-uniform-{start}-anneal-{anneal}"
            row += [cell(mean(table, name)), cell(mean(table, name, "shuffled_mask_accuracy"))]
        rows.append(row)
    head = [
        "ticket of 0.2 in",
        "annealed",
        "its mask shuffled",
        "not annealed",
        "its mask shuffled",
    ]
    return markdown(head, rows)


def widths(table: pd.DataFrame) -> str:
    """E5: accuracy of networks of one number of weights, beside the paper's factor."""
    rows = []
    for width in (8, 16, 32, 64):
        uniform = "E5-vgg11-8-dense" if width == 8 else f"E5-vgg11-{width}-uniform"
        erk = "E5-vgg11-8-dense" if width == 8 else f"E5-vgg11-{width}-ERK"
        density = mean(table, uniform, "requested")[0]
        factor = 0.0 if width == 8 else 1 / np.log(1 / (1 - density))
        rows.append(
            [
                str(width),
                "" if np.isnan(density) else f"{density:.4f}",
                cell(mean(table, uniform)),
                cell(mean(table, erk)),
                "" if np.isnan(density) else f"{factor:.1f}",
            ]
        )
    return markdown(["width", "density", "uniform", "ERK", "1/log(1/(1-p))"], rows)


def times(curves: pd.DataFrame) -> str:
    """E7: CPU seconds and FLOPs until the validation accuracy first reaches a target."""
    rows = []
    for name in SPEEDS:
        row = [SPEEDS[name]]
        runs = [epochs for _, epochs in curves[curves["name"] == name].groupby("seed")]
        for target in TARGETS:
            first = [run[run["valid_accuracy"] >= target].head(1) for run in runs]
            if not runs or any(found.empty for found in first):
                row.append("")
                continue
            reached = pd.concat(first)
            seconds, flops = (reached[c].mean() for c in ("cpu_seconds", "training_flops"))
            row.append(f"{seconds:.0f} s, {flops / 1e12:.1f}")
        rows.append(row)
    return markdown(["seconds, 1e12 FLOPs to", *(f"{100 * t:.0f} %" for t in TARGETS)], rows)


SPEEDS = {
    "E1-vgg11-dense": "dense",
    "E1-vgg11-ERK-0.2": "ERK 0.2",
    "E1-vgg11-ERK-0.05": "ERK 0.05",
    "E1-vgg11-balanced-0.2": "balanced 0.2",
    "E1-vgg11-balanced-0.05": "balanced 0.05",
    "E2-vgg11-ERK-0.2-GraNet": "GraNet, 0.2 to 0.05",
    "E1-resnet20-dense": "ResNet20, dense",
    "E1-resnet20-ERK-0.2": "ResNet20, ERK 0.2",
    "E1-resnet20-ERK-0.05": "ResNet20, ERK 0.05",
}

SECTIONS = {
    "E1": ("Random masks", random_masks),
    "E2": ("Sparse to sparse", sparse_to_sparse),
    "E3": ("Drop and grow", drop_and_grow),
    "E4": ("Strong lottery tickets", tickets),
    "E5": ("Width", widths),
}


# --- pictures -------------------------------------------------------------------------------------


def line(axis: "Axes", table: pd.DataFrame, points: dict[float, str], **look: object) -> None:
    """Means with intervals against x; ``points`` maps x to the name of the runs."""
    found = {x: mean(table, name) for x, name in points.items() if len(named(table, name))}
    if found:
        values = np.array(list(found.values()))
        axis.errorbar(list(found), values[:, 0], values[:, 1], capsize=3, **look)


def band(axis: "Axes", table: pd.DataFrame, name: str, label: str, colour: str = "grey") -> None:
    """A setting without an x of its own: its mean, and its interval as a band."""
    value, half = mean(table, name)
    axis.axhline(value, color=colour, lw=1.2, ls="--", label=label)
    axis.axhspan(value - half, value + half, color=colour, alpha=0.2, lw=0)


def density_axis(axis: "Axes", ticks: tuple[float, ...]) -> None:
    """Densities on a logarithmic axis that falls to the right."""
    axis.set(xscale="log", xlabel=labels.DENSITY, ylabel="test accuracy (%)")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.grid(alpha=0.3)


def draw_random_masks(axis: "Axes", table: pd.DataFrame) -> None:
    """E1: a line for each ratio, dense as a band."""
    for i, ratio in enumerate(RATIOS):
        points = {d * 1.02 ** (i - 1): f"E1-vgg11-{ratio}-{d}" for d in DENSITIES}
        line(axis, table, points, fmt="osD"[i] + "-", color=f"C{i}", ms=5, label=ratio)
    band(axis, table, "E1-vgg11-dense", "dense")
    density_axis(axis, DENSITIES)
    axis.legend(loc="lower left", fontsize=8)


def draw_drop_and_grow(axis: "Axes", table: pd.DataFrame) -> None:
    """E3: masks that stay and that move."""
    labelled = {"static": "static", **GROWTH}
    for i, (method, label) in enumerate(labelled.items()):
        names = {
            d: f"E1-vgg11-ERK-{d}" if method == "static" else f"E3-vgg11-ERK-{d}-{method}"
            for d in DENSITIES[2:]
        }
        points = {d * 1.03 ** (i - 1.5): name for d, name in names.items()}
        line(axis, table, points, fmt="oDs^"[i] + "-", color=f"C{i}", ms=5, label=label)
    density_axis(axis, DENSITIES[2:])
    axis.legend(loc="lower left", fontsize=8)


def draw_methods(axis: "Axes", table: pd.DataFrame) -> None:
    """E2: a point for each method."""
    rows = [(label, *mean(table, name)) for name, label in METHODS.items()]
    rows = [row for row in rows if not np.isnan(row[1])][::-1]
    for y, (label, value, half) in enumerate(rows):
        colour = "C3" if "stays" in label else "black" if "not pruned" in label else "C0"
        axis.errorbar(value, y, xerr=half, fmt="o", color=colour, ms=5, capsize=3)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.set_xlabel("test accuracy (%)")
    axis.grid(alpha=0.3)


def draw_tickets(axis: "Axes", table: pd.DataFrame) -> None:
    """E4: tickets against the density of the mask that holds them."""
    starts = (1.0, 0.8, 0.5, 0.3)
    for i, (anneal, label) in enumerate((("True", "annealed"), ("False", "not annealed"))):
        points = {
            start * 1.01 ** (2 * i - 1): f"E4-vgg11-uniform-{start:g}-anneal-{anneal}"
            for start in starts
        }
        line(axis, table, points, fmt="os"[i] + "-", color=f"C{i}", ms=5, label=label)
    density_axis(axis, starts)
    axis.set_xlabel("density of the random mask that holds the ticket")
    axis.legend(loc="lower left", fontsize=8)


def draw_widths(axis: "Axes", table: pd.DataFrame) -> None:
    """E5: as many weights in wider networks."""
    for i, ratio in enumerate(("uniform", "ERK")):
        points = {8.0: "E5-vgg11-8-dense"}
        points |= {w * 1.02 ** (2 * i - 1): f"E5-vgg11-{w}-{ratio}" for w in (16, 32, 64)}
        line(axis, table, points, fmt="os"[i] + "-", color=f"C{i}", ms=5, label=ratio)
    axis.set(xscale="log", xlabel="width of a VGG11 of 144,856 weights", ylabel="test accuracy (%)")
    axis.set_xticks([8, 16, 32, 64], ["8 (dense)", "16", "32", "64"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", fontsize=8)


def draw_final(axis: "Axes", table: pd.DataFrame) -> None:
    """E7: a point for each setting of E1 to E3, at the end of its training."""
    groups = {"dense": ["E1-vgg11-dense"]}
    groups |= {ratio: [f"E1-vgg11-{ratio}-{d}" for d in DENSITIES] for ratio in RATIOS}
    groups["RigL"] = [f"E3-vgg11-ERK-{d}-RigL" for d in DENSITIES[2:]]
    groups["pruned to 0.05"] = [name for name in METHODS if name.startswith("E2")]
    for i, (label, names) in enumerate(groups.items()):
        points = [(mean(table, n, "cpu_seconds")[0], *mean(table, n)) for n in names]
        points = [point for point in points if not np.isnan(point[0])]
        if points:
            x, y, half = np.array(points).T
            look = {"fmt": "*" if label == "dense" else "osD^v"[i - 1], "color": f"C{i}"}
            axis.errorbar(x, y, half, ms=5, lw=1, capsize=2, label=label, **look)
    axis.set(xlabel="CPU seconds of 15 epochs", ylabel="test accuracy (%)", xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def draw_progress(axis: "Axes", curves: pd.DataFrame) -> None:
    """E7: validation accuracy while training, means over the seeds."""
    for i, name in enumerate(name for name in SPEEDS if "vgg11" in name):
        rows = curves[curves["name"] == name].groupby("epoch")[["cpu_seconds", "valid_accuracy"]]
        if len(rows):
            means = rows.mean()
            x, y = means["cpu_seconds"], 100 * means["valid_accuracy"]
            axis.plot(x, y, ".-", color=f"C{i}", ms=4, label=SPEEDS[name])
    axis.set(xlabel="CPU seconds, one thread", ylabel="validation accuracy (%)", xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


PICTURES = {
    "E1": ("random-masks", draw_random_masks),
    "E2": ("sparse-to-sparse", draw_methods),
    "E3": ("drop-and-grow", draw_drop_and_grow),
    "E4": ("tickets", draw_tickets),
    "E5": ("widths", draw_widths),
}


def begun(table: pd.DataFrame, experiment: str) -> bool:
    """Whether a run of the experiment has finished."""
    return bool(table["name"].str.startswith(experiment).any())


def collect_curves(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The epochs of all runs in the table; those of runs whose folders are gone stay as they are.

    Args:
        path: of curves.csv, which may be missing.
    """
    columns = ["epoch", "valid_accuracy", "density", "training_flops", "cpu_seconds"]
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["name", "seed"])
    parts = []
    for row in table.to_dict("records"):
        file = results.folder(HERE / "results.csv", row["run"]) / "epochs.csv"
        if file.exists():
            setting = {"name": row["name"], "seed": row["seed"]}
            parts.append(pd.read_csv(file)[columns].assign(**setting)[["name", "seed", *columns]])
        else:
            parts.append(old[(old["name"] == row["name"]) & (old["seed"] == row["seed"])])
    return pd.concat(parts)


def text(table: pd.DataFrame, curves: pd.DataFrame) -> str:
    """table.md: the tables of all experiments."""
    sections = {
        f"{experiment} {title}": section(table)
        for experiment, (title, section) in SECTIONS.items()
        if begun(table, experiment)
    }
    sections["E7 Time"] = times(curves)
    return "\n".join(f"## {title}\n\n{section}" for title, section in sections.items())


def main() -> None:
    """Write everything."""
    table = read()
    path = HERE / "curves.csv"
    if "--curves" in sys.argv[1:]:
        write_text(path, collect_curves(table, path).to_csv(index=False, float_format="%.6g"))
    curves = pd.read_csv(path)
    write_text(HERE / "table.md", text(table, curves))
    for experiment, (name, picture) in PICTURES.items():
        if not begun(table, experiment):
            continue
        figure = Figure(figsize=(6.6, 4.4), layout="constrained")
        picture(figure.subplots(), table)
        plots.save(figure, HERE / f"{name}.png")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_progress(left, curves)
    draw_final(right, table)
    plots.save(figure, HERE / "time.png")


if __name__ == "__main__":
    main()
