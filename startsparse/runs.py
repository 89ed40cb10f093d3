"""Run folders: what was run, with what, and what came of it.

<log-dir>/<config>/<name>/seed-<seed>/
    options.yaml      every option; --config options.yaml repeats the run
    environment.json  versions, git state, machine, command line
    data.json         classes, mean, std and size of the images
    log.txt           the log
    checkpoint.pt     the state of the run; best.pt: weights of the best validation epoch;
                      best-EPOCH.pt: those of its rivals (`candidates`), until the phase ends
    epochs.csv        one row per epoch; tensorboard/ shows the same
    topology.csv      one row per change of the masks in dynamic sparse training
    levels.csv        one row per level of an iteratively pruned run; levels/: masks, weights
    ticket.safetensors: the strong lottery ticket; levels/: those of all levels
    random_mask.csv   the random mask that contains the tickets; shuffles.csv: shuffled tickets
    density.csv       one row per layer; layers.json: the same for --er-sparsity-file
    ratios.json       the layer-wise ratio that a pruner found in this run; search.json: its FLOPs
    curves.png        curves, and the density per layer
    profile.json      the trace of --profile, in Chrome's format
    dense_weights.pt  the weights of the ordinary network that computes the same, where layers
                      compute with another weight (`effective`)
    export/           what startsparse.export writes
    sources/          copies of files of other runs, by option
    summary.json      the result; a run that has it is finished

A run never makes its folder again: a folder that is gone was removed or renamed.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import Timeout

from startsparse import beginning, locks, processes, results, stopping
from startsparse.atomic import remove_leftovers, write_text
from startsparse.boards import Boards
from startsparse.commandline import read_values
from startsparse.console import log, number
from startsparse.data import Images
from startsparse.errors import DISK_FULL, UserError, about, reason
from startsparse.options import Options
from startsparse.processes import by_rank_0
from startsparse.reading import is_number, read_bytes

# Options that may change when a run resumes: they do not affect the result.
FREE = {
    *("config", "log_dir", "result_dir", "resume", "evaluate", "save_every", "save_seconds"),
    *("seeds", "data", "mirror", "workers", "data_memory", "multigpu", "compile"),
    *("sparse_compute", "profile"),
}

# What every summary.json holds.
MEASURED = (
    *("requested", "density", "weights", "kept", "epoch", "valid_accuracy", "test_accuracy"),
    *("inference_flops", "inference_flops_share", "training_flops", "training_flops_share"),
    "seconds",
)

PLAIN_WEIGHTS = "dense_weights.pt"
PICTURE = "curves.png"
IMAGES = "data.json"


class Run:
    """The folder of one run, locked by this process, or rank 0 of several, until it is closed.

    A context manager: the end of the ``with`` closes it. Its methods are collectives: all processes
    call them, and rank 0 does their work. With --evaluate it is only read, and needs no lock.
    """

    def __init__(self, folder: Path, options: Options):
        self.folder, self.options = folder, options
        self._boards: Boards | None = None
        self._open = ExitStack()
        self._read_only = bool(options.evaluate)
        if processes.rank() > 0 or self._read_only:
            return
        try:
            self._open.enter_context(locks.locked(folder / ".lock", "train the same run", 0))
        except Timeout:
            raise UserError(f"--resume: {folder} is in use by another process") from None
        for written in (folder, folder / "levels"):
            remove_leftovers(written)
        self._open.enter_context(_logging_to(folder / "log.txt"))
        self._open.enter_context(stopping.advice(f"--resume {folder} continues"))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._open.close()
        if isinstance(error, OSError) and not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: the run folder was removed or renamed while the run used it; "
                "the run has stopped"
            ) from None
        if isinstance(error, OSError) and error.errno in DISK_FULL and not self._read_only:
            raise UserError(f"{about(error)}, then --resume {self.folder} continues") from None

    def subfolder(self, name: str) -> Path:
        """A folder inside the run folder; makes it."""
        path = self.folder / name
        if not self._read_only:
            path.mkdir(exist_ok=True)
        return path

    @by_rank_0
    def record(self, row: dict, watched: dict[str, float]) -> None:
        """Log an epoch, and show it and ``watched`` in TensorBoard."""
        log.info(
            "epoch %3d  %s  loss %.4f  train %.2f %%  valid %.2f %%  density %s  %.0f s",
            row["epoch"],
            row["phase"],
            row["train_loss"],
            100 * row["train_accuracy"],
            100 * row["valid_accuracy"],
            number(row["density"]),
            row["seconds"],
        )
        self.show("", {**row, **watched}, row["epoch"])

    @by_rank_0
    def show(self, board: str, values: dict[str, Any], step: int) -> None:
        """Show the numbers among ``values`` in TensorBoard; each board counts steps of its own.

        After a resumption, what the run had shown from ``step`` on disappears.
        """
        if self._boards is None:
            self._boards = Boards(self.folder / "tensorboard")
            self._open.callback(self._boards.close)
        self._boards.show(board, values, step)

    @by_rank_0
    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run folder, or of one folder inside it; whole or not at all."""
        if self._read_only:
            return
        folder, _, file = name.rpartition("/")
        path = (self.subfolder(folder) if folder else self.folder) / file
        write_text(path, text, make_folder=False)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table of the run folder as CSV, whole or not at all."""
        self.write_text(name, table.to_csv(index=False))

    def write_json(self, name: str, content: dict) -> None:
        """Write JSON into the run folder, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    @by_rank_0
    def keep_images(self, images: Images) -> None:
        """Write data.json.

        Raises:
            UserError: the run began with other images.
        """
        before = _text(self.folder / IMAGES)
        if before is None:
            self.write_text(IMAGES, images.to_json())
        elif before != images.to_json():
            path = self.folder / IMAGES
            raise UserError(f"--data: {self.folder} was trained on other images, see {path}")

    def source(self, name: str) -> Path:
        """The path from which this run reads what option ``name`` points to."""
        return beginning.copy_or_original(self.folder, self.options, name)

    @by_rank_0
    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, and then add the run to <result-dir>/results.csv.

        Raises:
            UserError: the second failed; says how to make up for it.
        """
        self.write_json("summary.json", summary)
        try:
            _add_row(self.options, self.folder, summary)
        except UserError as error:
            raise UserError(
                f"{error}; the result is in {self.folder}/summary.json, and --resume "
                f"{self.folder} adds it to the table once that can be written"
            ) from None


def summary(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, else None.

    Raises:
        UserError: summary.json is damaged.
    """
    text = _text(path := folder / "summary.json")
    if text is None:
        return None
    try:
        result = json.loads(text)
        missing = [n for n in MEASURED if not is_number(result[n])]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        missing = [reason(error)]
    if missing:
        raise UserError(
            f"{path}: is damaged ({missing[0]}); remove it, and --resume {folder} writes it again"
        )
    return result


