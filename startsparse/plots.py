"""Pictures of runs, of tables over settings, and of curves over epochs."""

import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from startsparse import labels
from startsparse.atomic import replacing
from startsparse.errors import OptionError, UserError, one_line, say
from startsparse.processes import by_rank_0

if TYPE_CHECKING:  # matplotlib is slow to import, and needed when a run has finished
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

log = logging.getLogger("startsparse")

SUFFIXES = (".png", ".pdf", ".svg")


def bars(means: pd.DataFrame, column: str) -> np.ndarray:
    """Lengths [2, rows] of error bars, down and up; those of accuracies stay within 0 and 100 %."""
    mean, half = (means[name].to_numpy(float) for name in (column, f"{column}_ci95"))
    if "accuracy" not in column:
        return np.stack([half, half])
    return 100 * np.stack([np.minimum(half, mean), np.minimum(half, 1 - mean)]).clip(0)


def check_suffix(option: str, path: Path) -> None:
    """Raise `OptionError` unless pictures can be written with this suffix."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{option}: {path} should end in {', '.join(SUFFIXES)}")


def save(figure: "Figure", path: Path, dpi: int = 120) -> None:
    """Write a picture in the format of its suffix, one of `SUFFIXES`; whole or not at all.

    Characters that the font lacks are named in one line.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with _missing_glyphs(path), replacing(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def optional(path: Path) -> Iterator[None]:
    """Around the picture ``path``, which a run can do without: it says what fails, and goes on.

    Matplotlib may be missing or broken, and its fonts and settings are the user's.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning("warning: %s: not drawn (%s)", path, one_line(reason))


def new_figure(width: float, height: float) -> "Figure":
    """An empty one, in inches.

    Raises:
        UserError: matplotlib cannot be imported.
    """
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # of a broken installation, any
        reason = str(error).partition("\n")[0]
        raise UserError(f"pictures need matplotlib, which cannot be imported ({reason})") from None
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _missing_glyphs(path: Path) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    lacking = set()
    for warning in caught:
        if found := re.match(r"Glyph (\d+) .*missing from", str(warning.message)):
            lacking.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if lacking:
        say(f"warning: {path}: the font of pictures has no {' '.join(sorted(lacking))}")


@by_rank_0
def plot_run_by_rank_0(epochs: pd.DataFrame, layers: pd.DataFrame, path: Path) -> None:
    """Draw loss, accuracy and density of a run over the epochs, and its density per layer.

    If it cannot be drawn, a line says so.

    Axes of densities are logarithmic where some are below 0.1.

    Args:
        epochs: the rows of epochs.csv.
        layers: a `startsparse.masks.density_table`.
    """
    with optional(path):
        _plot_run(epochs, layers, path)


def _plot_run(epochs: pd.DataFrame, layers: pd.DataFrame, path: Path) -> None:
    figure = new_figure(11, 7.5)
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
    density.set(xlabel="epoch", ylabel=labels.DENSITY, title="Density")
    _density_limits(density, epochs["density"])
    for axis in (loss, accuracy, density):
        axis.xaxis.get_major_locator().set_params(integer=True)
    rows = layers[layers["layer"] != "total"]
    positions = np.arange(len(rows))
    per_layer.bar(positions, rows["density"], color="tab:blue", label="realised")
    requested = rows["requested"]
    per_layer.plot(positions, requested, "_", color="black", ms=9, label="requested at start")
    per_layer.set_xticks(positions, rows["layer"], rotation=90, fontsize=6)
    per_layer.set(ylabel=labels.DENSITY, title="Density per layer")
    _density_limits(per_layer, pd.concat([rows["density"], requested]), room=1.2)
    per_layer.legend(loc="upper center", ncols=2)
    save(figure, path, dpi=110)


def _density_limits(axis: "Axes", densities: pd.Series, room: float = 1.05) -> None:
    """Let the y axis begin at 0, or be logarithmic where some are below 0.1; ``room`` on top."""
    lowest, highest = densities[densities > 0].min(), max(densities.max(), 1e-9)
    if lowest < 0.1:
        above = max(highest / lowest, 10) ** (2 * (room - 1))
        axis.set(yscale="log", ylim=(lowest / 2, highest * above))
        _plain_ticks(axis.yaxis, highest=1)
    else:
        axis.set(ylim=(0, room * highest))


def _plain_ticks(axis: "Axis", highest: float = np.inf) -> None:
    """Label ticks as 0.01, not as 10 to the -2, and none above ``highest``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v <= highest else ""))
    axis.set_minor_formatter(NullFormatter())


