"""Runs -> tables.

``python -m startsparse.report results.csv`` prints one row per setting: mean over seeds and 95 %
confidence interval. Runs that differ in an option other than the seed are never averaged.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro

from startsparse import labels, names, plots, results
from startsparse.atomic import write_text
from startsparse.commandline import from_flags
from startsparse.console import decimals, number
from startsparse.errors import OptionError, UserError, run_script, say
from startsparse.fields import default_is
from startsparse.options import require_range
from startsparse.places import check_file
from startsparse.runs import FREE

SEEDS_AND_NAMES = {"seed", "name", "expt_setup"}  # they make no setting
CURVES = ["epoch", "train_accuracy", "valid_accuracy"]


def summary(
    requested: float, layers: pd.DataFrame, result: dict[str, Any], times: dict[str, float]
) -> dict[str, Any]:
    """The result of a finished run, for summary.json and its row of results.csv.

    Args:
        requested: the requested density.
        layers: `startsparse.masks.density_table` of the tested weights.
        result: of `startsparse.trainer.Trainer.test`.
        times: of `startsparse.clock.Clock.read`; ``seconds`` is the last, see `options_of`.
    """
    total = layers.iloc[-1]
    return {
        "requested": requested,
        "density": float(total["density"]),
        "weights": int(total["weights"]),
        "kept": int(total["kept"]),
        **result,
        **{name: round(value, 1) for name, value in times.items()},
    }


def text(summary: dict[str, Any], folder: Path) -> str:
    """A `summary` as text."""
    search = summary.get("search_flops")
    rows = {
        "requested density": number(summary["requested"]),
        "realised density": number(summary["density"]),
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
        **({} if summary.get("checksum", True) else {"checksums": "not compared"}),
        "run folder": str(folder.resolve()),
    }
    return "\n".join(["", *(f"{name:<20} {value}" for name, value in rows.items())])


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean (Student's t); NaN for a single value."""
    from scipy.special import stdtrit  # slow to import, and no run needs it

    n = len(values)
    with np.errstate(invalid="ignore"):  # infinite values
        return stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan


def paired(
    runs: pd.DataFrame, others: pd.DataFrame, column: str = "test_accuracy"
) -> tuple[float, float]:
    """Mean and 95 % half-width of the differences of two settings, paired by seed.

    Seeds that only one of them has do not count; NaN without a common one. Runs of one seed share
    split, order and, where layers agree, weights and masks, so that their difference varies less
    than they do.
    """
    both = [table.set_index("seed")[column].astype(float) for table in (runs, others)]
    differences = (both[0] - both[1]).dropna().tolist()
    return (
        (float(np.mean(differences)), half_width(differences)) if differences else (np.nan, np.nan)
    )


def summarise(results: pd.DataFrame, by: Sequence[str], of: Sequence[str]) -> pd.DataFrame:
    """One row per setting ``by``: number of runs, and mean and 95 % half-width of each ``of``.

    A mean is NaN where a run of the setting has no value. Without ``by`` all are one setting.
    """
    columns: dict[str, tuple[str, Any]] = {"runs": (of[0], "size")}
    for name in of:
        columns[name] = (name, lambda values: values.mean(skipna=False))
        columns[f"{name}_ci95"] = (name, half_width)
    if not by:
        return results.groupby(lambda _: 0).agg(**columns)
    return results.groupby(list(by), dropna=False, sort=False).agg(**columns).reset_index()


def options_of(table: pd.DataFrame) -> list[str]:
    """The columns of a results.csv that are options which affect the result, but the seed."""
    columns = list(table.columns)
    if "seconds" not in columns:  # a table from elsewhere
        return []
    options = columns[columns.index("seconds") + 1 :]
    return [name for name in options if name not in FREE | SEEDS_AND_NAMES]


