"""The best epoch of a phase, and its rivals where the density drifts.

Soft thresholds make a network sparser while it trains, and a denser one is easily better. The
tested weights should have the final density, which is known only when training ends. So a run saves
the weights of every epoch that would be the best for some final density that is still likely.
"""

import itertools
import math
from pathlib import Path

from torch import Tensor, nn

from startsparse import checkpoint
from startsparse.processes import by_rank_0

NEAR = 0.1  # largest relative distance of a selected epoch's density from the final one
RETURN = 1.25  # the final density is expected within this factor of the last epoch's

Row = dict[str, float]  # epoch, valid_accuracy, density


def best_of(rows: list[Row]) -> Row:
    """The most accurate epoch; of a tie the last one, which is the sparsest if density falls."""
    return max(rows, key=lambda row: (row["valid_accuracy"], row["epoch"]), default={})


def near(rows: list[Row], density: float) -> list[Row]:
    """The epochs whose density is within `NEAR` of ``density``."""
    return [row for row in rows if abs(row["density"] - density) <= NEAR * density]


def hopeful(rows: list[Row]) -> list[Row]:
    """The epochs that are the best near some density within `RETURN` of the last epoch's."""
    now = rows[-1]["density"]
    low, high = now / RETURN, now * RETURN
    # The set of near epochs changes at these densities only.
    bounds = [row["density"] / (1 + side) for row in rows for side in (-NEAR, NEAR)]
    points = sorted({low, now, high, *(bound for bound in bounds if low < bound < high)})
    between = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    winners = [best_of(near(rows, density)) for density in (*points, *between)]
    return [row for row in rows if row in winners]


class Candidates:
    """The best epoch so far, and its rivals; the run folder holds their weights.

    best.pt holds the weights of the best epoch, best-EPOCH.pt those of each rival until the phase
    ends. They are written with the checkpoint, and until then kept in memory: a run that is killed
    between two checkpoints has the files of the first. `write` and `tidy` are collectives.

    Attributes:
        best: epoch, valid_accuracy and density of the best so far; {} if there is none.
        rivals: the same of the `hopeful` epochs, with the best; [] where the density is constant.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.best: Row = {}
        self.rivals: list[Row] = []
        self._written: Row = {}  # whose weights best.pt has
        self._held: dict[float, dict[str, Tensor]] = {}  # epoch -> weights that no file has

    def restore(self, best: Row, rivals: list[Row]) -> None:
        """Go on from those of a checkpoint."""
        self.best, self.rivals, self._written, self._held = best, rivals, best, {}

    def add(self, model: nn.Module, row: Row, *, drifts: bool) -> None:
        """Consider the epoch whose weights ``model`` has; keeps a copy of them if it is one.

        Args:
            row: epoch, valid_accuracy and density; an accuracy of NaN makes no candidate.
            drifts: whether the density may change from epoch to epoch.
        """
        if math.isnan(row["valid_accuracy"]):
            return
        if drifts:
            self.rivals = hopeful([*self.rivals, row])
            self.best = best_of(near(self.rivals, row["density"]))
        else:
            self.best = best_of([row, *[self.best] * bool(self.best)])
        epochs = {candidate["epoch"] for candidate in (self.best, *self.rivals)}
        self._held = {epoch: state for epoch, state in self._held.items() if epoch in epochs}
        if row["epoch"] in epochs:
            state = model.state_dict()  # with the formulas of layers in its metadata
            for name, tensor in state.items():
                state[name] = tensor.clone()
            self._held[row["epoch"]] = state

    @by_rank_0
    def write(self) -> None:
        """Write the weights that no file has yet; called just before the checkpoint is written.

        Files of former rivals stay until `tidy`: a run that is killed before it writes its
        checkpoint needs them again.
        """
        for row in self.rivals:
            if row["epoch"] in self._held:
                self._save(self._path(row), self._held[row["epoch"]])
        if self.best and self.best != self._written:
            state = self._held.get(self.best["epoch"])
            if state is None:
                state = checkpoint.load(self._path(self.best))["model"]
            self._save(self.folder / "best.pt", state)
        self._written, self._held = self.best, {}

    @by_rank_0
    def tidy(self) -> None:
        """Remove the weights of epochs that are no longer rivals."""
        for path in self.folder.glob("best-*.pt"):
            if path not in map(self._path, self.rivals):
                path.unlink()

    def _save(self, path: Path, state: dict[str, Tensor]) -> None:
        checkpoint.save_by_rank_0(path, {"model": state})

    def _path(self, row: Row) -> Path:
        return self.folder / f"best-{row['epoch']}.pt"
