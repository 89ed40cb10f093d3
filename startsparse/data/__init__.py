"""Data sets by name: `load` gives training, validation and test batches on the device."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from startsparse import seeding
from startsparse.data import cifar, digits, imagenet, mnist, tiny_imagenet
from startsparse.data.batches import Arrays, Batches
from startsparse.data.imagenet import FolderBatches, Folders
from startsparse.errors import OptionError, UserError

__all__ = [
    "SETS",
    "SHAPES",
    "Arrays",
    "Batches",
    "Data",
    "FolderBatches",
    "Loader",
    "Shape",
    "data_root",
    "load",
]

Loader = Callable[[Path, str], Arrays | Folders]
"""Reads a set from (the data root, the mirror to fetch from or ""); raises `UserError`."""

SETS: dict[str, Loader] = {
    "digits": digits.load,
    "mnist": partial(mnist.load, mnist.MNIST),
    "cifar10": partial(cifar.load, cifar.CIFAR10),
    "cifar100": partial(cifar.load, cifar.CIFAR100),
    "tiny-imagenet": partial(tiny_imagenet.load, tiny_imagenet.TINY_IMAGENET),
    "imagenet": imagenet.load,
}


@dataclass(frozen=True)
class Shape:
    """What a network has to know of a set: classes, channels, and height = width of an image."""

    classes: int
    channels: int
    size: int


SHAPES = {
    "digits": Shape(10, 3, 32),
    "mnist": Shape(10, 1, 32),
    "cifar10": Shape(10, 3, 32),
    "cifar100": Shape(100, 3, 32),
    "tiny-imagenet": Shape(200, 3, 64),
    "imagenet": Shape(1000, 3, 224),
}
"""The published sets, known before they are read; `Data.shape` is what was found."""


@dataclass
class Data:
    """The three parts of a set, and what a model has to know of it.

    Attributes:
        train: augmented, reshuffled in every epoch.
        valid: held out of the training set; plain order, no augmentation. May be empty.
        test: plain order, no augmentation.
        shape: classes, channels, and height and width of what the model sees.
    """

    train: Batches | FolderBatches
    valid: Batches | FolderBatches
    test: Batches | FolderBatches
    shape: Shape


def data_root(option: str) -> Path:
    """Where the sets lie: the --data option if given, else $STARTSPARSE_DATA, else ./data."""
    return Path(option or os.environ.get("STARTSPARSE_DATA") or "data").expanduser()


def load(
    name: str,
    *,
    root: Path,
    mirror: str = "",
    batch_size: int,
    valid_split: float,
    seed: int,
    device: torch.device,
    workers: int = 4,
    augment: bool = True,
) -> Data:
    """Load the set ``name`` of `SETS`, fetching it where it is missing and published.

    Args:
        name: a key of `SETS`.
        root: folder of all sets (see `data_root`).
        mirror: URL of a folder that holds the set's archive or files; "": where it is published.
        batch_size: images per step.
        valid_split: fraction of the training set to hold out, in [0, 1). Which examples are held
            out depends on ``seed`` alone.
        seed: of the run.
        device: where the batches are made.
        workers: processes that decode images; only ImageNet needs any.
        augment: crop and flip training images at random.

    Raises:
        OptionError: an option is out of range; found before any file is read.
        UserError: a file is missing or damaged, or the options leave a part without an example.
    """
    if name not in SETS:
        raise OptionError(f"--set: {name!r} is none of {', '.join(SETS)}")
    if batch_size < 1:
        raise OptionError(f"--batch-size: {batch_size} is not at least 1")
    if not 0 <= valid_split < 1:
        raise OptionError(f"--valid-split: {valid_split} is not in [0, 1)")
    if workers < 0:
        raise OptionError(f"--workers: {workers} is negative")
    source = SETS[name](root, mirror)
    train_rows, valid_rows = _split(source.examples, valid_split, seed)
    train, valid, test = source.batches(
        train_rows,
        valid_rows,
        batch_size=batch_size,
        seed=seed,
        device=device,
        workers=workers,
        augment=augment,
    )
    if len(train) == 0:
        raise UserError(
            f"--batch-size: {batch_size} leaves no training step: the training split has "
            f"{train.examples} example, and a batch of one is not used"
        )
    return Data(train, valid, test, Shape(source.classes, source.channels, source.size))


def _split(examples: int, valid_split: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, both ascending."""
    held_out = round(examples * valid_split)
    if held_out == 0 and valid_split > 0:
        raise UserError(f"--valid-split: {valid_split} of {examples} examples is not one example")
    if held_out >= examples:
        raise UserError(f"--valid-split: {valid_split} leaves no training example of {examples}")
    order = torch.randperm(examples, generator=seeding.generator(seed, "valid-split"))
    return order[held_out:].sort().values, order[:held_out].sort().values