def settings(
    table: pd.DataFrame, by: Sequence[str] | None, options: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The columns that group rows by setting.

    The seed of another run in the path of an option, as in start_from, makes no difference.

    Args:
        table: rows of results.csv.
        by: columns to group by; None: all options that vary.
        options: the columns of options that affect the result, without the seed.

    Returns:
        ``by``, and the options that differ between rows that agree in ``by``: add them.

    Raises:
        UserError: a seed repeats within a setting; names the run folders.
    """
    table = without_seeds(table, options)
    varying = [name for name in options if table[name].nunique(dropna=False) > 1]
    if by is None:
        columns, more = varying, []
    else:
        columns, more = list(by), [name for name in varying if name not in by]
    if columns:
        groups = table.groupby(columns, dropna=False)
        more = [name for name in more if (groups[name].nunique(dropna=False) > 1).any()]
    if "seed" in table:
        _refuse_repeated_seed(table, [*columns, *more, "seed"])
    return columns, more


def _refuse_repeated_seed(table: pd.DataFrame, columns: list[str]) -> None:
    """Raise `UserError` where rows agree in ``columns``, which are a setting and its seed."""
    repeated = table[table.duplicated(columns, keep=False)]
    if len(repeated):
        first = repeated[columns].iloc[[0]].merge(repeated)
        runs = ", ".join(first["run"]) if "run" in first else f"{len(first)} rows"
        raise UserError(
            f"seed {labels.shown(first['seed'].iloc[0])} repeats in one setting: {runs}; take "
            "all but one out of the table, or tell them apart by another --by, as name or run"
        )


def without_seeds(table: pd.DataFrame, options: Sequence[str]) -> pd.DataFrame:
    """The table with {seed} instead of a row's seed in the paths that its ``options`` hold."""
    table = table.copy()
    for name in results.TEXT.intersection(options) if "seed" in table else ():
        table[name] = [
            re.sub(rf"seed-{labels.shown(seed)}(?!\d)", "seed-{seed}", str(value))
            for value, seed in zip(table[name], table["seed"])
        ]
    return table


def markdown(table: pd.DataFrame, of: Sequence[str], digits: int = 4) -> str:
    """A `summarise`-d table as Markdown, ``mean ± half-width`` in one cell.

    Args:
        digits: after the point; significant ones for values below 0.1 that are no accuracies.
    """
    cells = table.drop(columns=[f"{name}_ci95" for name in of])
    for name in cells.columns.difference(list(of)):
        cells[name] = [labels.shown(value).replace("|", "\\|") for value in cells[name]]
    for name in of:
        cells[name] = [
            _cell(mean, half, digits, "accuracy" in name)
            for mean, half in zip(table[name], table[f"{name}_ci95"])
        ]
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(mean: float, half: float, digits: int, fixed: bool) -> str:
    if np.isnan(mean):
        return ""
    if abs(mean) >= 10**6:
        return f"{mean:.{digits}g}" + ("" if np.isnan(half) else f" ± {half:.{digits}g}")
    places = digits if fixed else decimals(mean, digits)
    return f"{mean:.{places}f}" + ("" if np.isnan(half) else f" ± {half:.{places}f}")


def curves(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Training and validation accuracy against the epoch: means over the runs of each setting.

    Args:
        table: rows of results.csv; their ``run`` is a folder with epochs.csv.
        by: the columns that make a setting.

    Returns:
        One row per setting and epoch: ``by``, epoch, runs, and mean and 95 % half-width of
        train_accuracy and valid_accuracy.
    """
    tables = []
    for row in table.to_dict("records"):
        path = Path(row["run"]) / "epochs.csv"
        if not path.exists():
            raise UserError(f"--curves: {path} does not exist; the run folders are needed")
        epochs = results.numbers(results.read(path))
        for name in CURVES:
            if name not in epochs or not pd.api.types.is_numeric_dtype(epochs[name]):
                raise UserError(f"--curves: {path} has no column '{name}' of numbers")
        tables.append(epochs[CURVES].assign(**{name: row[name] for name in by}))
    means = summarise(pd.concat(tables), [*by, "epoch"], ["train_accuracy", "valid_accuracy"])
    return means.sort_values([*by, "epoch"], ignore_index=True)


@dataclasses.dataclass
class ReportOptions:
    """Mean and 95 % confidence interval over the seeds of each setting."""

    results: Annotated[str, tyro.conf.Positional] = ""
    """results.csv, as the scripts write it"""
    by: Annotated[tuple[str, ...], default_is("all options that vary, but seed and name")] = ()
    """Options that make a setting, by the script's names; others that differ within one are added,
    with a note"""
    of: tuple[str, ...] = ("density", "valid_accuracy", "test_accuracy")
    """Columns to average"""
    digits: int = 4
    """Digits after the point; below 0.1, significant digits of all values but accuracies"""
    plot: Annotated[str, default_is("none")] = ""
    """Picture (.png, .pdf or .svg) of the last column --of; --by gives axis, colours, panels, line
    styles, in this order"""
    band: Annotated[str, default_is("none")] = ""
    """Value of the second --by whose mean and interval the picture shows as a band across it, as
    dense"""
    curves: Annotated[str, default_is("none")] = ""
    """Picture of training and validation accuracy against the epoch, means of each setting; a CSV
    beside it has their numbers"""

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        names.check(self)
        if not self.results:
            raise OptionError("RESULTS: name a results.csv")
        require_range(self, "digits", low=0, high=15)
        for name in ("plot", "curves"):
            if value := getattr(self, name):
                plots.check_suffix(f"--{name}", Path(value))
                check_file(f"--{name}", Path(value))
        if self.curves:
            check_file("--curves", Path(self.curves).with_suffix(".csv"))
        if not self.of:
            raise OptionError("--of: needs at least one column")
        if self.band and not self.plot:
            raise OptionError("--band: goes with --plot")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = from_flags(ReportOptions, argv, ReportOptions())
    options.check()
    table, by = read(options)
    means = summarise(table, by, options.of)
    print(markdown(means, options.of, options.digits))
    if options.plot:
        if not by:
            raise OptionError("--plot: all runs have one setting; name an axis with --by")
        if options.band and options.band not in map(labels.shown, means[(*by, "runs")[1]]):
            raise OptionError(f"--band: no setting is called '{options.band}' in the second --by")
        plots.plot(means, by, options.of[-1], Path(options.plot), band=options.band)
    if options.curves:
        if "run" not in table:
            raise OptionError(f"--curves: {options.results} has no column 'run'")
        folders = [results.folder(Path(options.results), run) for run in table["run"]]
        points = curves(table.assign(run=folders), by)
        picture = Path(options.curves)
        rows = points.to_csv(index=False, float_format="%.4f")
        write_text(picture.with_suffix(".csv"), rows)
        plots.plot_curves(points, by, picture)


def read(options: ReportOptions) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the results, and the columns that make a setting.

    Columns that the command line names have its names.

    Raises:
        OptionError: there is no such column, or one --of does not hold numbers.
        UserError: the file cannot be read, or a seed repeats in a setting.
    """
    path = Path(options.results)
    table = results.numbers(results.read(path))
    if table.empty:
        raise UserError(f"{path}: has no rows")
    columns = _columns(table, options.by, "--by", path)
    values = _columns(table, options.of, "--of", path)
    for name in values:
        if name in columns:
            raise OptionError(f"--by: '{name}' is averaged, see --of; leave it out of one of them")
    words = [name.replace("-", "_") for name in (*options.by, *options.of)]
    names = dict(zip([*columns, *values], words))
    by, more = settings(table, columns or None, options_of(table))
    if more:
        say(f"note: differs within a setting and is added to --by: {', '.join(more)}")
    table = table.drop(columns=[n for n in names.values() if n not in names and n in table])
    table = without_seeds(table, [*by, *more]).rename(columns=names)
    return table, [names.get(name, name) for name in (*by, *more)]


def _columns(table: pd.DataFrame, names: Sequence[str], flag: str, path: Path) -> list[str]:
    """The columns that ``names`` of the option ``flag`` mean; those of --of hold numbers."""
    columns = []
    for name in names:
        column = results.column(table, name)
        if column is None:
            raise OptionError(f"{flag}: {path} has no column '{name}'")
        if flag == "--of" and not pd.api.types.is_numeric_dtype(table[column]):
            raise OptionError(f"--of: the column '{name}' of {path} does not hold numbers")
        if column in columns:
            raise OptionError(f"{flag}: '{name}' is named twice")
        columns.append(column)
    return columns


if __name__ == "__main__":
    run_script(main)
