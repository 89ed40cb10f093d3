"""Tiny ImageNet: 200 classes of 64 x 64 JPEGs, decoded once and cached in one file."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from startsparse.atomic import replacing
from startsparse.data import files
from startsparse.data.arrays import Arrays
from startsparse.data.files import File
from startsparse.errors import UserError, reason

SIZE = 64
FORMAT = 1  # of the cache; raise it when the content of the cache changes
Listing = list[tuple[Path, int]]  # images and their labels


@dataclass(frozen=True)
class Spec:
    """Folder, URL and size of a set."""

    folder: str
    url: str
    archive: File
    classes: int
    train_images: int
    test_images: int


TINY_IMAGENET = Spec(
    folder="tiny-imagenet-200",
    url="http://cs231n.stanford.edu",
    archive=File("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    classes=200,
    train_images=100_000,
    test_images=10_000,
)


def load(spec: Spec, root: Path, mirror: str = "", *, checksum: bool = True) -> Arrays:
    """The set from ``root/spec.folder``, or from the archive in ``root``, or fetched.

    The test set is the part named ``val``: the labels of the part named ``test`` were never
    published. Labels number the classes in alphabetical order. ``root/<folder>.npz`` caches the
    decoded pixels, until the name, size or time of an image changes. Without ``checksum`` an
    archive that is there may be a re-encoded one. Raises `UserError` where an image is missing or
    damaged.
    """
    unpacked = 3 * SIZE**2 * (spec.train_images + 2 * spec.test_images)
    files.unpacked(
        root,
        [spec.folder],
        spec.archive,
        spec.url,
        mirror,
        largest=unpacked + (64 << 20),  # no image takes more as a JPEG; and the lists
        checksum=checksum,
    )
    folder = root / spec.folder
    train, test, names = _list(folder, spec)
    cache = root / f"{spec.folder}.npz"
    fingerprint = _fingerprint(folder, train + test)
    pixels = _cached(cache, fingerprint)
    if pixels is None:
        pixels = _decode([path for path, _ in train + test], spec.folder)
        _store(cache, fingerprint, pixels)
    images = torch.from_numpy(pixels)
    labels = torch.tensor([label for _, label in train + test], dtype=torch.int64)
    return Arrays(
        train=(images[: len(train)], labels[: len(train)]),
        test=(images[len(train) :], labels[len(train) :]),
        classes=spec.classes,
        class_names=names,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        pad=4,
        flip=True,
    )


def _list(folder: Path, spec: Spec) -> tuple[Listing, Listing, tuple[str, ...]]:
    """The images of the training and the test set, in a fixed order; the names of the classes."""
    names = sorted(_lines(folder / "wnids.txt"))
    classes = {name: label for label, name in enumerate(names)}
    train = [
        (path, label)
        for name, label in classes.items()
        for path in sorted((folder / "train" / name / "images").glob("[!.]*.JPEG"))
    ]
    annotations = folder / "val" / "val_annotations.txt"
    present = set((folder / "val" / "images").glob("*.JPEG"))
    test = []
    for number, line in enumerate(_lines(annotations), start=1):
        image, name, *_ = [*line.split("\t"), ""]
        path = folder / "val" / "images" / image
        if name not in classes:
            raise UserError(f"{annotations}: line {number} names an unknown class: {name!r}")
        if path not in present:
            raise UserError(f"{annotations}: line {number} names a missing image: {path}")
        test.append((path, classes[name]))
    for what, found, expected in (
        ("classes", len(classes), spec.classes),
        ("training images", len(train), spec.train_images),
        ("val images", len(test), spec.test_images),
    ):
        if found != expected:
            raise UserError(
                f"{folder}: incomplete: expected {expected} {what}, found {found}; "
                "delete the folder and run again to fetch it"
            )
    return train, test, tuple(classes)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def _fingerprint(folder: Path, images: Listing) -> str:
    """Changes when an image is added, removed, renamed or written again."""
    digest = hashlib.md5(f"format {FORMAT}".encode())
    for path, _ in images:
        stat = path.stat()
        line = f"\n{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}"
        digest.update(line.encode())
    return digest.hexdigest()


def _cached(cache: Path, fingerprint: str) -> np.ndarray | None:
    """The pixels in the cache; None if it is missing, damaged, or of other images."""
    try:
        with np.load(cache, allow_pickle=False) as content:
            if str(content["fingerprint"]) == fingerprint:
                return content["pixels"]  # reading checks the CRC
    except Exception:  # a damaged file raises anything
        pass
    return None


def _store(cache: Path, fingerprint: str, pixels: np.ndarray) -> None:
    try:
        with replacing(cache) as part, part.open("wb") as file:
            np.savez(file, fingerprint=np.array(fingerprint), pixels=pixels)
    except OSError as error:  # a read-only folder only costs time
        tqdm.write(f"{cache}: not kept ({reason(error)})", file=sys.stderr)


def _decode(paths: list[Path], name: str) -> np.ndarray:
    """uint8 [N, 64, 64, 3]. Threads are enough: PIL decodes outside the interpreter lock."""
    pixels = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        images = pool.map(_pixels, paths)
        progress = tqdm(images, total=len(paths), desc=f"decoding {name}", disable=None)
        for row, image in enumerate(progress):
            pixels[row] = image
    return pixels


def _pixels(path: Path) -> np.ndarray:
    image = files.open_image(path)
    if image.size != (SIZE, SIZE):
        raise UserError(f"{path}: expected {SIZE} x {SIZE} pixels, found {image.size}")
    return np.asarray(image)
