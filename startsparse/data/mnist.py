"""MNIST from its four gzipped IDX files."""

import gzip
import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from startsparse.data import files
from startsparse.data.arrays import Arrays
from startsparse.data.files import File
from startsparse.errors import UserError, reason

SIZE = 32
DIGIT = 28  # height and width in the files
BYTE = 8  # the type of a file's numbers
CLASSES = 10


@dataclass(frozen=True)
class Spec:
    """Folder, URL, files and sizes of a set; ``train`` and ``test`` are (images, labels)."""

    folder: str
    url: str
    train: tuple[File, File]
    test: tuple[File, File]
    train_images: int
    test_images: int


MNIST = Spec(
    folder="MNIST/raw",
    url="https://ossci-datasets.s3.amazonaws.com/mnist",
    train=(
        File("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        File("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    ),
    test=(
        File("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        File("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    train_images=60_000,
    test_images=10_000,
)


def load(spec: Spec, root: Path, mirror: str = "", *, checksum: bool = True) -> Arrays:
    """One channel, padded with black from 28 x 28 to 32 x 32.

    Files are read from ``root/spec.folder``; missing ones are fetched from ``mirror`` or
    ``spec.url``. Without ``checksum``, files that are there may be re-encoded ones. Raises
    `UserError` where one is missing, damaged, or not of the published sizes.
    """
    folder = root / spec.folder

    def part(images: File, labels: File, count: int) -> tuple[Tensor, Tensor]:
        paths = [files.present(folder, file, spec.url, mirror) for file in (images, labels)]
        pixels = _read(paths[0], images.md5 * checksum, (count, DIGIT, DIGIT))
        targets = _read(paths[1], labels.md5 * checksum, (count,))
        if targets.max() >= CLASSES:
            raise _other(paths[1], f"label {int(targets.max())}, not 0 to {CLASSES - 1}")
        margin = (SIZE - DIGIT) // 2
        pixels = F.pad(pixels, (margin, margin, margin, margin))
        return pixels.unsqueeze(3), targets.to(torch.int64)

    return Arrays(
        train=part(*spec.train, spec.train_images),
        test=part(*spec.test, spec.test_images),
        classes=CLASSES,
        class_names=tuple(map(str, range(CLASSES))),
        mean=(0.1307,),
        std=(0.3081,),
        pad=2,  # with the margin of 2 a digit can move by 4 and loses nothing
        flip=False,  # a mirrored digit is another sign
    )


def _read(path: Path, md5: str, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes: 0, 0, type 8, number of dimensions; big-endian uint32 sizes; data."""
    content, count = files.read(path, md5), math.prod(shape)
    try:
        with gzip.open(io.BytesIO(content)) as file:
            data = file.read(4 + 4 * len(shape) + count + 1)  # one more than there should be
        zero, kind, dimensions = struct.unpack_from(">HBB", data)
        sizes = struct.unpack_from(f">{dimensions}I", data, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise _other(path, f"no gzipped IDX file ({reason(error)})") from error
    if (zero, kind, sizes) != (0, BYTE, shape):
        raise _other(path, f"type {kind} {list(sizes)}, not {BYTE} (bytes) {list(shape)}")
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != count:
        found = "more numbers than" if len(values) > count else f"{len(values)} numbers, not"
        raise _other(path, f"{found} {count}")
    return torch.from_numpy(values.reshape(shape).copy())


def _other(path: Path, found: str) -> UserError:
    return UserError(f"{path}: damaged or another file: {found}")
