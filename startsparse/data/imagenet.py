"""ImageNet from folders of JPEGs, decoded by worker processes while the device trains."""

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from startsparse import seeding, stopping
from startsparse.data import files
from startsparse.data.batches import normalised, parts, steps, whole_size
from startsparse.data.folder import visible, walk
from startsparse.errors import UserError

SIZE = 224
RESIZED = 256  # length of the shorter side, before the centre crop
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Sample = tuple[str, int]  # path and label


@dataclass
class _Reader(Dataset):
    """A dataset of whole batches: an index is an epoch and the rows of a batch in it.

    So its copies in the workers serve all epochs. It returns an error as a value, as an error that
    a worker raises arrives as many lines.
    """

    samples: list[Sample]
    transform: Any  # PIL image -> PIL image of 224 x 224
    seed: int

    def __getitem__(self, index: tuple[int, list[int]]) -> tuple[Tensor, Tensor] | UserError:
        epoch, rows = index
        pixels = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
        # torchvision draws from the global CPU generator, whose state is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            for position, row in enumerate(rows):
                seed = seeding.derive(self.seed, f"augment/{row}", epoch)
                torch.default_generator.manual_seed(seed)
                try:
                    image = files.open_image(self.samples[row][0])
                except UserError as error:
                    return error
                pixels[position] = np.asarray(self.transform(image))
        labels = torch.tensor([self.samples[row][1] for row in rows], dtype=torch.int64)
        return torch.from_numpy(pixels), labels


class FolderBatches:
    """One part of ImageNet with the interface of `Batches`, read from disk in every epoch.

    Order and augmentation depend on (seed, epoch, row) and not on the workers or their number.

    Args:
        samples: path and label of all images of a folder.
        rows: int64 [M], the indices of those that belong to this part.
        batch_size: images per batch; the last one of an epoch may be smaller (see `steps`).
        device: of the batches, which come from pinned memory if it is a GPU.
        seed: of the order and the augmentation.
        train: reshuffle in every epoch; otherwise plain order.
        augment: random resized crop, and with ``flip`` a mirrored half; otherwise the centre.
        workers: processes that decode; 0: none, this process does it.
    """

    def __init__(
        self,
        samples: list[Sample],
        rows: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        seed: int,
        train: bool,
        augment: bool,
        flip: bool,
        workers: int,
    ) -> None:
        self.samples = samples
        self.rows = rows
        self.examples = len(rows)
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.train = train
        self.workers = workers
        self.mean, self.std = MEAN, STD
        self.transform = _augmented(flip) if augment else _centred()
        self._mean = (torch.tensor(MEAN) * 255).repeat(SIZE).to(device)
        self._std = (torch.tensor(STD) * 255).repeat(SIZE).to(device)
        self._indices: list[tuple[int, list[int]]] = []  # of the present epoch

    @cached_property
    def _loader(self) -> DataLoader:
        """Its workers start with the first epoch and stay."""
        return DataLoader(
            _Reader(self.samples, self.transform, self.seed),
            sampler=self._indices,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=_ignore_interrupts,
            pin_memory=self.device.type == "cuda",
            # Unused, but without one the loader would draw from the global generator.
            generator=seeding.generator(self.seed, "workers"),
        )

    def __len__(self) -> int:
        """Steps of one epoch."""
        return steps(self.examples, self.batch_size, self.train)

    def size(self, step: int) -> int:
        """Images of the whole batch of a step, see `batches.whole_size`."""
        return whole_size(self.examples, self.batch_size, step)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step ``start`` on, as `Batches.epoch` yields them.

        Images of the steps before ``start`` are not read. One epoch at a time: the next one ends
        those before it. Raises `UserError` where an image cannot be decoded.
        """
        rows = self.rows
        if self.train:
            draws = seeding.generator(self.seed, "shuffle", epoch)
            rows = rows[torch.randperm(self.examples, generator=draws)]
        mine = parts(self.examples, self.batch_size, self.train, start)
        self._indices[:] = [(epoch, rows[part].tolist()) for part in mine]
        for batch in _whole(self._loader):
            if isinstance(batch, UserError):
                raise batch
            pixels, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield normalised(pixels.flatten(2), self._mean, self._std), labels


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and Slurm's warning those of a job; the run ends
    its workers after its checkpoint.
    """
    for signum in (signal.SIGINT, *stopping.WARNINGS):
        signal.signal(signum, signal.SIG_IGN)


def _whole(loader: DataLoader) -> Iterator:
    """The batches. Raises `UserError` where a worker is gone, as without memory for it."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "--workers: a process that reads images was killed, perhaps for lack of memory"
        ) from None


def _augmented(flip: bool) -> Any:
    from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

    return Compose([RandomResizedCrop(SIZE), *[RandomHorizontalFlip()] * flip])


def _centred() -> Any:
    from torchvision.transforms import CenterCrop, Compose, Resize

    return Compose([Resize(RESIZED), CenterCrop(SIZE)])


@dataclass
class Folders:
    """ImageNet on disk; the counterpart of `Arrays`. ``class_names`` are those of the folders."""

    train: list[Sample]
    test: list[Sample]
    classes: int
    class_names: tuple[str, ...]
    channels: int = 3
    size: int = SIZE
    held_out: tuple[str, ...] = ("valid",)
    content: str = ""

    @property
    def examples(self) -> int:
        """Number of training examples, before any are held out."""
        return len(self.train)

    def batches(
        self,
        rows: Mapping[str, Tensor],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int,
        augment: bool,
        flip: bool,
        padding: str,  # noqa: ARG002 -- its crops lie inside the image
        memory: float,  # noqa: ARG002 -- it is always read from the disk
    ) -> tuple[FolderBatches, FolderBatches, FolderBatches]:
        """Training, validation and test batches; ``rows`` of ``train``."""

        def part(samples: list[Sample], rows: Tensor, train: bool, augment: bool) -> FolderBatches:
            return FolderBatches(
                samples,
                rows,
                batch_size=batch_size,
                device=device,
                seed=seed,
                train=train,
                augment=augment,
                flip=flip,
                workers=workers,
            )

        return (
            part(self.train, rows["train"], True, augment),
            part(self.train, rows["valid"], False, False),
            part(self.test, torch.arange(len(self.test)), False, False),
        )


def load(root: Path, mirror: str = "") -> Folders:  # noqa: ARG001 -- it is never downloaded
    """The images of ``root/imagenet/train/<class>/`` and, as the test set, of ``.../val/<class>/``.

    Labels number the classes in alphabetical order. Raises `UserError` where a folder is missing,
    or a class has no image.
    """
    train, classes = _list(root / "imagenet" / "train")
    test, test_classes = _list(root / "imagenet" / "val")
    if test_classes != classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"{root / 'imagenet'}: train and val have different class folders: {odd[0]} is in one "
            "of them only"
        )
    return Folders(train, test, len(classes), tuple(classes))


def _list(folder: Path) -> tuple[list[Sample], list[str]]:
    """Path and label of the images, in the order of their classes and paths, and the classes.

    Hidden files and folders do not count, and other files are no images.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: missing: ImageNet is not downloaded; put the images there, one folder for "
            "each class, or use --set digits, which needs no file"
        )
    classes, samples = sorted(visible(folder, folders=True)), []
    if not classes:
        raise UserError(f"{folder}: has no folder of a class")
    for label, name in enumerate(classes):
        images = sorted(p for p in walk(folder, name) if p.lower().endswith(SUFFIXES))
        if not images:
            raise UserError(f"{folder / name}: has no image; images end in {' '.join(SUFFIXES)}")
        samples += [(str(folder / path), label) for path in images]
    return samples, classes