def computed(options: Options) -> dict[str, Any]:
    """The options that determine what a run computes, and its name."""
    fields = dataclasses.asdict(options)
    return {name: value for name, value in fields.items() if name not in FREE}


def images(folder: Path) -> Images | None:
    """How a run's images were prepared; None: it has none, or an older version wrote it.

    Raises:
        UserError: data.json is damaged.
    """
    text = _text(path := folder / IMAGES)
    try:
        return None if text is None else Images.from_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: is damaged ({reason(error)}); remove it, and --resume {folder} writes it "
            "again, if the run is not finished"
        ) from None


def _text(path: Path) -> str | None:
    """The text of a file; None: there is none. Raises `UserError` if it cannot be read."""
    try:
        return read_bytes(path).decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(about(error)) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is damaged: it is no text in UTF-8") from None


def selected_weights(folder: Path, select: str) -> Path:
    """The file of the weights that a run with this --select tests."""
    return folder / ("best.pt" if select == "best" else "checkpoint.pt")


def tested_weights(folder: Path) -> Path:
    """The file of the weights that the run tests, by its options.yaml."""
    select = read_values(folder / "options.yaml").get("select", "best")
    return selected_weights(folder, str(select))


def results_csv(options: Options) -> Path:
    """The table that gets a row when a run finishes."""
    return Path(options.result_dir) / "results.csv"


def _add_row(options: Options, folder: Path, summary: dict[str, Any]) -> None:
    results.add(results_csv(options), [{"run": folder, **summary, **computed(options)}])


@by_rank_0
def add_missing_row_by_rank_0(options: Options, folder: Path, summary: dict[str, Any]) -> bool:
    """Add a finished run to <result-dir>/results.csv, unless it is there; whether it was missing.

    Raises:
        UserError: the table cannot be read or written.
    """
    if results.has(results_csv(options), folder):
        return False
    _add_row(options, folder, summary)
    return True


class _LogFile(logging.FileHandler):
    """log.txt: where a line cannot be written, one line says so, and the run goes on."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        log.removeHandler(self)
        log.warning("warning: %s: the log ends here: %s", self.baseFilename, about(error))

    def close(self) -> None:
        with suppress(OSError):  # what is left of a line on a full disk
            super().close()


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    file = _LogFile(path)
    log.addHandler(file)
    try:
        yield
    finally:
        log.removeHandler(file)
        file.close()