def plot(
    means: pd.DataFrame, by: Sequence[str], column: str, path: Path, *, band: str = ""
) -> None:
    """Draw a `startsparse.report.summarise`-d table: means with error bars of 95 %.

    A single run has no bar. The bar of two runs, 12.7 standard errors, does not stretch the axis.

    Args:
        by: the columns for, in this order, the x axis, the colours, the panels and the line styles;
            at least the first. Columns after the fourth join it. An x axis of numbers above 0 is
            logarithmic, and falls to the right if they are densities. Other values stand side by
            side, numbers in their order. Columns of one value count too.
        column: the column to plot; an accuracy is shown in percent.
        path: its suffix is one of `SUFFIXES`.
        band: a value of the colour; its mean and interval are a grey band across each panel.
    """
    means = means.assign(_="")  # stands for a missing column of ``by``
    if len(by) > 4:
        name = ", ".join(by[3:])
        values = [" ".join(map(labels.shown, row)) for row in means[by[3:]].to_numpy()]
        means, by = means.assign(**{name: values}), [*by[:3], name]
    x, colour, panel, style = (*by, *["_"] * 4)[:4]
    panels, limits = list(dict.fromkeys(means[panel])), means
    in_band = (means[colour].map(labels.shown) == band) & bool(band)
    means, across = means[~in_band], means[in_band]
    figure = new_figure(2.5 + 4 * len(panels), 5)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    x_axis, looks = _x_axis(means[x]), _looks(means[colour], means[style])
    lines = {}
    for axis, title in zip(axes, panels):
        for i, ((c, s), look) in enumerate(looks.items()):
            rows = means[(means[panel] == title) & (means[colour] == c) & (means[style] == s)]
            if rows.empty:
                continue
            aside = (i + 0.5) / len(looks) - 0.5  # as bars at one x hide each other
            lines[_entry(f"{labels.shown(c)} {labels.shown(s)}".strip())] = axis.errorbar(
                x_axis.positions(rows[x], aside),
                _scale(column) * rows[column],
                bars(rows, column),
                **look if x_axis.numbers else {**look, "ls": ""},
                ms=4,
                lw=1.2,
                capsize=2,
            )
        for row in across[across[panel] == title].index:
            lines[_entry(band)] = _band(axis, across.loc[[row]], column)
        what = f"{labels.words(panel)}: " if panel != "_" else ""
        axis.set(title=_text(f"{what}{labels.shown(title)}"), xlabel=_text(labels.label(x)))
        axis.grid(alpha=0.3)
        x_axis.draw(axis)
    axes[0].set_ylabel(_text(labels.label(column)))
    _y_limits(axes[0], limits, column)
    title = ",\n".join(_text(labels.words(name)) for name in (colour, style) if name != "_")
    if title:
        figure.legend(lines.values(), lines, loc="outside right upper", title=title, fontsize=8)
    save(figure, path)


def _text(text: str) -> str:
    """The text so that matplotlib draws it as it is: dollars begin no formula."""
    return text.replace("$", r"\$")


def _entry(text: str) -> str:
    """`_text` for a legend, which leaves out what begins with an underscore."""
    return _text(f" {text}" if text.startswith("_") else text)


def _band(axis: "Axes", row: pd.DataFrame, column: str) -> "Line2D":
    """A mean and its interval across ``axis``; returns the line of the mean."""
    middle = _scale(column) * row[column].iloc[0]
    down, up = bars(row, column)[:, 0]
    if np.isfinite([down, up]).all():
        axis.axhspan(middle - down, middle + up, color="0.85", zorder=0)
    return axis.axhline(middle, color="0.4", lw=1.2, zorder=1)


def _scale(column: str) -> int:
    return 100 if "accuracy" in column else 1


def _looks(colours: pd.Series, styles: pd.Series) -> dict[tuple[Any, Any], dict[str, str]]:
    """(value of the colour, value of the style) -> look of its line, in order of colour."""
    all_colours, all_styles = list(dict.fromkeys(colours)), list(dict.fromkeys(styles))
    pairs = sorted(
        set(zip(colours, styles)),
        key=lambda pair: (all_colours.index(pair[0]), all_styles.index(pair[1])),
    )
    return {
        (colour, style): {
            "color": f"C{all_colours.index(colour)}",
            "marker": "osD^v"[all_styles.index(style) % 5],
            "ls": ("-", "--", ":", "-.")[all_styles.index(style) % 4],
        }
        for colour, style in pairs
    }


