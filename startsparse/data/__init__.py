"""Data sets by name: `load` gives training, validation and test batches on the device.

A new set is a loader and a line in `_SOURCES`.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import startsparse
from startsparse import processes, seeding
from startsparse.data import (
    cifar,
    digits,
    folder,
    graphs,
    imagenet,
    mnist,
    modular,
    planetoid,
    tiny_imagenet,
)
from startsparse.data.arrays import Arrays
from startsparse.data.batches import PADDINGS, Batches
from startsparse.data.graphs import Graph, GraphBatches
from startsparse.data.imagenet import FolderBatches, Folders
from startsparse.data.modular import Pairs
from startsparse.data.rows import Repeated, Rows
from startsparse.errors import OptionError, UserError
from startsparse.paths import expanded

__all__ = [
    "DIGITS",
    "NOT_FETCHED",
    "OWN_PARTS",
    "PADDINGS",
    "SETS",
    "SHAPES",
    "WITHOUT_FILES",
    "WITH_SUMS",
    "AnyBatches",
    "Arrays",
    "Batches",
    "Data",
    "FolderBatches",
    "Graph",
    "GraphBatches",
    "Images",
    "Loader",
    "Repeated",
    "Rows",
    "Shape",
    "data_root",
    "first_batch",
    "load",
]

AnyBatches = Batches | FolderBatches | GraphBatches | Rows | Repeated

Loader = Callable[..., Arrays | Folders | Graph | Pairs]
"""Reads a set from (the data root, the mirror to fetch from or ""); raises `UserError`."""


@dataclass(frozen=True)
class Shape:
    """What a network needs to know of a set.

    Attributes:
        classes: number of classes.
        channels: of an image, or features of whatever else an example is.
        size: height and width of an image, or 1.
        nodes: of the graph that is one input with all its examples; 0: examples are independent.
        adjacency: float32 sparse [nodes, nodes], see `Graph.adjacency`; None before it is read.
    """

    classes: int
    channels: int
    size: int
    nodes: int = 0
    adjacency: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def input(self) -> tuple[int, int, int, int]:
        """Shape of the smallest input that a network takes: one example, or the whole graph."""
        return (self.nodes or 1, self.channels, self.size, self.size)

    @property
    def kind(self) -> str:
        """What the examples are: "images", "rows" (of numbers) or "graph nodes"."""
        if self.nodes:
            return "graph nodes"
        return "images" if self.size > 1 else "rows"


class Source(NamedTuple):
    """A line of the table of sets.

    Attributes:
        load: reads it.
        shape: as published; `Data.shape` is that of the files.
        files: "published": fetched where they are missing; "own": the user's; "none": the set is
            computed, or comes with a package.
        sums: whether MD5 sums are published.
        own_parts: whether it has its own validation part, so that none is held out.
    """

    load: Loader
    shape: Shape
    files: Literal["published", "own", "none"] = "published"
    sums: bool = False
    own_parts: bool = False


_SOURCES = {
    "digits": Source(digits.load, Shape(10, 3, 32), "none"),
    "mnist": Source(partial(mnist.load, mnist.MNIST), Shape(10, 1, 32), sums=True),
    "cifar10": Source(partial(cifar.load, cifar.CIFAR10), Shape(10, 3, 32), sums=True),
    "cifar100": Source(partial(cifar.load, cifar.CIFAR100), Shape(100, 3, 32), sums=True),
    "tiny-imagenet": Source(
        partial(tiny_imagenet.load, tiny_imagenet.TINY_IMAGENET), Shape(200, 3, 64), sums=True
    ),
    "folder": Source(folder.load, Shape(10, 3, 32), "own"),  # its shape is that of the images
    "imagenet": Source(imagenet.load, Shape(1000, 3, 224), "own"),
    "karate": Source(graphs.karate, Shape(2, 34, 1, nodes=34), "none", own_parts=True),
    "cora": Source(
        partial(planetoid.load, planetoid.CORA), Shape(7, 1433, 1, nodes=2708), own_parts=True
    ),
    "citeseer": Source(
        partial(planetoid.load, planetoid.CITESEER), Shape(6, 3703, 1, nodes=3327), own_parts=True
    ),
    "pubmed": Source(
        partial(planetoid.load, planetoid.PUBMED), Shape(3, 500, 1, nodes=19717), own_parts=True
    ),
    "modular-addition": Source(  # the shape is that of the default --modulus
        modular.load, Shape(59, 59, 1), "none", own_parts=True
    ),
}

SETS: dict[str, Loader] = {name: source.load for name, source in _SOURCES.items()}

SHAPES: dict[str, Shape] = {name: source.shape for name, source in _SOURCES.items()}

DIGITS = ("digits", "mnist")
"""Sets of signs that are others when mirrored."""

OWN_PARTS = tuple(name for name, source in _SOURCES.items() if source.own_parts)
"""Sets that have their own validation part, so that none is held out."""

WITHOUT_FILES = tuple(name for name, source in _SOURCES.items() if source.files == "none")
"""Sets that are computed, or come with a package, so that no folder holds them."""

NOT_FETCHED = tuple(name for name, source in _SOURCES.items() if source.files != "published")
"""Sets that are never downloaded."""

WITH_SUMS = tuple(name for name, source in _SOURCES.items() if source.sums)
"""Sets with published MD5 sums; their loaders take ``checksum``."""


@dataclass(frozen=True)
class Images:
    """How the images of a set become the input of a network, and what its outputs mean.

    Attributes:
        class_names: in the order of the logits.
        mean, std: per channel, in units of 0..1; an input is (pixel / 255 - mean) / std.
        size: height and width.
        channels: 3, or 1 for grey.
        content: a key of the images, where no published checksum is one.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    channels: int
    content: str = ""

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Images":
        """What `to_json` wrote."""
        values = json.loads(text)
        lists = {name: tuple(values[name]) for name in ("class_names", "mean", "std")}
        return cls(**{**values, **lists})


