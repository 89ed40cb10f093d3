"""Tables and pictures of `startsparse.tabular`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from startsparse.errors import one_line
from startsparse.labels import DENSITY
from startsparse.plots import bars, new_figure
from startsparse.report import summarise

if TYPE_CHECKING:  # matplotlib is slow to import, and needed last
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTING = ["start", "reset", "flow"]  # identifies a network, together with table and seed


def start_name(start: float) -> str:
    """Name of a starting density."""
    return "dense" if start == 1 else f"ER {start:g}"


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % half-width over the seeds of each table, setting and requested density.

    Args:
        rows: of `startsparse.tabular.run`, with or without a first column, table.

    Returns:
        Columns table, start, reset, flow, requested, runs, density, test_accuracy and majority,
        each of the last three with its _ci95, and cut: the number of cut runs.
    """
    if "table" not in rows:
        rows = rows.assign(table="")
    keys = ["table", *SETTING, "requested"]
    summary = summarise(rows, keys, ["density", "test_accuracy", "majority"])
    return summary.merge(rows.groupby(keys, as_index=False)["cut"].sum(), on=keys)


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy in percent, ``mean ± 95 % half-width``: settings down, densities across.

    In brackets: the realised density, if it is not the requested one, and the number of cut runs.
    """
    summary = means(rows).sort_values("requested", ascending=False, kind="stable")
    summary["cell"] = [_cell(row) for row in summary.itertuples()]
    yes_no = {False: "no", True: "yes"}
    named = summary.assign(
        start=summary["start"].map(start_name),
        reset=summary["reset"].map(yes_no),
        flow=summary["flow"].map(yes_no),
    )
    keys = [*(["table"] if "table" in rows else []), *SETTING]
    order = {tuple(key): None for key in named.sort_index()[keys].to_numpy()}
    columns = list(dict.fromkeys(named["requested"]))
    table = named.pivot(index=keys, columns="requested", values="cell").fillna("")
    table = table.loc[list(order), columns]
    table.columns = pd.Index([f"{density:g}" for density in columns], name="density")
    return table


def _cell(row: Any) -> str:
    text = f"{100 * row.test_accuracy:.1f}"
    if row.runs > 1:
        text += f" ± {100 * row.test_accuracy_ci95:.1f}"
    remarks = []
    if abs(row.density / row.requested - 1) > 0.05:
        remarks.append(f"at {row.density:.3g}")
    if row.cut:
        remarks.append(f"{row.cut} of {row.runs} cut")
    return text + (f" ({', '.join(remarks)})" if remarks else "")


def markdown(rows: pd.DataFrame) -> str:
    """`wide` as Markdown."""
    table = wide(rows)
    lines = [[*table.index.names, *table.columns]]
    lines += [["---"] * len(lines[0])]
    lines += [[*name, *cells] for name, cells in zip(table.index, table.to_numpy())]
    cells = ([one_line(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def collapses(rows: pd.DataFrame) -> list[str]:
    """One line for each setting and density with networks cut, or no better than the majority."""
    fallen = rows[rows["cut"] | (rows["test_accuracy"] <= rows["majority"])]
    lines = []
    for (start, reset, flow, density), group in fallen.groupby([*SETTING, "requested"], sort=False):
        runs = rows[(rows[[*SETTING, "requested"]] == [start, reset, flow, density]).all(axis=1)]
        empty = sorted({name for names in group["empty_layers"] for name in names.split()})
        lines.append(
            f"{start_name(start)}, {'reset' if reset else 'no reset'}, "
            f"flow preservation {'on' if flow else 'off'}, density {density:g}: "
            f"{len(group)} of {len(runs)} networks are at the majority class or below, "
            f"{int(group['cut'].sum())} without a path from input to output; "
            f"empty layers: {', '.join(empty) or 'none'}"
        )
    return lines


def accuracy_plot(rows: pd.DataFrame) -> "Figure":
    """Test accuracy against realised density: means, 95 % intervals, the majority class.

    Each table has a line of panels, with a panel for each way to prune; colours are starts. A
    single run has no interval; the interval of few runs may leave the picture.
    """
    summary = means(rows)
    names, starts = (list(dict.fromkeys(summary[c])) for c in ("table", "start"))
    ways = sorted(set(zip(summary["flow"], summary["reset"])))
    figure = new_figure(0.8 + 3 * len(ways), 1 + 2.6 * len(names))
    axes = figure.subplots(len(names), len(ways), sharex=True, sharey="row", squeeze=False)
    for name, line in zip(names, axes):
        table = summary[summary["table"] == name]
        for (flow, reset), axis in zip(ways, line):
            title = ("reset" if reset else "no reset") + (", flow preserved" if flow else "")
            full = _shown(f"{name}: {title}" if name else title)
            axis.set_title(full, fontsize=9, parse_math=False)
            panel = table[(table["flow"] == flow) & (table["reset"] == reset)]
            for start, curve in panel.groupby("start", sort=False):
                curve = curve[curve["density"] > 0]  # the axis is logarithmic
                axis.errorbar(
                    curve["density"],
                    100 * curve["test_accuracy"],
                    bars(curve, "test_accuracy"),
                    color=f"C{starts.index(start)}",
                    marker="osD^v"[starts.index(start) % 5],
                    ms=3.5,
                    lw=1.2,
                    elinewidth=0.8,
                    capsize=2,
                    label=start_name(start),
                )
            majority = 100 * table["majority"].mean()
            axis.axhline(majority, color="black", ls=":", lw=1, label="majority class")
            axis.grid(alpha=0.3)
        # An interval of few seeds may reach far beyond what an accuracy can be.
        low = min(table["majority"].min(), table["test_accuracy"].min())
        line[0].set(ylim=(100 * low - 6, 101), ylabel="test accuracy (%)")
    _density_axis(axes[0, 0], sorted(set(summary["requested"]), reverse=True))
    for axis in axes[-1]:
        axis.set_xlabel(DENSITY, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
    shown: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), fontsize=8)
    return figure


def _density_axis(axis: "Axes", ticks: Sequence[float]) -> None:
    """Logarithmic, falling to the right, with as many of ``ticks`` as can be read."""
    axis.set_xscale("log")
    axis.invert_xaxis()
    apart = [ticks[0]]
    for tick in ticks[1:]:
        if tick <= apart[-1] / 2.4:
            apart.append(tick)
    axis.set_xticks(apart, [f"{tick:g}" for tick in apart])
    axis.minorticks_off()


def _shown(name: str, longest: int = 80) -> str:
    """A name on one line, for a picture; of a long one the end."""
    name = one_line(name)
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


def mask_picture(masks: dict[str, Tensor], feature_names: Sequence[str]) -> "Figure":
    """First-layer masks, one below the other: features down, hidden units across, edges dark.

    On the right: the number of edges of each feature.

    Args:
        masks: title -> bool [units, features].
    """
    height = 0.6 + 0.13 * len(feature_names)
    figure = new_figure(9, height * len(masks))
    axes = figure.subplots(len(masks), 2, squeeze=False, width_ratios=[5, 1])
    for (title, mask), (picture, counts) in zip(masks.items(), axes):
        edges, features = mask.cpu().numpy(), range(len(feature_names))
        picture.imshow(
            edges.T, aspect="auto", cmap="Greys", interpolation="nearest", vmin=0, vmax=1
        )
        names = list(map(_shown, feature_names))
        picture.set_yticks(features, names, fontsize=7, parse_math=False)
        shown = _shown(f"{title}: {edges.sum()} of {edges.size} edges")
        picture.set_title(shown, fontsize=10, parse_math=False)
        counts.barh(features, edges.sum(0), color="0.4")
        counts.set(ylim=picture.get_ylim(), yticks=[])
        counts.set_title("edges of a feature", fontsize=10)
    axes[-1, 0].set_xlabel("hidden unit")
    return figure
