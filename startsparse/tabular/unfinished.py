"""What `startsparse.tabular` keeps after each density: a command that was stopped goes on from it.

A file in the folder of results holds the networks of a process on one table, and their rows. Its
name is a digest of all that decides on the results to the bit. So the networks of other options,
data, versions, devices or numbers of threads are never taken.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import startsparse
from startsparse import checkpoint, machine
from startsparse.atomic import remove_leftovers
from startsparse.console import log
from startsparse.errors import UserError, about
from startsparse.tabular.options import TabularOptions, result_options
from startsparse.tabular.tables import Table

_NAMES = ".unfinished-*.pt"


class Unfinished:
    """The file of some networks on a table."""

    def __init__(self, folder: Path, table: Table, options: TabularOptions, networks: Any) -> None:
        """``networks``: plain values that say which networks they are."""
        decides = [
            result_options(options),
            startsparse.__version__,
            machine.order_of_sums(),
            options.torch_device().type,
            networks,
        ]
        digest = hashlib.blake2b(json.dumps(decides).encode(), digest_size=16)
        for tensor in (table.features, table.labels):
            digest.update(tensor.numpy().tobytes())
        self.source = table.source
        self.path = folder / _NAMES.replace("*", digest.hexdigest())

    def load(self, models: Sequence[nn.Module]) -> tuple[int, list[dict]]:
        """Put ``models`` where they were; how many densities are done, and the rows of these."""
        if not self.path.exists():
            return 0, []
        try:
            state = checkpoint.load(self.path)
            checkpoint.load_model(nn.ModuleList(models), state, self.path)
        except UserError as error:
            log.warning("warning: %s; its networks start again", error)
            return 0, []
        log.info("%s: going on after density number %d", self.source, state["densities"])
        return state["densities"], state["rows"]

    def save(self, models: Sequence[nn.Module], densities: int, rows: list[dict]) -> None:
        """Keep ``models``, whole or not at all; results do not need it, so it may fail."""
        state = nn.ModuleList(models).state_dict()
        whole = {"model": dict(state), "densities": densities, "rows": rows}
        try:
            checkpoint.save_by_rank_0(self.path, whole)
        except OSError as error:
            log.warning("warning: %s; stopped now, these networks would start again", about(error))


def remove_all(folder: Path) -> None:
    """Remove the files of this command, and of others that were stopped in this folder.

    Only for who holds the folder against other runs.
    """
    for path in folder.glob(_NAMES):
        path.unlink(missing_ok=True)
    remove_leftovers(folder, _NAMES)
