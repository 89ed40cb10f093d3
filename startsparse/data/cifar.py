"""CIFAR-10 and CIFAR-100 from their python pickles."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from startsparse.data import files, pickles
from startsparse.data.arrays import Arrays
from startsparse.data.files import File
from startsparse.errors import UserError

BYTES = 3 * 32 * 32  # of an image


@dataclass(frozen=True)
class Spec:
    """Folder, URL, files and sizes of a set.

    Attributes:
        meta: the file with the names of the classes, which may be missing.
        train_images, test_images: in each file.
        key, names_key: of the labels in a pickle, and of the names in that of ``meta``.
        class_names: where ``meta`` is missing.
    """

    folder: str
    url: str
    archive: File
    train: tuple[File, ...]
    test: tuple[File, ...]
    meta: File
    train_images: int
    test_images: int
    key: str
    names_key: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = Spec(
    folder="cifar-10-batches-py",
    url="https://www.cs.toronto.edu/~kriz",
    archive=File("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    train=(
        File("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        File("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        File("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        File("data_batch_4", "634d18415352ddfa80567beed471001a"),
        File("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=(File("test_batch", "40351d587109b95175f43aff81a1287e"),),
    meta=File("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    train_images=10_000,
    test_images=10_000,
    key="labels",
    names_key="label_names",
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = Spec(
    folder="cifar-100-python",
    url="https://www.cs.toronto.edu/~kriz",
    archive=File("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    train=(File("train", "16019d7e3df5f24257cddd939b257f8d"),),
    test=(File("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
    meta=File("meta", "7973b15100ade9c7d40fb424638fde48"),
    train_images=50_000,
    test_images=10_000,
    key="fine_labels",
    names_key="fine_label_names",
    class_names=tuple(map(str, range(100))),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def load(spec: Spec, root: Path, mirror: str = "", *, checksum: bool = True) -> Arrays:
    """The set from ``root/spec.folder``.

    Missing files come from the archive in ``root``, and a missing archive from ``mirror`` or
    ``spec.url``. Without ``checksum``, files that are there may be re-encoded ones. Raises
    `UserError` where a file is missing, damaged, or not of the published sizes.
    """
    folder = root / spec.folder
    names = [f"{spec.folder}/{file.name}" for file in spec.train + spec.test]
    extra = [f"{spec.folder}/{spec.meta.name}"]
    images = spec.train_images * len(spec.train) + spec.test_images * len(spec.test)
    files.unpacked(
        root,
        names,
        spec.archive,
        spec.url,
        mirror,
        largest=4 * BYTES * images + (16 << 20),  # four times what the published one has
        checksum=checksum,
        extra=extra,
    )
    return Arrays(
        train=_read(folder, spec.train, spec.train_images, spec, checksum),
        test=_read(folder, spec.test, spec.test_images, spec, checksum),
        classes=len(spec.class_names),
        class_names=_class_names(folder / spec.meta.name, spec, checksum),
        mean=spec.mean,
        std=spec.std,
        pad=4,
        flip=True,
    )


def _read(
    folder: Path, batches: Sequence[File], images: int, spec: Spec, checksum: bool
) -> tuple[Tensor, Tensor]:
    pixels, labels = [], []
    for file in batches:
        path = folder / file.name
        content = _content(path, file.md5 * checksum)
        pixels.append(_checked(path, content, "data", np.uint8, (images, BYTES)))
        labels.append(_checked(path, content, spec.key, np.integer, (images,)))
        for odd in labels[-1][(labels[-1] < 0) | (labels[-1] >= len(spec.class_names))][:1]:
            raise _other(path, f"label {odd}, not 0 to {len(spec.class_names) - 1}")
    planes = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32)
    targets = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    return planes.permute(0, 2, 3, 1).contiguous(), targets


def _class_names(path: Path, spec: Spec, checksum: bool) -> tuple[str, ...]:
    if not path.exists():
        return spec.class_names
    names = _content(path, spec.meta.md5 * checksum).get(spec.names_key)
    names = [_text(name) for name in names] if isinstance(names, list) else []
    if len(names) != len(spec.class_names) or not all(isinstance(name, str) for name in names):
        raise _other(path, f"'{spec.names_key}' is no list of {len(spec.class_names)} names")
    return tuple(names)


def _content(path: Path, md5: str) -> dict[str, Any]:
    """The pickled dict; its keys may be bytes, as of a copy that was read and written as bytes."""
    data = files.read(path, md5)
    try:
        content = pickles.loads(data)
    except pickle.UnpicklingError as error:
        raise _other(path, f"no pickle of images ({error})") from error
    if not isinstance(content, dict):
        raise _other(path, f"a {type(content).__name__}, no dict")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _checked(
    path: Path, content: dict[str, Any], key: str, kind: Any, shape: tuple[int, ...]
) -> np.ndarray:
    """The array ``content[key]``, or list of integers, if it has this kind of numbers and shape."""
    if key not in content:
        raise _other(path, f"has no '{key}'")
    value = content[key]
    if isinstance(value, list) and all(isinstance(number, int) for number in value):
        value = np.array(value)
    if not isinstance(value, np.ndarray):
        found = f"a {type(value).__name__}"
    elif value.shape != shape or not np.issubdtype(value.dtype, kind):
        found = f"{value.dtype} {list(value.shape)}"
    else:
        return value
    raise _other(path, f"'{key}' is {found}, not {kind.__name__} {list(shape)}")


def _other(path: Path, found: str) -> UserError:
    return UserError(f"{path}: damaged or another file: {found}")
