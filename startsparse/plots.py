"""Pictures of runs, of tables over settings, and of curves over epochs."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from startsparse.atomic import replacing
from startsparse.errors import OptionError, UserError
from startsparse.fields import normal
from startsparse.processes import by_rank_0
from startsparse.results import OTHER_NAMES

if TYPE_CHECKING:  # matplotlib is slow to import, and needed when a run has finished
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")

KEPT = "density (kept / all weights)"
LABELS = {  # the field's words for columns
    "density": KEPT,
    "requested": "density asked for (kept / all weights)",
    "er_sparse_init": "density of the random mask (kept / all weights)",
    "final_density": "final density (kept / all weights)",
    "sparsity": "density of the ticket (kept / all weights)",
    "sparsity_start": "density that annealing starts from",
    "test_accuracy": "test accuracy (%)",
    "valid_accuracy": "validation accuracy (%)",
    "train_accuracy": "training accuracy (%)",
    "test_loss": "test loss (cross-entropy)",
    "inference_flops_share": "FLOPs of inference (share of dense)",
    "training_flops_share": "FLOPs of training (share of dense)",
    "er_sparse_method": "layer-wise ratio",
    "st_decay": "weight decay of s",
    "lr": "learning rate",
    "arch": "network",
    "set": "data set",
}
DENSITIES = {"density", "requested", "er_sparse_init", "final_density", "sparsity"}


def label(name: str) -> str:
    """A column in the field's words; accuracies are in percent."""
    own = OTHER_NAMES.get(normal(name), name)
    return LABELS.get(own, name.replace("_", " ") + " (%)" * ("accuracy" in name))


def shown(value: object) -> str:
    """A value of an option as people write it."""
    if isinstance(value, float | np.floating):
        x = float(value)
        if math.isnan(x):
            return ""
        return f"{x:.0f}" if abs(x) < 10**15 and x == round(x) else f"{x:.4g}"
    return str(value)


def words(name: str) -> str:
    """`label` without units."""
    return label(name).partition(" (")[0]


def bars(means: pd.DataFrame, of: str) -> np.ndarray:
    """Lengths [2, rows] of error bars, down and up; no accuracy is below 0 or above 100 %."""
    mean, half = (means[name].to_numpy(float) for name in (of, f"{of}_ci95"))
    if "accuracy" not in of:
        return np.stack([half, half])
    return 100 * np.stack([np.minimum(half, mean), np.minimum(half, 1 - mean)]).clip(0)


def check_suffix(option: str, path: Path) -> None:
    """Raise `OptionError` unless pictures can be written with this suffix."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{option}: {path} should end in {', '.join(SUFFIXES)}")


def save(figure: "Figure", path: Path, dpi: int = 120) -> None:
    """A picture in the format of the suffix, one of `SUFFIXES`; whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


@by_rank_0
def plot_run_by_rank_0(epochs: pd.DataFrame, layers: pd.DataFrame, path: Path) -> None:
    """A picture of a run: loss, accuracy, density over the epochs, and density per layer.

    Densities are logarithmic where some are below 0.1.

    Args:
        epochs: the rows of epochs.csv.
        layers: a `startsparse.masks.density_table`.
    """
    from matplotlib.figure import Figure

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
    density.set(xlabel="epoch", ylabel=KEPT, title="Density")
    _density_limits(density, epochs["density"])
    for axis in (loss, accuracy, density):
        axis.xaxis.get_major_locator().set_params(integer=True)
    rows = layers[layers["layer"] != "total"]
    places = np.arange(len(rows))
    per_layer.bar(places, rows["density"], color="tab:blue", label="realised")
    per_layer.plot(places, rows["requested"], "_", color="black", ms=9, label="requested at start")
    per_layer.set_xticks(places, rows["layer"], rotation=90, fontsize=6)
    per_layer.set(ylabel=KEPT, title="Density per layer")
    _density_limits(per_layer, pd.concat([rows["density"], rows["requested"]]), room=1.2)
    per_layer.legend(loc="upper center", ncols=2)
    save(figure, path, dpi=110)


def _density_limits(axis: "Axes", densities: pd.Series, room: float = 1.05) -> None:
    """From 0, or logarithmic where some are below 0.1; ``room`` above the highest."""
    lowest, highest = densities[densities > 0].min(), max(densities.max(), 1e-9)
    if lowest < 0.1:
        above = max(highest / lowest, 10) ** (2 * (room - 1))
        axis.set(yscale="log", ylim=(lowest / 2, highest * above))
        _plain_ticks(axis.yaxis, highest=1)
    else:
        axis.set(ylim=(0, room * highest))