class _XAxis(NamedTuple):
    """The x axis of `plot`.

    Attributes:
        ticks: its values; numbers fall.
        numbers: whether they are numbers.
        logarithmic: whether it is logarithmic; otherwise its values stand side by side.
        falls: whether it falls to the right.
    """

    ticks: list
    numbers: bool
    logarithmic: bool
    falls: bool

    @property
    def in_order(self) -> list:
        """The ticks from left to right."""
        return self.ticks if self.falls or not self.numbers else self.ticks[::-1]

    def positions(self, values: pd.Series, aside: float) -> pd.Series:
        """Where ``values`` are, moved to the right by a part, ``aside``, of the smallest gap."""
        if not self.logarithmic:
            return values.map({value: i for i, value in enumerate(self.in_order)}) + 0.6 * aside
        gap = min((a / b for a, b in itertools.pairwise(self.ticks)), default=2.0)
        return values * gap ** (0.25 * (-aside if self.falls else aside))

    def draw(self, axis: "Axes") -> None:
        """Set scale, limits and ticks of ``axis``."""
        crowded: dict[str, Any] = {"rotation": 60, "fontsize": 7} if len(self.ticks) > 8 else {}
        if not self.logarithmic:
            count, words = len(self.ticks), [_text(labels.shown(x)) for x in self.in_order]
            axis.set_xticks(list(range(count)), words, **crowded)
            axis.set_xlim(-0.5, count - 0.5)
            return
        axis.set_xscale("log")
        if self.falls:
            axis.invert_xaxis()
        axis.set_xticks(self.ticks, [f"{tick:.3g}" for tick in self.ticks], **crowded)
        axis.minorticks_off()


def _x_axis(values: pd.Series) -> _XAxis:
    numbers = pd.api.types.is_numeric_dtype(values) and values.dtype != bool
    return _XAxis(
        ticks=sorted(set(values), reverse=True) if numbers else list(dict.fromkeys(values)),
        numbers=numbers,
        logarithmic=numbers and bool((values > 0).all()),
        falls=labels.is_density(str(values.name)),
    )


def _y_limits(axis: "Axes", means: pd.DataFrame, column: str) -> None:
    """Set limits around means and intervals, but not those of two runs."""
    scale, half = _scale(column), means[f"{column}_ci95"].fillna(0)
    if "runs" in means:
        half = half.mask(means["runs"] < 3, 0)
    values = means[column]
    low, high = (scale * values - scale * half).min(), (scale * values + scale * half).max()
    if not np.isfinite([low, high]).all():
        return
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1
    if scale == 100:
        room = max(room, 2)
        axis.set_ylim(max(0, low - room), min(101, high + room))
    elif column in labels.DENSITIES and 0 < values.min() < 0.1:
        axis.set(yscale="log", ylim=(values.min() / 1.5, 1.5 * high))
        _plain_ticks(axis.yaxis)
    else:
        axis.set_ylim(low - room, high + room)


def plot_curves(means: pd.DataFrame, by: Sequence[str], path: Path) -> None:
    """Draw `startsparse.report.curves`: training dashed, validation solid; the epoch axis is log.

    Means of three runs or more have a band of 95 %.
    """
    figure = new_figure(8.5, 4.5)
    axis = figure.subplots()
    groups = means.groupby(list(by), dropna=False, sort=False) if by else [((), means)]
    for i, (setting, rows) in enumerate(groups):
        name = "".join(f"{labels.shown(value)}, " for value in setting)
        for what, style in (("train", "--"), ("valid", "-")):
            mean, half = (100 * rows[f"{what}_accuracy{end}"] for end in ("", "_ci95"))
            line = _entry(f"{name}{'training' if what == 'train' else 'validation'}")
            axis.plot(rows["epoch"], mean, style, color=f"C{i}", lw=1.3, label=line)
            half = half.where(rows["runs"] > 2)
            low, high = (mean - half).clip(0), (mean + half).clip(upper=100)
            axis.fill_between(rows["epoch"], low, high, color=f"C{i}", alpha=0.15, lw=0)
    axis.set(xscale="log", xlabel="epoch", ylabel="accuracy (%)", ylim=(-2, 102))
    _plain_ticks(axis.xaxis)
    axis.grid(alpha=0.3)
    title = ",\n".join(_text(labels.words(name)) for name in by)
    figure.legend(loc="outside right upper", title=title, fontsize=8)
    save(figure, path)
