"""CIFAR-10 and CIFAR-100 from their python pickles."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from startsparse.data import files
from startsparse.data.arrays import Arrays
from startsparse.data.files import File


@dataclass(frozen=True)
class Spec:
    """Folder, URL and files of a set; ``key`` names the labels inside a pickle."""

    folder: str
    url: str
    archive: File
    train: tuple[File, ...]
    test: tuple[File, ...]
    key: str
    classes: int
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
    key="labels",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = Spec(
    folder="cifar-100-python",
    url="https://www.cs.toronto.edu/~kriz",
    archive=File("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    train=(File("train", "16019d7e3df5f24257cddd939b257f8d"),),
    test=(File("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
    key="fine_labels",
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def load(spec: Spec, root: Path, mirror: str = "") -> Arrays:
    """The set from ``root/spec.folder``.

    Missing files come from the archive in ``root``, and a missing archive from ``mirror`` or
    ``spec.url``. Raises `UserError` where a file is missing or damaged.
    """
    names = [f"{spec.folder}/{file.name}" for file in spec.train + spec.test]
    files.unpacked(root, names, spec.archive, spec.url, mirror)
    return Arrays(
        train=_read(root / spec.folder, spec.train, spec.key),
        test=_read(root / spec.folder, spec.test, spec.key),
        classes=spec.classes,
        mean=spec.mean,
        std=spec.std,
        pad=4,
        flip=True,
    )


def _read(folder: Path, batches: Sequence[File], key: str) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for file in batches:
        data = files.read(folder / file.name, file.md5)
        with files.old_dtypes():
            content = pickle.loads(data, encoding="latin1")  # safe: the MD5 is the published one
        images.append(content["data"])
        labels += content[key]
    planes = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
    return planes.permute(0, 2, 3, 1).contiguous(), torch.tensor(labels, dtype=torch.int64)
