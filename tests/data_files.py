"""Tiny data sets in the real formats, with the specs that describe them.

    tiny = write_cifar10(tmp_path)
    monkeypatch.setitem(startsparse.data.SETS, "cifar10", tiny.loader)

Pixels are random but fixed; `Tiny` has them in the form that a loader should return.
"""

import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from startsparse.data import Loader, cifar, load, mnist, tiny_imagenet
from startsparse.data.files import File


@dataclass
class Tiny:
    """A tiny set: how to load it, and the expected result (images as N, H, W, C)."""

    spec: Any
    loader: Loader
    train: tuple[np.ndarray, list[int]]
    test: tuple[np.ndarray, list[int]]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def cycle(examples: int, classes: int) -> list[int]:
    """Labels 0, 1, 2, ..., over and over."""
    return [example % classes for example in range(examples)]


def put(path: Path, data: bytes) -> File:
    """Write a file; returns its name and MD5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return File(path.name, hashlib.md5(data).hexdigest())


# CIFAR


def python2_pickle(value: Any) -> bytes:
    """A protocol 2 pickle with the opcodes that Python 2 and the NumPy of 2009 wrote."""

    def dump(value: Any) -> bytes:
        match value:
            case dict():
                items = b"".join(dump(key) + dump(item) for key, item in value.items())
                return b"}(" + items + b"u"
            case list():
                return b"](" + b"".join(map(dump, value)) + b"e"
            case int():
                return b"J" + struct.pack("<i", value)
            case bytes():  # a str of Python 2
                return b"T" + struct.pack("<i", len(value)) + value
            case np.ndarray():
                shape = b"(" + b"".join(map(dump, value.shape)) + b"t"
                kind, order = value.dtype.str[1:].encode(), b"|<"[value.itemsize > 1 :][:1]
                dtype = b"cnumpy\ndtype\n(U\x02" + kind + b"K\x00K\x01tR(K\x03U\x01" + order
                dtype += b"NNN" + dump(-1) * 2 + b"K\x00tb"
                empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
                return empty + b"(K\x01" + shape + dtype + b"\x89" + dump(value.tobytes()) + b"tb"
        raise TypeError(type(value))

    return b"\x80\x02" + dump(value) + b"."


def planes(images: np.ndarray) -> np.ndarray:
    """[N, 32, 32, 3] as CIFAR stores it: [N, 3072], first all red, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def pack_tar(root: Path, folder: str, name: str) -> File:
    """Pack ``root/folder`` in the format in which CIFAR is published."""
    with tarfile.open(root / name, "w:gz") as archive:
        archive.add(root / folder, folder)
    return File(name, hashlib.md5((root / name).read_bytes()).hexdigest())


def _write_cifar(root: Path, spec: cifar.Spec, key: bytes, train: int, test: int) -> Tiny:
    train *= len(spec.train)
    images = pixels(train, 32, 32, 3), pixels(test, 32, 32, 3, seed=1)
    classes = len(spec.class_names)
    labels = cycle(train, classes), cycle(test, classes)
    written = {}
    for part, files in enumerate((spec.train, spec.test)):
        size = len(labels[part]) // len(files)
        for number, file in enumerate(files):
            rows = slice(number * size, (number + 1) * size)
            content = {
                b"batch_label": b"tiny",
                b"data": planes(images[part][rows]),
                key: labels[part][rows],
                b"filenames": [b"tiny_%d.png" % row for row in range(size)],
            }
            if key == b"fine_labels":
                content[b"coarse_labels"] = [99] * size  # a loader must not take these
            written[file.name] = put(root / spec.folder / file.name, python2_pickle(content))
    meta = {
        b"num_cases_per_batch": train // len(spec.train),
        spec.names_key.encode(): [b"class %d" % label for label in range(classes)],
        b"num_vis": 3072,
    }
    tiny = replace(
        spec,
        train=tuple(written[file.name] for file in spec.train),
        test=tuple(written[file.name] for file in spec.test),
        meta=put(root / spec.folder / spec.meta.name, python2_pickle(meta)),
        train_images=train // len(spec.train),
        test_images=test,
        archive=pack_tar(root, spec.folder, spec.archive.name),
        url="http://127.0.0.1:9",  # nothing listens there: a test never reaches the real server
    )
    loader = partial(cifar.load, tiny)
    return Tiny(tiny, loader, (images[0], labels[0]), (images[1], labels[1]))


def write_cifar10(root: Path, train: int = 8, test: int = 10) -> Tiny:
    """Five files of ``train`` images and one of ``test``, both as a folder and as an archive."""
    return _write_cifar(root, cifar.CIFAR10, b"labels", train, test)


