"""Images of one's own: a folder for each class, decoded once into one file of pixels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from startsparse.console import log
from startsparse.data import files
from startsparse.data.arrays import Arrays
from startsparse.data.decoded import Form, decoded
from startsparse.errors import OptionError, reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PARTS = ("train", "val", "test")
# names of parts elsewhere: refused, as a part that is ignored would be missed by nobody
_OTHER_NAMES = ("training", "valid", "validation", "dev", "testing")


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in the order of their paths.

    Attributes:
        root: the folder.
        classes: names of the folders in ``train``, in alphabetical order; labels number them.
        paths: part -> images, relative to the root; parts that are missing are not there.
        labels: part -> label of each.
        others: files that are no images, relative to the root.
    """

    root: Path
    classes: tuple[str, ...]
    paths: dict[str, list[str]]
    labels: dict[str, list[int]]
    others: list[str]

    @property
    def all(self) -> list[str]:
        """The images of all parts."""
        return [path for paths in self.paths.values() for path in paths]


def listing(root: Path) -> Listing:
    """The images of ``root/{train,val,test}/CLASS``, and of folders in these.

    Hidden files and folders do not count.

    Raises:
        OptionError: there is no ``train``, a class without an image, one that ``train`` lacks, or a
            folder that cannot be read, or that contains itself through a link.
    """
    if not (root / "train").is_dir():
        raise OptionError(f"--data: {root} has no folder train; --set folder reads train/CLASS/*")
    odd = [name for name in _OTHER_NAMES if (root / name).is_dir()]
    if odd:
        raise OptionError(f"--data: {root / odd[0]} is not read; parts are called train, val, test")
    classes = tuple(sorted(visible(root / "train", folders=True)))
    if len(classes) < 2:
        raise OptionError(
            f"--data: {root / 'train'} has {len(classes)} folder, not one for each of two classes "
            "or more"
        )
    found = Listing(root, classes, {}, {}, [])
    for part in PARTS:
        if (root / part).is_dir():
            _list(found, part)
    return found


def visible(folder: Path, folders: bool) -> list[str]:
    """The names of the folders, or of all else, in ``folder`` that are not hidden.

    Raises:
        OptionError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return [e.name for e in entries if e.name[0] != "." and e.is_dir() == folders]
    except OSError as error:
        raise OptionError(f"--data: {folder} cannot be read ({reason(error)})") from None


def _list(found: Listing, part: str) -> None:
    found.paths[part], found.labels[part] = [], []
    for name in sorted(visible(found.root / part, folders=True)):
        if name not in found.classes:
            raise OptionError(f"--data: {found.root / part / name} is a class that train lacks")
        paths = sorted(walk(found.root, f"{part}/{name}"))
        images = [path for path in paths if path.lower().endswith(SUFFIXES)]
        if not images:
            raise OptionError(
                f"--data: {found.root / part / name} has no image; images end in "
                + " ".join(SUFFIXES)
            )
        found.paths[part] += images
        found.labels[part] += [found.classes.index(name)] * len(images)
        found.others.extend(path for path in paths if not path.lower().endswith(SUFFIXES))
    if not found.paths[part]:
        raise OptionError(f"--data: {found.root / part} has no folder of a class")


def walk(root: Path, folder: str, around: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The visible files in ``root/folder`` and below, relative to the root.

    Args:
        around: device and number of the folders around it, which a link may lead back to.
    """
    stat = (root / folder).stat()
    here = stat.st_dev, stat.st_ino
    if here in around:
        raise OptionError(f"--data: {root / folder} is a link to a folder that contains it")
    for name in visible(root / folder, folders=False):
        yield f"{folder}/{name}"
    for name in visible(root / folder, folders=True):
        yield from walk(root, f"{folder}/{name}", (*around, here))


def load(root: Path, mirror: str = "", *, image_size: int = 0, channels: int = 3) -> Arrays:  # noqa: ARG001 -- never downloaded
    """The images of `listing`, which keeps `decoded` of them.

    Args:
        root: the folder.
        image_size: height and width to which images are brought; 0: all have the same already.
        channels: 3, or 1 for grey.

    Raises:
        OptionError: as `listing` and `check`.
        UserError: an image is damaged, or without an ``image_size`` of another size.
    """
    found = listing(root)
    if found.others:
        log.warning(
            "warning: %d files that are no images are left out, %r first",
            len(found.others),
            str(root / found.others[0]),
        )
    size = image_size or _own_size(found)
    pixels = decoded(root, found.all, Form(size, channels, resize=image_size > 0))
    images, moments = torch.from_numpy(pixels.images), torch.from_numpy(pixels.moments)
    labels = torch.tensor([label for part in found.labels.values() for label in part])
    counts = [len(paths) for paths in found.paths.values()]
    parts = dict(zip(found.paths, zip(images.split(counts), labels.split(counts))))
    return Arrays(
        train=parts["train"],
        valid=parts.get("val"),
        test=parts.get("test"),
        classes=len(found.classes),
        moments=moments[: counts[0]],
        class_names=found.classes,
        content=pixels.content,
        pad=size // 8,
        flip=True,
    )


def whole(root: Path) -> bool:
    """Whether all parts are there, so that none is held out of ``train``."""
    return all((root / part).is_dir() for part in PARTS)


def shape(root: Path, image_size: int, channels: int) -> tuple[int, int, int]:
    """Classes, channels, and height and width of the images; from names and one image.

    Raises:
        OptionError: as `listing`; the first image is not square, and no size was asked for.
    """
    found = listing(root)
    return len(found.classes), channels, image_size or _own_size(found)


def _own_size(found: Listing) -> int:
    first = found.root / found.all[0]
    width, height = files.image_size(first)
    if width != height:
        raise OptionError(f"--image-size: {first} has {width} x {height} pixels; name a size")
    return width
