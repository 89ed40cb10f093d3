"""Batches on the training device: it holds the set as uint8, and augments whole batches."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

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


def whole_size(examples: int, batch_size: int, step: int) -> int:
    """Examples of the batch of a step of an epoch, of which this process may have a part."""
    return min(batch_size, examples - step * batch_size)


def parts(examples: int, batch_size: int, train: bool, start: int = 0) -> Iterator[slice]:
    """This process's rows of each step of an epoch, from step ``start`` on.

    In training, the processes split each batch into parts of at least two rows, as BatchNorm needs
    them. If there are too few rows for that, each process has the whole batch. In evaluation the
    processes take turns with whole batches.
    """
    rank, count = processes.rank(), processes.world_size()
    for step in range(start, steps(examples, batch_size, train)):
        first, size = step * batch_size, whole_size(examples, batch_size, step)
        if not train:
            if step % count == rank:
                yield slice(first, first + size)
        elif size < 2 * count:
            yield slice(first, first + size)
        else:
            yield slice(*(first + bound * size // count for bound in (rank, rank + 1)))


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
        self.pad, self.padding, self.flip = pad, padding, flip
        self.mean, self.std = tuple(mean), tuple(std)
        self.labels = labels[rows].to(device)
        self._offsets = torch.arange(size, device=device) * (size + 2 * pad)
        # The columns of a line from left to right [0] and with its pixels from right to left [1].
        columns = torch.arange(size * channels).view(size, channels)
        self._columns = torch.stack([columns.flatten(), columns.flip(0).flatten()]).to(device)
        self._mean = (torch.tensor(mean) * 255).repeat(size).to(device)
        self._std = (torch.tensor(std) * 255).repeat(size).to(device)
        self._hold(images, rows)

    def _hold(self, images: Tensor, rows: Tensor) -> None:
        self._images = self._padded(images, rows)
        self._lines = _lines(self._images, self.pad)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return steps(self.examples, self.batch_size, train=self.seed is not None)

    def size(self, step: int) -> int:
        """Examples of the whole batch of a step, see `whole_size`."""
        return whole_size(self.examples, self.batch_size, step)

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
                rows, shifts, mirrored = plan[:, part]
                corners = rows * self._images[0, ..., 0].numel() + shifts
                pixels, labels = self._cropped(self._lines, corners, mirrored), self.labels[rows]
            yield normalised(pixels, self._mean, self._std), labels

    def _plan(self, seed: int, epoch: int) -> Tensor:
        """int64 [3, N], in the order of the epoch: row, shift of the crop in pixels, mirrored."""
        rows = torch.randperm(self.examples, generator=seeding.generator(seed, "shuffle", epoch))
        draws = seeding.generator(seed, "augment", epoch)
        dy, dx = torch.randint(2 * self.pad + 1, (2, self.examples), generator=draws)
        mirrored = torch.randint(2, (self.examples,), generator=draws)
        shifts = dy * (len(self._offsets) + 2 * self.pad) + dx
        return torch.stack([rows, shifts, mirrored]).to(self.device)

    def _padded(self, images: Tensor, rows: Tensor) -> Tensor:
        """uint8 [M, H + 2 pad, W + 2 pad, C] on the device: the images of these rows."""
        pad, (_, size, _, channels) = self.pad, images.shape
        shape = (len(rows), size + 2 * pad, size + 2 * pad, channels)
        padded = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        inner = padded[:, pad : pad + size, pad : pad + size]
        # In pieces: one copy of the chosen rows would be as large as the set.
        for target, chosen in zip(inner.split(4096), rows.split(4096), strict=True):
            target.copy_(images[chosen])
        if self.padding == "reflect" and pad:
            _reflect(padded, pad)
        return padded

    def _cropped(self, lines: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
        """The crops with these top left pixels: uint8 [B, H, W * C]."""
        starts = corners.unsqueeze(1) + self._offsets  # [B, H]
        pixels = lines.index_select(0, starts.flatten())
        pixels = pixels.view(-1, *starts.shape[1:], pixels.shape[1])
        if not self.flip:
            return pixels
        return pixels.gather(2, self._columns[mirrored].unsqueeze(1).expand_as(pixels))


class Streamed(Batches):
    """The same batches of a set that stays where it is; a thread reads two batches ahead."""

    def _hold(self, images: Tensor, rows: Tensor) -> None:
        self._source, self._rows = images, rows

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`."""
        plan = None if self.seed is None else self._plan(self.seed, epoch)
        order = self._rows if plan is None else self._rows[plan[0].cpu()]
        chosen = list(parts(self.examples, self.batch_size, self.seed is not None, start))
        for part, images in zip(chosen, self._ahead([order[part] for part in chosen])):
            padded = self._padded(images, torch.arange(len(images)))
            if plan is None:
                pixels, labels = padded.flatten(2), self.labels[part]
            else:
                rows, shifts, mirrored = plan[:, part]
                first = torch.arange(len(rows), device=self.device) * padded[0, ..., 0].numel()
                lines = _lines(padded, self.pad)
                pixels, labels = self._cropped(lines, first + shifts, mirrored), self.labels[rows]
            yield normalised(pixels, self._mean, self._std), labels

    def _ahead(self, wanted: list[Tensor]) -> Iterator[Tensor]:
        """The images of each list of rows, read in another thread."""
        pinned = self.device.type == "cuda"

        def read(rows: Tensor) -> Tensor:
            images = self._source[rows]
            return images.pin_memory() if pinned else images

        with ThreadPoolExecutor(1) as pool:
            reading: deque[Future[Tensor]] = deque()
            try:
                for rows in wanted:
                    reading.append(pool.submit(read, rows))
                    if len(reading) > 2:
                        yield reading.popleft().result()
                while reading:
                    yield reading.popleft().result()
            finally:  # whoever takes only the first batches waits for no others
                for future in reading:
                    future.cancel()


def _lines(padded: Tensor, pad: int) -> Tensor:
    """Every line that a crop of [N, H + 2 pad, W + 2 pad, C] can have, a view: [pixels, W * C].

    A line of any crop is W * C bytes that begin at some pixel.
    """
    _, _, width, channels = padded.shape
    size, pixels = width - 2 * pad, padded.numel() // channels
    return padded.as_strided((max(0, pixels - size + 1), size * channels), (channels, 1))


def _reflect(padded: Tensor, pad: int) -> None:
    """Fill the outer ``pad`` pixels of [N, H, W, C] on every side, as numpy.pad's "reflect"."""
    for rows in (padded, padded.transpose(1, 2)):
        rows[:, :pad] = rows[:, pad + 1 : 2 * pad + 1].flip(1)
        rows[:, -pad:] = rows[:, -2 * pad - 1 : -pad - 1].flip(1)
