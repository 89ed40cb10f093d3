"""The options of `startsparse.tabular`, and the folder of its results."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from filelock import Timeout

from startsparse import names, processes, ratios
from startsparse.commandline import plain_values, read_yaml, write_yaml
from startsparse.engine.compute import MODES
from startsparse.errors import OptionError, UserError
from startsparse.fields import PATH, Truth, called, choice, default_is, flag
from startsparse.locks import locked
from startsparse.models import INITS
from startsparse.numbers import Seed
from startsparse.optimizers import OPTIMIZERS
from startsparse.options import require_distinct, require_range
from startsparse.places import check_file
from startsparse.tabular import batched, tables
from startsparse.tabular.csv_file import quoted

FILES = ("results.csv", "table.md", "plot.png", "options.yaml")  # in --result-dir


@dataclasses.dataclass
class TabularOptions:
    """Networks on tables that start sparse and are pruned further."""

    tables: tuple[str, ...] = ("breast-cancer",)
    """breast-cancer, digits, ACSEmployment, ACSIncome, or the paths of .csv files (docs/data.md has
    their rules)"""
    data: Annotated[
        str, PATH, default_is("$STARTSPARSE_DATA, else data/ of the checkout, or here")
    ] = ""
    """Folder of the census files"""
    state: str = "AL"
    """State of the census, two letters"""
    year: int = 2018
    """Year of the census"""
    label: Annotated[str, default_is("none")] = ""
    """Column of the classes in a .csv file"""

    starts: tuple[float, ...] = (1.0, 0.5)
    """Densities of the random masks to start from; 1 is the dense start"""
    er_sparse_method: Annotated[str, choice(m for m in ratios.METHODS if m != "network")] = (
        "uniform"
    )
    """Layer-wise ratio of the random masks"""
    densities: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    """Densities to prune to by magnitude; those not below the start are left out"""
    reset: tuple[Truth, ...] = (False, True)
    """True: after each pruning, set all weights back to their initial values"""
    flow_preservation: tuple[Truth, ...] = (False,)
    """True: after each pruning, give an edge to every unit without an incoming or outgoing one"""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """Seeds; each has its own split, weights, masks and order of the data"""

    width: int = 256
    """Units of the hidden layers"""
    init: Annotated[str, choice(INITS)] = "kaiming_normal"
    """Initialisation of the weights"""
    optimizer: Annotated[str, choice(OPTIMIZERS)] = "adam"
    """Optimizer; it restarts at each density"""
    lr: float = 0.01
    """Learning rate"""
    weight_decay: float = 0.0
    """Weight decay"""
    batch_size: int = 64
    """Rows per step"""
    epochs: int = 10
    """Epochs at each density"""
    final_epochs: int = 20
    """Epochs at the last density"""
    loop: Annotated[str, choice(batched.LOOPS), called("form")] = "batched"
    """Train all networks at once, or one after the other: the same within rounding"""
    sparse_compute: Annotated[str, choice(MODES)] = "auto"
    """on: train one after the other, and compute and store only what is inside the masks; auto: do
    so at densities where a trial of a few steps is faster. The same within rounding"""
    device: str = "auto"
    """auto: a GPU if there is one, else the CPU; cpu, cuda, or cuda:1 for the second GPU. Processes
    of torchrun take one GPU each. The same within rounding"""
    result_dir: Annotated[str, PATH] = "runs/tabular"
    """Folder of results.csv, table.md, plot.png and options.yaml; results of other options in it
    are never overwritten"""

    def check(self) -> None:
        """Raise `OptionError`, which names the option, for values that make no sense."""
        names.check(self)
        if not self.result_dir:
            raise OptionError("--result-dir: name a folder")
        for name in ("tables", "starts", "densities", "reset", "flow_preservation", "seeds"):
            if not getattr(self, name):
                raise OptionError(f"--{name.replace('_', '-')}: needs at least one value")
            require_distinct(self, name)
        for name in ("starts", "densities"):
            require_range(self, name, low=0, high=1, open_low=True)
        require_range(self, "lr", low=0, open_low=True)
        require_range(self, "weight_decay", low=0)
        for name in ("epochs", "final_epochs"):
            require_range(self, name, low=1)
        require_range(self, "width", low=1, high=2**20)
        require_range(self, "batch_size", low=2)  # BatchNorm
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise OptionError(
                f"--device: {quoted(self.device)} is none of auto, cpu, cuda, and no GPU such as "
                "cuda:1"
            )
        self._check_tables()

    def _check_tables(self) -> None:
        for name in self.tables:
            if not (name in tables.TABLES or tables.is_file(name)):
                raise tables.no_table(name)
            if names.is_formula(name):
                raise OptionError(
                    f"--tables: spreadsheets would compute {quoted(name)}; write "
                    f"{quoted('./' + name)}"
                )
        files = [name for name in self.tables if tables.is_file(name)]
        if files and not self.label:
            raise OptionError(f"--label: name the column of {files[0]} that is to be learned")
        if self.label and not files:
            raise OptionError("--label: has no effect without a .csv file in --tables")
        if not set(self.tables) & set(tables.CENSUS):
            for option in ("state", "year"):
                if getattr(self, option) != getattr(TabularOptions, option):
                    wanted = " or ".join(tables.CENSUS)
                    raise OptionError(f"--{option}: has no effect without {wanted} in --tables")

    def torch_device(self) -> torch.device:
        """Where the networks of this process and their data are.

        Raises:
            UserError: a GPU that this machine does not have.
        """
        kind, _, index = self.device.partition(":")
        if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError(f"--device: there is no {self.device} here; take cpu")
        count = torch.cuda.device_count()
        number = int(index or processes.local_rank() % count)
        if number >= count:
            have = f"0 to {count - 1}"
            raise UserError(f"--device: there is no GPU {number} here; name one of {have}")
        return torch.device("cuda", number)

    def levels(self) -> list[float]:
        """Densities at which networks train, falling: none has more weights than it starts with."""
        levels = sorted({*self.starts, *self.densities}, reverse=True)
        return [level for level in levels if level <= max(self.starts)]


def result_options(options: TabularOptions) -> str:
    """The options that determine the result, as YAML."""
    return write_yaml(_that_count(options))


def _that_count(options: TabularOptions) -> TabularOptions:
    """The options; where the data lies and the results go is as by default."""
    return dataclasses.replace(options, data="", result_dir=TabularOptions.result_dir)


def check_folder(folder: Path, options: TabularOptions) -> None:
    """Raise `OptionError` if ``folder`` cannot be written, or has results of other options."""
    for name in FILES:
        check_file("--result-dir", folder / name)
    file, before = (folder / name for name in ("results.csv", "options.yaml"))
    if not file.exists():
        return
    if not before.exists():
        raise OptionError(f"--result-dir: {file} is of unknown origin; name another folder")
    try:
        theirs = plain_values(read_yaml(TabularOptions, before))
    except OptionError as error:
        raise OptionError(f"--result-dir: {error}; name another folder") from None
    for name, value in plain_values(_that_count(options)).items():
        if theirs[name] != value:
            raise OptionError(
                f"--result-dir: {file} is of a run with {flag(name)} {_shown(theirs[name])}, not "
                f"{_shown(value)}; name another folder"
            )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder of results, which is made, against other runs of the program.

    Raises:
        OptionError: another run writes into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / ".results.csv.lock", "write into one folder", 0):
            yield
    except Timeout:
        raise OptionError(
            f"--result-dir: another run writes into {folder}; wait for it, or name another folder"
        ) from None


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