@dataclass
class Data:
    """The three parts of a set, and its shape.

    Attributes:
        train: augmented, reshuffled in every epoch.
        valid: held out of the training set; plain order, no augmentation. May be empty.
        test: plain order, no augmentation.
        shape: what a network needs to know of the set.
        images: how they are prepared; None: the examples are no images.
    """

    train: AnyBatches
    valid: AnyBatches
    test: AnyBatches
    shape: Shape
    images: Images | None = None


def data_root(option: str) -> Path:
    """The folder of the sets: --data, or $STARTSPARSE_DATA, or the folder data/.

    The last is in the checkout, or without one in the working folder.

    Raises:
        OptionError: --data names no folder.
    """
    if option and not Path(option := expanded(option, "--data")).is_dir():
        raise OptionError(
            f"--data: '{option}' is no folder; name, or make, the one that holds the sets"
        )
    usual = (startsparse.checkout() or Path()) / "data"
    given = expanded(os.environ.get("STARTSPARSE_DATA", ""), "STARTSPARSE_DATA")
    return Path(option or given or usual)


def load(
    name: str,
    *,
    root: Path,
    mirror: str = "",
    checksum: bool = True,
    batch_size: int,
    valid_split: float,
    seed: int,
    device: torch.device,
    workers: int = 4,
    augment: bool = True,
    flip: bool = True,
    padding: str = "zeros",
    memory: float = 0,
    image_size: int = 0,
    channels: int = 3,
    passes: int = 1,
    modulus: int = 59,
    train_fraction: float = 0.7,
) -> Data:
    """Load the set ``name`` of `SETS`; fetch published files that are missing.

    Args:
        name: a key of `SETS`.
        root: folder of all sets (see `data_root`).
        mirror: URL of a folder with the set's archive or files; "": the published one.
        checksum: compare the files of `WITH_SUMS` with the published MD5 sums; those that are
            fetched always are.
        batch_size: examples per step; a graph is always one batch.
        valid_split: fraction of the training set to hold out for validation, in [0, 1), and as much
            for the test of a folder without one. Which examples are held out depends on ``seed``
            alone. Of no effect on `OWN_PARTS`.
        seed: of the run.
        device: the device of the batches.
        workers: processes that decode images; only ImageNet needs any.
        augment: crop training images at random.
        flip: with ``augment``, also mirror those that are not digits.
        padding: one of `PADDINGS`: what the crops show beyond the image; those of ImageNet lie
            inside it. Of no effect without ``augment``.
        passes: over the training set per epoch.
        memory: GiB of images to hold on the device; a larger set is read batch by batch. 0: half of
            the device's memory. Of no effect on imagenet, which is always read so.
        image_size, channels: of folder, see `folder.load`.
        modulus, train_fraction: of modular-addition, see `modular.load`.

    Raises:
        OptionError: an option is out of range; found before any file is read.
        UserError: a file is missing or damaged, or the options leave a part without an example.
    """
    _check(name, batch_size, valid_split, workers, passes, padding)
    own: dict[str, dict] = {
        "folder": {"image_size": image_size, "channels": channels},
        "modular-addition": {"modulus": modulus, "train_fraction": train_fraction},
        **{known: {"checksum": checksum} for known in WITH_SUMS},
    }
    source = SETS[name](root, mirror, **own.get(name, {}))
    rows = {}
    if isinstance(source, Arrays | Folders):
        rows = _split(source.examples, valid_split, seed, source.held_out)
    train, valid, test = source.batches(
        rows=rows,
        batch_size=batch_size,
        seed=seed,
        device=device,
        workers=workers,
        augment=augment,
        flip=flip,
        padding=padding,
        memory=memory * 2**30,
    )
    if len(train) == 0:
        raise UserError(
            f"--batch-size: {batch_size} leaves no training step: the training split has "
            f"{train.examples} example, and a batch of one is not used"
        )
    shape = Shape(source.classes, source.channels, source.size)
    if isinstance(source, Graph):
        shape = replace(shape, nodes=source.nodes, adjacency=source.adjacency)
    images = None
    if isinstance(source, Arrays | Folders) and isinstance(train, Batches | FolderBatches):
        content, names = source.content, source.class_names
        if isinstance(source, Arrays) and not (checksum or content):
            content = source.key()
        images = Images(names, train.mean, train.std, shape.size, shape.channels, content)
    return Data(Repeated(train, passes) if passes > 1 else train, valid, test, shape, images)


