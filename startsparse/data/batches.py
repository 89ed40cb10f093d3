"""Batches on the training device: it holds the set as uint8, and augments whole batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from startsparse import processes, seeding

PADDINGS = ("zeros", "reflect")


def steps(examples: int, batch_size: int, train: bool) -> int:
    """Steps of one epoch; the last batch may be smaller.

    In training a last batch of one example is dropped: BatchNorm has no variance to divide by.
    """
    full, rest = divmod(examples, batch_size)
    return full + (rest > 1 if train else rest > 0)


def parts(examples: int, batch_size: int, train: bool, start: int = 0) -> Iterator[slice]:
    """This process's rows of each step of an epoch, from step ``start`` on.

    In training, the processes split each batch into parts of at least two rows, as BatchNorm needs
    them. If there are too few rows for all, some processes have none in that step. In evaluation
    the processes take turns with whole batches.
    """
    rank, count = processes.rank(), processes.world_size()
    for step in range(start, steps(examples, batch_size, train)):
        first, last = step * batch_size, min((step + 1) * batch_size, examples)
        if train:
            working = max(1, min(count, (last - first) // 2))
            bounds = (min(bound, working) for bound in (rank, rank + 1))
            yield slice(*(first + bound * (last - first) // working for bound in bounds))
        elif step % count == rank:
            yield slice(first, last)


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixels - mean) / std as float32 [B, C, H, W] in channels_last memory format.

    Args:
        pixels: uint8 [B, H, W * C].
        mean, std: float32 [W * C] in units of 0..255; whole rows run faster than C numbers.
    """
    images = pixels.to(torch.float32).sub_(mean).div_(std)
    batch, height, row = pixels.shape
    return images.view(batch, height, height, row // height).permute(0, 3, 1, 2)


class Batches:
    """One part of a set, resident on the device; `epoch` yields its normalised batches.

    Args:
        images: uint8 [N, H, W, C] with H = W, on any device.
        labels: int64 [N].
        mean, std: per channel, in units of 0..1.
        batch_size: images per batch; the last one of an epoch may be smaller (see `steps`).
        device: holds the set and the batches.
        seed: the order and the augmentation of an epoch depend on it, on the epoch and on nothing
            else. None: plain order, no augmentation.
        pad: pixels added on each side of an image, below H; a crop of H x W has a random position.
        padding: one of `PADDINGS`. zeros: those pixels are black; reflect: they mirror the image at
            its outermost pixels, which are not repeated.
        flip: mirror an image left to right with probability 1/2.
        rows: int64 [M], the examples of ``images`` that belong to this part; None: all of them.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        pad: int = 0,
        padding: str = "zeros",
        flip: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        if rows is None:
            rows = torch.arange(len(images))
        if seed is None:
            pad, flip = 0, False
        _, size, _, channels = images.shape
        self.examples = len(rows)
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.pad = pad
        self.flip = flip
        self.mean, self.std = tuple(mean), tuple(std)
        self.labels = labels[rows].to(device)
        padded = torch.zeros(
            (len(rows), size + 2 * pad, size + 2 * pad, channels), dtype=torch.uint8, device=device
        )
        inner = padded[:, pad : pad + size, pad : pad + size]
        # In pieces: one copy of the chosen rows would be as large as the set.
        for target, chosen in zip(inner.split(4096), rows.split(4096), strict=True):
            target.copy_(images[chosen])
        if padding == "reflect" and pad:
            _reflect(padded, pad)
        self._images = padded
        # A line of any crop is W * C bytes that begin at some pixel. This view has all of them.
        pixels = padded.numel() // channels
        self._lines = padded.as_strided((max(0, pixels - size + 1), size * channels), (channels, 1))
        self._offsets = torch.arange(size, device=device) * (size + 2 * pad)
        # The columns of a line from left to right [0] and with its pixels from right to left [1].
        columns = torch.arange(size * channels).view(size, channels)
        self._columns = torch.stack([columns.flatten(), columns.flip(0).flatten()]).to(device)
        self._mean = (torch.tensor(mean) * 255).repeat(size).to(device)
        self._std = (torch.tensor(std) * 255).repeat(size).to(device)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return steps(self.examples, self.batch_size, train=self.seed is not None)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step ``start`` on; a step is the same for every ``start``.

        Yields float32 images [B, C, H, W] in channels_last memory format and int64 labels [B], on
        the device. All random numbers are drawn before the first step: no step waits for the CPU.
        """
        plan = None if self.seed is None else self._plan(self.seed, epoch)
        for part in parts(self.examples, self.batch_size, self.seed is not None, start):
            if plan is None:
                pixels, labels = self._images[part].flatten(2), self.labels[part]
            else:
                rows, corners, mirrored = plan[:, part]
                pixels, labels = self._cropped(corners, mirrored), self.labels[rows]
            yield normalised(pixels, self._mean, self._std), labels

    def _plan(self, seed: int, epoch: int) -> Tensor:
        """int64 [3, N], in the order of the epoch: row, top left pixel of the crop, mirrored."""
        rows = torch.randperm(self.examples, generator=seeding.generator(seed, "shuffle", epoch))
        draws = seeding.generator(seed, "augment", epoch)
        dy, dx = torch.randint(2 * self.pad + 1, (2, self.examples), generator=draws)
        mirrored = torch.randint(2, (self.examples,), generator=draws)
        _, height, width, _ = self._images.shape
        corners = (rows * height + dy) * width + dx
        return torch.stack([rows, corners, mirrored]).to(self.device)

    def _cropped(self, corners: Tensor, mirrored: Tensor) -> Tensor:
        """The crops with these top left pixels: uint8 [B, H, W * C]."""
        lines = corners.unsqueeze(1) + self._offsets  # [B, H]
        pixels = self._lines.index_select(0, lines.flatten())
        pixels = pixels.view(-1, *lines.shape[1:], pixels.shape[1])
        if not self.flip:
            return pixels
        return pixels.gather(2, self._columns[mirrored].unsqueeze(1).expand_as(pixels))


def _reflect(padded: Tensor, pad: int) -> None:
    """Fill the outer ``pad`` pixels of [N, H, W, C] on every side, as numpy.pad's "reflect"."""
    for rows in (padded, padded.transpose(1, 2)):
        rows[:, :pad] = rows[:, pad + 1 : 2 * pad + 1].flip(1)
        rows[:, -pad:] = rows[:, -2 * pad - 1 : -pad - 1].flip(1)


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

    def normalisation(self, rows: Tensor) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std to normalise with, where these rows of ``train`` are trained on."""
        if self.moments is None:
            return self.mean, self.std
        pixels = len(rows) * self.size**2
        units = torch.tensor([[255], [255**2]], dtype=torch.float64)
        first, second = self.moments[rows].sum(0) / (pixels * units)
        std = (second - first**2).clamp(min=0).sqrt()
        return first.tolist(), torch.where(std > 0, std, 1).tolist()  # a channel may be constant

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
    ) -> tuple[Batches, Batches, Batches]:
        """Training, validation and test batches; ``rows`` of ``train``, and of what it holds."""
        mean, std = self.normalisation(rows["train"])
        part = partial(Batches, mean=mean, std=std, batch_size=batch_size, device=device)
        crops = {"pad": self.pad, "padding": padding, "flip": self.flip and flip} if augment else {}
        return (
            part(*self.train, seed=seed, rows=rows["train"], **crops),
            part(*(self.valid or self.train), rows=rows.get("valid")),
            part(*(self.test or self.train), rows=rows.get("test")),
        )
