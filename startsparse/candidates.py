"""The best epoch of a phase, and where the density drifts those that may take its place.

Soft thresholds make a network sparser while it trains, and a denser one is easily better. What is
tested should have the density that training ends with, which is known at its end only. So the
weights of those epochs are kept that would be the best for some final density that is likely yet.
"""

import itertools
import math
from pathlib import Path

from torch import nn

from startsparse import checkpoint
from startsparse.processes import by_rank_0

NEAR = 0.1  # a density is that of the end if it differs from it by at most this share of it
RETURN = 1.25  # the density is not expected to come back from farther away than by this factor

Row = dict[str, float]  # epoch, valid_accuracy, density


def best_of(rows: list[Row]) -> Row:
    """The most accurate; of equal ones the last epoch: what still gets sparser ends sparser."""
    return max(rows, key=lambda row: (row["valid_accuracy"], row["epoch"]), default={})


def near(rows: list[Row], density: float) -> list[Row]:
    """The epochs whose density is within `NEAR` of this one."""
    return [row for row in rows if abs(row["density"] - density) <= NEAR * density]


def hopeful(rows: list[Row]) -> list[Row]:
    """The epochs that are the best near some density that is not far from the last epoch's."""
    now = rows[-1]["density"]
    low, high = now / RETURN, now * RETURN
    # Which epochs are near changes at these densities only.
    ends = [row["density"] / (1 + end) for row in rows for end in (-NEAR, NEAR)]
    places = sorted({low, now, high, *(end for end in ends if low < end < high)})
    between = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    winners = [best_of(near(rows, density)) for density in (*places, *between)]
    return [row for row in rows if row in winners]


class Candidates:
    """The best epoch so far, and its rivals; their weights are in the run folder.

    best.pt holds those of the best; best-EPOCH.pt those of each rival, until the phase ends. `add`
    and `tidy` are collectives.

    Attributes:
        best: epoch, valid_accuracy and density of the best so far; {} if there is none.
        rivals: the same of `hopeful` epochs, the best among them; [] where no density drifts.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.best: Row = {}
        self.rivals: list[Row] = []

    def add(self, model: nn.Module, row: Row, *, drifts: bool) -> None:
        """Take an epoch, whose weights ``model`` has, into account.

        Files that are not needed any more stay until `tidy`: a run that is killed before its
        checkpoint is written needs them again.

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
            checkpoint.save_by_rank_0(
                self.folder / "best.pt", checkpoint.load(self._path(self.best))
            )

    @by_rank_0
    def tidy(self) -> None:
        """Remove the weights of epochs that are no rivals."""
        for path in self.folder.glob("best-*.pt"):
            if path not in map(self._path, self.rivals):
                path.unlink()

    def _path(self, row: Row) -> Path:
        return self.folder / f"best-{row['epoch']}.pt"
