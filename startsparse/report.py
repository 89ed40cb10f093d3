"""Runs -> pictures and tables.

``python -m startsparse.report results.csv --by conv_type er_sparse_init`` prints one row per
setting: mean over seeds and 95 % confidence interval.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from scipy.special import stdtrit

from startsparse.atomic import replacing, write_text
from startsparse.errors import OptionError, UserError, run_script
from startsparse.processes import by_first


@by_first
def plot_run(epochs: pd.DataFrame, layers: pd.DataFrame, path: Path) -> None:
    """A PNG of a run: loss, accuracy and density over the epochs, and the density per layer.

    Args:
        epochs: the rows of epochs.csv.
        layers: a `startsparse.masks.density_table`.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once a run has finished

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    loss, accuracy, density, per_layer = axes.flat
    x = epochs["epoch"]
    for axis, what, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        axis.plot(x, scale * epochs[f"train_{what}"], ".-", label="training")
        axis.plot(x, scale * epochs[f"valid_{what}"], ".-", label="validation")
        axis.legend()
    # Before its running statistics have settled, BatchNorm can make the first losses huge.
    loss.set(xlabel="epoch", ylabel="cross-entropy", title="Loss", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    density.plot(x, epochs["density"], ".-", color="tab:green")
    density.set(xlabel="epoch", ylabel="kept / all weights", title="Density", ylim=(0, None))
    for axis in (loss, accuracy, density):
        axis.xaxis.get_major_locator().set_params(integer=True)
    rows = layers[layers["layer"] != "total"]
    places = np.arange(len(rows))
    per_layer.bar(places, rows["density"], color="tab:blue", label="realised")
    per_layer.plot(places, rows["requested"], "_", color="black", ms=9, label="requested at start")
    per_layer.set_xticks(places, rows["layer"], rotation=90, fontsize=6)
    per_layer.set(ylabel="density", title="Density per layer", ylim=(0, 1.2))
    per_layer.legend(loc="upper center", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def summary(
    requested: float, layers: pd.DataFrame, result: dict[str, float], seconds: float
) -> dict[str, float]:
    """What a finished run is remembered by: summary.json and its line in results.csv.

    Args:
        requested: the density asked for.
        layers: `startsparse.masks.density_table` of the tested weights.
        result: of `startsparse.trainer.Trainer.test`.
    """
    total = layers.iloc[-1]
    return {
        "requested": requested,
        "density": float(total["density"]),
        "weights": int(total["weights"]),
        "kept": int(total["kept"]),
        **result,
        "seconds": round(seconds, 1),
    }


def text(summary: dict[str, float], folder: Path) -> str:
    """A `summary` for people."""
    search = summary.get("search_flops")
    rows = {
        "requested density": f"{summary['requested']:.4f}",
        "realised density": f"{summary['density']:.4f}",
        "weights kept": f"{summary['kept']:,} of {summary['weights']:,}",
        "validation accuracy": f"{100 * summary['valid_accuracy']:.2f} % in epoch "
        f"{summary['epoch']}",
        "test accuracy": f"{100 * summary['test_accuracy']:.2f} %",
        "FLOPs of inference": f"{summary['inference_flops']:.4g} an example, "
        f"{summary['inference_flops_share']:.4f} of dense",
        "FLOPs of training": f"{summary['training_flops']:.4g} in all, "
        f"{summary['training_flops_share']:.4f} of dense",
        **({"FLOPs of the search": f"{search:.4g} before training"} if search else {}),
        "seconds": f"{summary['seconds']:.0f}",
        "run folder": str(folder.resolve()),
        "picture": str(folder.resolve() / "curves.png"),
    }
    return "\n".join(["", *(f"{name:<20} {value}" for name, value in rows.items())])


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean (Student's t); NaN for a single value."""
    n = len(values)
    return stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan


def summarise(results: pd.DataFrame, by: Sequence[str], of: Sequence[str]) -> pd.DataFrame:
    """One row per setting ``by``: number of runs, and mean and 95 % half-width of each ``of``."""
    columns = {"runs": (of[0], "size")}
    for name in of:
        columns[name] = (name, "mean")
        columns[f"{name}_ci95"] = (name, half_width)
    return results.groupby(list(by), dropna=False, sort=False).agg(**columns).reset_index()


def markdown(table: pd.DataFrame, of: Sequence[str], digits: int = 4) -> str:
    """A `summarise`-d table as Markdown, ``mean ± half-width`` in one cell."""
    shown = table.drop(columns=[f"{name}_ci95" for name in of])
    for name in of:
        shown[name] = [
            f"{mean:.{digits}f}" + ("" if np.isnan(ci) else f" ± {ci:.{digits}f}")
            for mean, ci in zip(table[name], table[f"{name}_ci95"])
        ]
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot(means: pd.DataFrame, by: Sequence[str], of: str, path: Path) -> None:
    """A PNG of a `summarise`-d table: means with error bars of 95 %.

    Args:
        by: the columns that make, in this order, the x axis, the colours, the panels and the line
            styles; at least the first. An axis of numbers is logarithmic and falls to the right, as
            densities do; other values stand side by side. Settings of one value too.
        of: the column to plot; an accuracy is shown in percent.
    """
    from matplotlib.figure import Figure  # slow to import, and needed at the end

    x, colour, panel, style = (*by, *[None] * 4)[:4]
    means = means.assign(_="")  # stands for what is not asked for
    x, colour, panel, style = (name or "_" for name in (x, colour, panel, style))
    scale = 100 if "accuracy" in of else 1
    panels, colours, styles = (list(dict.fromkeys(means[c])) for c in (panel, colour, style))
    settings = sorted(
        set(zip(means[colour], means[style])),
        key=lambda pair: (colours.index(pair[0]), styles.index(pair[1])),
    )
    figure = Figure(figsize=(2.5 + 5.5 * len(panels), 6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    numbers = pd.api.types.is_numeric_dtype(means[x])
    places = {value: i for i, value in enumerate(dict.fromkeys(means[x]))}
    ticks = sorted(set(means[x]), reverse=True)
    gap = min((a / b for a, b in itertools.pairwise(ticks)), default=2.0) if numbers else None
    lines = {}
    for axis, title in zip(axes, panels):
        for i, (c, s) in enumerate(settings):
            rows = means[(means[panel] == title) & (means[colour] == c) & (means[style] == s)]
            if rows.empty:
                continue
            # Side by side, as they would hide each other.
            aside = 0.6 * ((i + 0.5) / len(settings) - 0.5)
            at = rows[x] * gap**-aside if numbers else rows[x].map(places) + aside
            lines[f"{c} {s}".strip()] = axis.errorbar(
                at,
                scale * rows[of],
                scale * rows[f"{of}_ci95"].fillna(0),
                color=f"C{colours.index(c)}",
                marker="osD^v"[styles.index(s) % 5],
                ms=4,
                ls=("-", "--", ":", "-.")[styles.index(s) % 4] if numbers else "",
                lw=1.2,
                capsize=2,
            )
        what = f"{panel.replace('_', ' ')}: " if panel != "_" else ""
        axis.set(title=f"{what}{title}", xlabel=x.replace("_", " "))
        axis.grid(alpha=0.3)
        if numbers:
            axis.set_xscale("log")
            axis.invert_xaxis()
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        else:
            axis.set_xticks(list(places.values()), list(places))
    axes[0].set_ylabel(of.replace("_", " ") + " (%)" * (scale == 100))
    if scale == 100:  # an interval of few seeds may reach far beyond what an accuracy can be
        lowest = (means[of] - means[f"{of}_ci95"].fillna(0)).min()
        axes[0].set_ylim(max(0, 100 * lowest - 2), 101)
    title = ", ".join(name.replace("_", " ") for name in (colour, style) if name != "_")
    figure.legend(lines.values(), lines, loc="outside right upper", title=title, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def curves(results: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Training and validation accuracy against the epoch: means over the runs of each setting.

    Args:
        results: rows of results.csv; their ``run`` is a folder with epochs.csv.
        by: the columns that make a setting.

    Returns:
        One row per setting and epoch: ``by``, epoch, runs, and mean and 95 % half-width of
        train_accuracy and valid_accuracy.
    """
    tables = []
    for row in results.to_dict("records"):
        path = Path(row["run"]) / "epochs.csv"
        if not path.exists():
            raise UserError(f"--curves: {path} does not exist; call it where the runs were started")
        epochs = pd.read_csv(path)[["epoch", "train_accuracy", "valid_accuracy"]]
        tables.append(epochs.assign(**{name: row[name] for name in by}))
    means = summarise(pd.concat(tables), [*by, "epoch"], ["train_accuracy", "valid_accuracy"])
    return means.sort_values([*by, "epoch"], ignore_index=True)


def plot_curves(means: pd.DataFrame, by: Sequence[str], path: Path) -> None:
    """A PNG of `curves`: training dashed, validation solid, with a band of 95 %; epochs as log."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (setting, rows) in enumerate(means.groupby(list(by), dropna=False, sort=False)):
        name = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in setting)
        for what, style in (("train", "--"), ("valid", "-")):
            mean, half = (100 * rows[f"{what}_accuracy{end}"] for end in ("", "_ci95"))
            label = f"{name}, {'training' if what == 'train' else 'validation'}"
            axis.plot(rows["epoch"], mean, style, color=f"C{i}", lw=1.3, label=label)
            low, high = (mean - half).clip(0), (mean + half).clip(upper=100)
            axis.fill_between(rows["epoch"], low, high, color=f"C{i}", alpha=0.15, lw=0)
    axis.set(xscale="log", xlabel="epoch", ylabel="accuracy (%)", ylim=(-2, 102))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title=", ".join(by).replace("_", " "), fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


@dataclasses.dataclass
class ReportOptions:
    """Mean and 95 % confidence interval over the seeds of each setting."""

    results: Annotated[Path, tyro.conf.Positional]
    """results.csv, as the scripts write it"""
    by: tuple[str, ...] = ("name",)
    """Columns that make a setting"""
    of: tuple[str, ...] = ("density", "valid_accuracy", "test_accuracy")
    """Columns to average"""
    digits: int = 4
    """Digits after the point"""
    plot: Path | None = None
    """PNG of the last column --of; --by gives axis, colours, panels, line styles, in this order"""
    curves: Path | None = None
    """PNG of training and validation accuracy against the epoch, means of each setting; their
    numbers are written beside it as CSV"""


def main() -> None:
    """Print the table."""
    options = tyro.cli(ReportOptions)
    if not options.results.exists():
        raise OptionError(f"results: {options.results} does not exist")
    results = pd.read_csv(options.results)
    for column in (*options.by, *options.of):
        if column not in results:
            raise OptionError(f"--by, --of: {options.results} has no column '{column}'")
    means = summarise(results, options.by, options.of)
    print(markdown(means, options.of, options.digits))
    if options.plot:
        plot(means, options.by, options.of[-1], options.plot)
    if options.curves:
        table = curves(results, options.by)
        numbers = table.to_csv(index=False, float_format="%.4f")
        write_text(options.curves.with_suffix(".csv"), numbers)
        plot_curves(table, options.by, options.curves)


if __name__ == "__main__":
    run_script(main)
