"""MNIST from its four gzipped IDX files."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from startsparse.data import files
from startsparse.data.arrays import Arrays
from startsparse.data.files import File

SIZE = 32


@dataclass(frozen=True)
class Spec:
    """Folder, URL and files of a set; ``train`` and ``test`` are (images, labels)."""

    folder: str
    url: str
    train: tuple[File, File]
    test: tuple[File, File]


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
)


def load(spec: Spec, root: Path, mirror: str = "") -> Arrays:
    """One channel, padded with black from 28 x 28 to 32 x 32.

    Files are read from ``root/spec.folder``; missing ones are fetched from ``mirror`` or
    ``spec.url``. Raises `UserError` where one is missing or damaged.
    """
    folder = root / spec.folder

    def part(images: File, labels: File) -> tuple[Tensor, Tensor]:
        pixels, targets = (_read(folder, file, spec.url, mirror) for file in (images, labels))
        margin = (SIZE - pixels.shape[1]) // 2
        pixels = F.pad(pixels, (margin, margin, margin, margin))
        return pixels.unsqueeze(3), targets.to(torch.int64)

    return Arrays(
        train=part(*spec.train),
        test=part(*spec.test),
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        pad=2,  # with the margin of 2 a digit can move by 4 and loses nothing
        flip=False,  # a mirrored digit is another sign
    )


def _read(folder: Path, file: File, url: str, mirror: str) -> Tensor:
    """An IDX file of bytes: 0, 0, type 8, number of dimensions; big-endian uint32 sizes; data."""
    data = gzip.decompress(files.read(files.present(folder, file, url, mirror), file.md5))
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", count=dimensions, offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape.tolist()).copy())