def _plain_ticks(axis: "Axis", highest: float = np.inf) -> None:
    """0.01, not 10 to the -2; none above ``highest``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v <= highest else ""))
    axis.set_minor_formatter(NullFormatter())


def plot(means: pd.DataFrame, by: Sequence[str], of: str, path: Path) -> None:
    """A picture of a `startsparse.report.summarise`-d table: means with error bars of 95 %.

    One run has no bar. That of two is 12.7 standard errors long; it does not stretch the axis.

    Args:
        by: the columns that make, in this order, the x axis, the colours, the panels and the line
            styles; at least the first; those after the fourth count for the line styles. An axis of
            numbers above 0 is logarithmic, and falls to the right if they are densities; other
            values stand side by side, in order if they are numbers. Settings of one value too.
        of: the column to plot; an accuracy is shown in percent.
        path: its suffix is one of `SUFFIXES`.
    """
    from matplotlib.figure import Figure

    means = means.assign(_="")  # stands for what is not asked for
    if len(by) > 4:
        means = means.assign(
            **{", ".join(by[3:]): [" ".join(map(shown, v)) for v in means[by[3:]].to_numpy()]}
        )
        by = [*by[:3], ", ".join(by[3:])]
    x, colour, panel, style = (*by, *["_"] * 4)[:4]
    scale = 100 if "accuracy" in of else 1
    panels, colours, styles = (list(dict.fromkeys(means[c])) for c in (panel, colour, style))
    settings = sorted(
        set(zip(means[colour], means[style])),
        key=lambda pair: (colours.index(pair[0]), styles.index(pair[1])),
    )
    figure = Figure(figsize=(2.5 + 5.5 * len(panels), 6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    numbers = pd.api.types.is_numeric_dtype(means[x]) and means[x].dtype != bool
    ticks = sorted(set(means[x]), reverse=True) if numbers else list(dict.fromkeys(means[x]))
    logarithmic = numbers and bool((means[x] > 0).all())
    falls = OTHER_NAMES.get(normal(x), x) in DENSITIES
    places = {value: i for i, value in enumerate(ticks if falls or not numbers else ticks[::-1])}
    gap = min((a / b for a, b in itertools.pairwise(ticks)), default=2.0) if logarithmic else 1
    lines = {}
    for axis, title in zip(axes, panels):
        for i, (c, s) in enumerate(settings):
            rows = means[(means[panel] == title) & (means[colour] == c) & (means[style] == s)]
            if rows.empty:
                continue
            # Side by side, as they would hide each other.
            aside = 0.6 * ((i + 0.5) / len(settings) - 0.5)
            if logarithmic:
                at = rows[x] * gap ** (-aside if falls else aside)
            else:
                at = rows[x].map(places) + aside
            lines[f"{shown(c)} {shown(s)}".strip()] = axis.errorbar(
                at,
                scale * rows[of],
                bars(rows, of),
                color=f"C{colours.index(c)}",
                marker="osD^v"[styles.index(s) % 5],
                ms=4,
                ls=("-", "--", ":", "-.")[styles.index(s) % 4] if numbers else "",
                lw=1.2,
                capsize=2,
            )
        what = f"{words(panel)}: " if panel != "_" else ""
        axis.set(title=f"{what}{shown(title)}", xlabel=label(x))
        axis.grid(alpha=0.3)
        _x_ticks(axis, ticks, places, logarithmic, falls)
    axes[0].set_ylabel(label(of))
    _y_limits(axes[0], means, of, scale)
    title = ",\n".join(words(name) for name in (colour, style) if name != "_")
    if title:
        figure.legend(lines.values(), lines, loc="outside right upper", title=title, fontsize=8)
    save(figure, path)


def _x_ticks(axis: "Axes", ticks: list, places: dict, logarithmic: bool, falls: bool) -> None:
    crowded: dict[str, Any] = {"rotation": 60, "fontsize": 7} if len(ticks) > 8 else {}
    if not logarithmic:
        axis.set_xticks(list(places.values()), [shown(place) for place in places], **crowded)
        axis.set_xlim(-0.5, len(places) - 0.5)
        return
    axis.set_xscale("log")
    if falls:
        axis.invert_xaxis()
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], **crowded)
    axis.minorticks_off()


def _y_limits(axis: "Axes", means: pd.DataFrame, of: str, scale: int) -> None:
    """Around means and intervals, but not those of two runs; an accuracy ends at 100 %."""
    half = means[f"{of}_ci95"].fillna(0)
    if "runs" in means:
        half = half.mask(means["runs"] < 3, 0)
    low, high = (scale * means[of] - scale * half).min(), (scale * means[of] + scale * half).max()
    if not np.isfinite([low, high]).all():
        return
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1
    if scale == 100:
        axis.set_ylim(max(0, min(low - room, low - 2)), 101)
    elif of in DENSITIES and 0 < means[of].min() < 0.1:
        axis.set(yscale="log", ylim=(means[of].min() / 1.5, 1.5 * high))
        _plain_ticks(axis.yaxis)
    else:
        axis.set_ylim(low - room, high + room)


def plot_curves(means: pd.DataFrame, by: Sequence[str], path: Path) -> None:
    """A picture of `startsparse.report.curves`: training dashed, validation solid; epochs as log.

    A band of 95 % around each where there are three runs or more.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axis = figure.subplots()
    groups = means.groupby(list(by), dropna=False, sort=False) if by else [((), means)]
    for i, (setting, rows) in enumerate(groups):
        name = "".join(f"{shown(value)}, " for value in setting)
        for what, style in (("train", "--"), ("valid", "-")):
            mean, half = (100 * rows[f"{what}_accuracy{end}"] for end in ("", "_ci95"))
            line = f"{name}{'training' if what == 'train' else 'validation'}"
            axis.plot(rows["epoch"], mean, style, color=f"C{i}", lw=1.3, label=line)
            half = half.where(rows["runs"] > 2)
            low, high = (mean - half).clip(0), (mean + half).clip(upper=100)
            axis.fill_between(rows["epoch"], low, high, color=f"C{i}", alpha=0.15, lw=0)
    axis.set(xscale="log", xlabel="epoch", ylabel="accuracy (%)", ylim=(-2, 102))
    _plain_ticks(axis.xaxis)
    axis.grid(alpha=0.3)
    title = ",\n".join(map(words, by))
    figure.legend(loc="outside right upper", title=title, fontsize=8)
    save(figure, path)
