"""The best epoch of a phase, and its rivals where the density drifts.

Soft thresholds make a network sparser while it trains, and a denser one is easily better. The
tested weights should have the final density, which is known only when training ends. So a run saves
the weights of every epoch that would be the best for some final density that is still likely.
"""

import itertools
import math
from pathlib import Path

from torch import nn

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
    ends. `add` and `tidy` are collectives.

    Attributes:
        best: epoch, valid_accuracy and density of the best so far; {} if there is none.
        rivals: the same of the `hopeful` epochs, with the best; [] where the density is constant.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.best: Row = {}
        self.rivals: list[Row] = []

    def add(self, model: nn.Module, row: Row, *, drifts: bool) -> None:
        """Consider the epoch whose weights ``model`` has.

        Files of former rivals stay until `tidy`: a run that is killed before it writes its
        checkpoint needs them again.

        Args:
            row: epoch, valid_accuracy and density; an accuracy of NaN makes no candidate.
            drifts: whether the density may change from epoch to epoch.
        """
        if math.isnan(row["valid_accuracy"]):
            return
        before = self.best
        if drifts:
            self.rivals = hopeful([*self.rivals, row])
            self.best = best_of(near(self.rivals, row["density"]))
        else:
            self.best = best_of([row, *[before] * bool(before)])
        if row in self.rivals:
            checkpoint.save_by_rank_0(self._path(row), {"model": model.state_dict()})
        if self.best == row:
            checkpoint.save_by_rank_0(self.folder / "best.pt", {"model": model.state_dict()})
        elif self.best != before:
            best = checkpoint.load_by_rank_0(self._path(self.best))
            checkpoint.save_by_rank_0(self.folder / "best.pt", best)

    @by_rank_0
    def tidy(self) -> None:
        """Remove the weights of epochs that are no longer rivals."""
        for path in self.folder.glob("best-*.pt"):
            if path not in map(self._path, self.rivals):
                path.unlink()

    def _path(self, row: Row) -> Path:
        return self.folder / f"best-{row['epoch']}.pt"