def _check(
    name: str, batch_size: int, valid_split: float, workers: int, passes: int, padding: str
) -> None:
    """Raise `OptionError` for an option out of range."""
    if name not in SETS:
        raise OptionError(f"--set: {name!r} is none of {', '.join(SETS)}")
    if batch_size < 1:
        raise OptionError(f"--batch-size: {batch_size} is not at least 1")
    if not 0 <= valid_split < 1:
        raise OptionError(f"--valid-split: {valid_split} is not in [0, 1)")
    if workers < 0:
        raise OptionError(f"--workers: {workers} is negative")
    if passes < 1:
        raise OptionError(f"--passes: {passes} is not at least 1")
    if padding not in PADDINGS:
        raise OptionError(f"--padding: {padding!r} is none of {', '.join(PADDINGS)}")


def first_batch(batches: AnyBatches, epoch: int) -> tuple[Tensor, Tensor]:
    """The first batch of an epoch, whole and the same in every process."""
    with processes.alone():
        return next(batches.epoch(epoch))


def _split(examples: int, share: float, seed: int, held_out: Sequence[str]) -> dict[str, Tensor]:
    """Rows to train on, and those of the parts held out, a ``share`` for each; all ascending."""
    count = round(examples * share)
    if count == 0 and held_out and (share > 0 or "test" in held_out):
        missing = "; the test part is missing and needs some" * ("test" in held_out)
        raise UserError(f"--valid-split: {share} of {examples} examples is not one{missing}")
    if len(held_out) * count >= examples:
        raise UserError(f"--valid-split: {share} leaves no training example of {examples}")
    order = torch.randperm(examples, generator=seeding.generator(seed, "valid-split"))
    *parts, rest = order.split([count] * len(held_out) + [examples - len(held_out) * count])
    return {name: part.sort().values for name, part in zip((*held_out, "train"), (*parts, rest))}