def write_cifar100(root: Path, train: int = 40, test: int = 10) -> Tiny:
    return _write_cifar(root, cifar.CIFAR100, b"fine_labels", train, test)


# MNIST


def idx(values: np.ndarray) -> bytes:
    """The IDX format: 0, 0, type 8 (bytes), dimensions; big-endian sizes; data; gzipped."""
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.tobytes(), mtime=0)


def write_mnist(root: Path, train: int = 40, test: int = 10) -> Tiny:
    parts, files = [], []
    for part, size in enumerate((train, test)):
        images, labels = pixels(size, 28, 28, seed=part), cycle(size, 10)
        names = [file.name for file in (mnist.MNIST.train, mnist.MNIST.test)[part]]
        folder = root / mnist.MNIST.folder
        files.append(
            (
                put(folder / names[0], idx(images)),
                put(folder / names[1], idx(np.array(labels, np.uint8))),
            )
        )
        parts.append((np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels))
    spec = replace(
        mnist.MNIST,
        train=files[0],
        test=files[1],
        train_images=train,
        test_images=test,
        url="http://127.0.0.1:9",
    )
    return Tiny(spec, partial(mnist.load, spec), *parts)


# Folders of JPEGs


def jpeg(image: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A JPEG file, grey if ``image`` is [H, W], and the RGB pixels that it decodes to."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue(), np.asarray(Image.open(file).convert("RGB"))


def write_tiny_imagenet(root: Path, classes: int = 3, train: int = 4, test: int = 6) -> Tiny:
    """``train`` images per class and ``test`` in total, the first of each grey; and the archive."""
    spec = tiny_imagenet.TINY_IMAGENET
    folder = root / spec.folder
    names = [f"n{9 - label:08d}" for label in range(classes)]  # not in alphabetical order
    order = sorted(names)
    images, labels = [], []
    for name in order:
        for number in range(train):
            image = pixels(64, 64, 3, seed=len(images))
            data, decoded = jpeg(image[..., 0] if number == 0 else image)
            put(folder / "train" / name / "images" / f"{name}_{number}.JPEG", data)
            images.append(decoded)
            labels.append(order.index(name))
        boxes = "".join(f"{name}_{number}.JPEG\t0\t0\t63\t63\n" for number in range(train))
        put(folder / "train" / name / f"{name}_boxes.txt", boxes.encode())
    test_images, test_labels, lines = [], cycle(test, classes), []
    for number, label in enumerate(test_labels):
        image = pixels(64, 64, 3, seed=1000 + number)
        data, decoded = jpeg(image[..., 0] if number == 0 else image)
        put(folder / "val" / "images" / f"val_{number}.JPEG", data)
        lines.append(f"val_{number}.JPEG\t{order[label]}\t0\t0\t63\t63\n")
        test_images.append(decoded)
    put(folder / "val" / "val_annotations.txt", "".join(lines).encode())
    put(folder / "test" / "images" / "test_0.JPEG", data)  # without a label: not used
    put(folder / "wnids.txt", "".join(f"{name}\n" for name in names).encode())
    put(folder / "words.txt", b"n00000000\tentity\n")
    with zipfile.ZipFile(root / spec.archive.name, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(root))
    digest = hashlib.md5((root / spec.archive.name).read_bytes()).hexdigest()
    spec = replace(
        spec,
        archive=File(spec.archive.name, digest),
        classes=classes,
        train_images=classes * train,
        test_images=test,
        url="http://127.0.0.1:9",
    )
    return Tiny(
        spec,
        partial(tiny_imagenet.load, spec),
        (np.stack(images), labels),
        (np.stack(test_images), test_labels),
    )


def write_imagenet(root: Path, classes: int = 2, train: int = 5, test: int = 3) -> Path:
    """``train`` and ``test`` images per class, of several sizes, the first of each class grey."""
    for part, count in (("train", train), ("val", test)):
        for label in range(classes):
            for number in range(count):
                image = pixels(40 + 7 * number, 60 - 5 * number, 3, seed=100 * label + number)
                data, _ = jpeg(image[..., 0] if number == 0 else image)
                put(root / "imagenet" / part / f"n{label:08d}" / f"{number}.JPEG", data)
    return root / "imagenet"


# Loading


def loaded(name="digits", root=Path("nowhere"), **options):
    options = {"batch_size": 64, "valid_split": 0.1, "seed": 0, "workers": 0, **options}
    return load(name, root=root, device=torch.device("cpu"), **options)


def gathered(batches, epoch=0):
    """All images and labels of an epoch."""
    x, y = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(x), torch.cat(y)


def fails(kind, **options):
    with pytest.raises(kind) as error:
        loaded(**options)
    assert "\n" not in str(error.value)
    return str(error.value)
