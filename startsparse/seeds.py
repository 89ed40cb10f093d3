"""--seeds: one run for each seed, one after the other, and their mean and 95 % interval."""

import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from startsparse import finding, processes, report, results, runs, stopping
from startsparse.commandline import glance, named, own_names, parse
from startsparse.console import log
from startsparse.errors import Interrupted, OptionError, UserError, one_line, say
from startsparse.fields import shown
from startsparse.filled import filled
from startsparse.options import Options, require_distinct

S = TypeVar("S", bound=Options)  # of a script

_ADVICE = "the same command with --resume auto continues all seeds"


def run_each(
    kind: type[S], configs: Path, train: Callable[[S], None], argv: Sequence[str] | None = None
) -> int:
    """Do the run of the command line, or one for each of --seeds; the exit code.

    Each run has a folder of its own. A run of several that fails is said, and the others go on; a
    signal stops all.

    Args:
        kind, configs, argv: as of `commandline.parse`.
        train: does one run.

    Returns:
        1 if a run of several failed, else 0.

    Raises:
        UserError: the only run has failed, or no run can go on.
    """
    every = parse_each(kind, configs, list(sys.argv[1:] if argv is None else argv))
    if len(every) == 1:
        with own_names(kind):
            train(every[0])
        return 0
    failed = 0
    with stopping.advice(_ADVICE):
        for number, options in enumerate(every, 1):
            log.info("seed     %d, %d of %d", options.seed, number, len(every))
            try:
                with own_names(kind):
                    train(options)
            except Interrupted as stop:
                raise Interrupted(stop.exit_code - 128, f"{stop}; {_ADVICE}") from None
            except (OptionError, processes.LostError):
                raise
            except UserError as error:
                if processes.world_size() > 1:  # the other processes may not know of it
                    raise
                say(f"error: seed {options.seed}: {one_line(str(error))}")
                failed += 1
            _clear(options)
        if not every[0].evaluate:
            _show(every)
    return min(failed, 1)


def parse_each(kind: type[S], configs: Path, argv: list[str]) -> list[S]:
    """The options of each run that a command line asks for; all are checked before any begins.

    Raises:
        OptionError: with one line that names the option or the file.
    """
    alone = glance(kind, argv)
    if not alone.seeds:
        options = parse(kind, configs, argv)  # whose seeds may come from the YAML file
        return _each(kind, configs, argv, options.seeds) if options.seeds else [options]
    require_distinct(alone, "seeds")
    if "seed" in named(kind, argv):
        raise OptionError("--seed: has no effect with --seeds")
    if alone.resume not in ("", "auto"):
        raise OptionError("--resume: a run has one seed; with --seeds, name auto")
    return _each(kind, configs, argv, alone.seeds)


def _each(kind: type[S], configs: Path, argv: list[str], seeds: Sequence[int]) -> list[S]:
    return [
        parse(
            kind,
            configs,
            [*(filled(word, {"seed": seed}) for word in argv), "--seeds", "--seed", str(seed)],
        )
        for seed in seeds
    ]


def _clear(options: Options) -> None:
    """Give back what a run leaves in memory: a network, data, compiled code."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if options.compile:
        torch.compiler.reset()  # else the limit of recompilations counts over all runs


def _show(every: Sequence[Options]) -> None:
    """Print the table of the runs that are finished."""
    folders = [
        finding.find_run_by_rank_0(dataclasses.replace(options, resume="auto")) for options in every
    ]
    done = [folder for folder in folders if folder and runs.summary(folder)]
    if done and processes.rank() == 0:
        log.info("\n%s", table(runs.results_csv(every[0]), done, type(every[0])))


def table(path: Path, folders: Sequence[Path], kind: type[Options]) -> str:
    """Mean and 95 % interval over the seeds, as Markdown: a row for each setting of these runs.

    Args:
        path: results.csv.
        folders: the run folders, in the order of the rows.
        kind: of the script's options, whose names the columns get.

    Raises:
        UserError: the table cannot be read, or a seed repeats in a setting.
    """
    places = {results.identity(folder): place for place, folder in enumerate(folders)}
    rows = results.read_runs(path)
    order = [places.get(results.identity(results.folder(path, run))) for run in rows["run"]]
    rows = rows.assign(order=order).dropna(subset="order").sort_values("order")
    rows = results.numbers(rows.drop(columns="order"))
    by, _ = report.settings(rows, None, report.options_of(rows))
    of = ["density", "valid_accuracy", "test_accuracy"]
    means = report.summarise(report.without_seeds(rows, by), by, of)
    return report.markdown(means.rename(columns=shown(kind)), of)
