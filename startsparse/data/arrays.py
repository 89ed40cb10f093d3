"""Sets of images as arrays, and where their batches come from."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from startsparse.data.batches import Batches, Streamed


def device_memory(device: torch.device) -> int:
    """Bytes of memory of the device, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


Part = tuple[Tensor, Tensor]  # uint8 images [N, H, W, C] with H = W, and their int64 labels [N]


@dataclass
class Arrays:
    """A set of images as arrays.

    Attributes:
        train, valid, test: images and labels; None: the part is held out of ``train``.
        classes: number of classes; labels run from 0 to classes - 1.
        class_names: their names, in the order of the labels.
        pad: padding of the random crop in training, in pixels.
        flip: whether training may mirror images.
        mean, std: per channel, in units of 0..1.
        moments: int64 [N, 2, C], sum and sum of squares of the pixels of each image in ``train``,
            where mean and std are those of the images trained on.
        content: a key of the images, where no published checksum is one.
    """

    train: Part
    test: Part | None
    classes: int
    class_names: tuple[str, ...]
    pad: int
    flip: bool
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    moments: Tensor | None = None
    valid: Part | None = None
    content: str = ""

    @property
    def examples(self) -> int:
        """Number of training examples, before any are held out."""
        return len(self.train[0])

    @property
    def held_out(self) -> tuple[str, ...]:
        """The parts that are held out of the training examples."""
        return tuple(name for name in ("valid", "test") if getattr(self, name) is None)

    @property
    def size(self) -> int:
        """Height and width of an image."""
        return self.train[0].shape[1]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train[0].shape[3]

    def key(self) -> str:
        """A key of images and labels, where no published checksum is one."""
        digest = hashlib.blake2b(digest_size=16)
        for images, labels in filter(None, (self.train, self.valid, self.test)):
            digest.update(images.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        return digest.hexdigest()

    def normalisation(self, rows: Tensor) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std to normalise with, where these rows of ``train`` are trained on."""
        if self.moments is None:
            return self.mean, self.std
        pixels = len(rows) * self.size**2
        first, second = self.moments[rows].sum(0).tolist()
        # In whole numbers: in float64 the difference of a constant channel is not always 0.
        variances = [pixels * b - a * a for a, b in zip(first, second)]
        unit = 255 * pixels
        return [a / unit for a in first], [math.sqrt(v) / unit if v else 1.0 for v in variances]

    def batches(
        self,
        rows: Mapping[str, Tensor],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int,  # noqa: ARG002 -- there is nothing for them to do
        augment: bool,
        flip: bool,
        padding: str,
        memory: float,
    ) -> tuple[Batches, Batches, Batches]:
        """Training, validation and test batches; ``rows`` of ``train``, and of what it holds.

        They stay where they are if they have more than ``memory`` bytes, padded; 0: half of the
        device's.
        """
        mean, std = self.normalisation(rows["train"])
        examples = sum(len(part[0]) for part in (self.train, self.valid, self.test) if part)
        needed = examples * (self.size + 2 * self.pad) ** 2 * self.channels
        kind = Streamed if needed > (memory or device_memory(device) / 2) else Batches
        part = partial(kind, mean=mean, std=std, batch_size=batch_size, device=device)
        return (
            part(
                *self.train,
                seed=seed,
                pad=self.pad if augment else 0,
                padding=padding,
                flip=augment and flip and self.flip,
                rows=rows["train"],
            ),
            part(*(self.valid or self.train), rows=rows.get("valid")),
            part(*(self.test or self.train), rows=rows.get("test")),
        )
