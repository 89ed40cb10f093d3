"""Batches on the device against a slow reference that handles one image at a time."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_files import pixels

from startsparse import seeding
from startsparse.data import PADDINGS, Batches

MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)
CPU = torch.device("cpu")


def images(examples, size=32, channels=3):
    """Images that differ everywhere, and labels that are the row of the example."""
    data = torch.from_numpy(pixels(examples, size, size, channels))
    return data, torch.arange(examples)


def make(examples=50, batch_size=16, *, size=32, channels=3, **options):
    options = {"seed": 7, "pad": 4, "flip": True, "device": CPU, **options}
    data, labels = images(examples, size, channels)
    mean, std = MEAN[:channels], STD[:channels]
    return Batches(data, labels, mean=mean, std=std, batch_size=batch_size, **options)


def reference(image, dy, dx, mirrored, pad, mean=MEAN, std=STD, padding="constant"):
    """Pad, cut, mirror and normalise one uint8 image [H, W, C]: float64 [C, H, W]."""
    size = image.shape[0]
    image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=padding)
    image = image[dy : dy + size, dx : dx + size]
    if mirrored:
        image = image[:, ::-1]
    image = (image / 255 - np.array(mean[: image.shape[2]])) / np.array(std[: image.shape[2]])
    return image.transpose(2, 0, 1)


def how(image, pixels, pad, flip):
    """All (dy, dx, mirrored) for which the reference gives ``pixels``."""
    places = range(2 * pad + 1)
    return [
        (dy, dx, mirrored)
        for dy in places
        for dx in places
        for mirrored in ((False, True) if flip else (False,))
        if np.allclose(reference(image, dy, dx, mirrored, pad), pixels, atol=1e-5)
    ]


NUMPY_NAMES = {"zeros": "constant", "reflect": "reflect"}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("size", "channels", "pad", "flip"),
    [(32, 3, 4, True), (32, 3, 4, False), (10, 1, 2, True), (7, 3, 3, True), (8, 3, 0, False),
     (5, 3, 4, True)],
)  # fmt: skip
def test_training_batches_match_the_reference(size, channels, pad, flip, padding):
    examples, batch_size = 30, 8
    how_made = {"size": size, "channels": channels, "pad": pad, "flip": flip, "padding": padding}
    batches = make(examples, batch_size, **how_made)
    data, _ = images(examples, size, channels)
    crops = set()
    for epoch in range(3):
        # The numbers of the epoch, drawn again here: first all dy, then all dx, then all flips.
        order = torch.randperm(examples, generator=seeding.generator(7, "shuffle", epoch))
        draws = seeding.generator(7, "augment", epoch)
        dy, dx = torch.randint(2 * pad + 1, (2, examples), generator=draws).tolist()
        mirrored = torch.randint(2, (examples,), generator=draws).tolist()
        place = 0
        for x, y in batches.epoch(epoch):
            assert x.dtype == torch.float32 and y.dtype == torch.int64
            assert x.shape == (len(y), channels, size, size)
            assert x.is_contiguous(memory_format=torch.channels_last)
            for image, row in zip(x, y.tolist(), strict=True):
                assert row == order[place]
                draw = (dy[place], dx[place], bool(mirrored[place]) and flip)
                expected = reference(data[row].numpy(), *draw, pad, padding=NUMPY_NAMES[padding])
                np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
                crops.add(draw)
                place += 1
        assert place == examples
    if pad:
        # 90 draws: every value of dy, of dx and of mirrored comes up.
        assert {dy for dy, _, _ in crops} == set(range(2 * pad + 1))
        assert {dx for _, dx, _ in crops} == set(range(2 * pad + 1))
        assert {mirrored for _, _, mirrored in crops} == ({False, True} if flip else {False})


def test_the_crop_is_found_without_knowing_the_draws():
    """Every image is one crop of its own example, and the images of a batch differ in theirs."""
    batches = make(24, 24, size=9, pad=2)
    data, _ = images(24, 9)
    x, y = next(batches.epoch(0))
    found = [
        how(data[row].numpy(), image.numpy(), 2, True) for image, row in zip(x, y, strict=True)
    ]
    assert all(len(places) == 1 for places in found)
    assert len({places[0] for places in found}) > 12


def test_zeros_are_black():
    """The padding is the pixel 0, not the mean: normalised it is -mean / std."""
    white = torch.full((64, 8, 8, 3), 255, dtype=torch.uint8)
    batches = Batches(
        white, torch.zeros(64), mean=MEAN, std=STD, batch_size=64, device=CPU, seed=0, pad=4
    )
    x, _ = next(batches.epoch(0))
    for channel in range(3):
        values = x[:, channel].unique()
        black, bright = -MEAN[channel] / STD[channel], (1 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(values, torch.tensor([black, bright]))


@pytest.mark.parametrize("mirrored", [False, True])
def test_no_crop_takes_pixels_of_a_neighbour(mirrored):
    """Crops at the last corner end inside their own image, also for the last example."""
    data = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 4, 4, 3).contiguous()
    batches = Batches(
        data, torch.arange(5), mean=(0,) * 3, std=(1,) * 3, batch_size=5, device=CPU, seed=0, pad=1
    )
    corner = 2 * 6 + 2
    corners = torch.arange(5) * 36 + corner
    crops = batches._cropped(batches._lines, corners, torch.full((5,), int(mirrored)))
    for row, crop in enumerate(crops):
        assert set(crop.flatten().tolist()) == {0, row + 1}


def test_evaluation_is_in_plain_order_and_not_augmented():
    data, labels = images(21)
    rows = torch.tensor([20, 3, 4, 11, 0])
    for chosen in (None, rows):
        batches = Batches(data, labels, mean=MEAN, std=STD, batch_size=4, device=CPU, rows=chosen)
        order = list(range(21)) if chosen is None else rows.tolist()
        assert batches.examples == len(order)
        for epoch in range(2):
            x, y = (torch.cat(parts) for parts in zip(*batches.epoch(epoch), strict=True))
            assert y.tolist() == order
            for image, row in zip(x, order, strict=True):
                expected = reference(data[row].numpy(), 0, 0, False, 0)
                np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
        assert next(batches.epoch(0))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("seed", [7, None])
def test_start_gives_the_tail_to_the_bit(seed):
    batches = make(seed=seed)
    whole = list(batches.epoch(3))
    assert len(whole) == len(batches) == 4
    for start in range(len(whole) + 1):
        tail = list(make(seed=seed).epoch(3, start))
        assert len(tail) == len(whole) - start
        for (x, y), (expected, labels) in zip(tail, whole[start:], strict=True):
            assert torch.equal(x, expected) and torch.equal(y, labels)


def test_the_seed_and_the_epoch_decide_everything():
    def first(epoch=0, **options):
        torch.manual_seed(0)
        return next(make(**options).epoch(epoch))

    (x, y), again = first(), first()
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    for other in (first(seed=8), first(epoch=1)):
        assert not torch.equal(y, other[1])
    # The same example is cut differently in another epoch.
    both = set(y.tolist()) & set(first(epoch=1)[1].tolist())
    x1, y1 = first(epoch=1)
    assert any(not torch.equal(x[y == row], x1[y1 == row]) for row in both)


def test_the_global_generator_is_neither_used_nor_moved():
    batches = make()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [y for _, y in batches.epoch(0)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, batches.epoch(0), strict=True))


@pytest.mark.parametrize(
    ("examples", "batch_size", "train", "sizes"),
    [
        (32, 16, True, [16, 16]),
        (34, 16, True, [16, 16, 2]),
        (33, 16, True, [16, 16]),  # BatchNorm cannot train on one example
        (33, 16, False, [16, 16, 1]),
        (1, 16, False, [1]),
        (1, 16, True, []),
        (3, 1, True, [1, 1, 1]),  # asked for
        (0, 16, False, []),
    ],
)
def test_steps(examples, batch_size, train, sizes):
    batches = make(examples, batch_size, size=6, seed=7 if train else None, pad=0)
    assert [len(y) for _, y in batches.epoch(0)] == sizes
    assert len(batches) == len(sizes)
    assert batches.examples == examples


def test_every_example_comes_once_per_epoch():
    data, labels = images(50, 6)
    rows = torch.arange(1, 49, 2)
    batches = Batches(
        data, labels, mean=MEAN, std=STD, batch_size=7, device=CPU, seed=1, pad=1, rows=rows
    )
    for epoch in range(3):
        seen = Counter(row for _, y in batches.epoch(epoch) for row in y.tolist())
        assert seen == Counter(rows.tolist())


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_set_is_not_changed_by_its_batches(padding):
    data, _ = images(50)
    batches = make(padding=padding)
    for x, y in batches.epoch(0):
        x.zero_()
        y.zero_()
    assert torch.equal(batches._images[:, 4:-4, 4:-4], data)
    assert torch.equal(batches.labels, torch.arange(50))


@pytest.mark.parametrize("seed", [7, None])
def test_no_step_asks_the_device_for_a_value(seed):
    """On the meta device, which has no values, .item(), nonzero and boolean masks all fail."""
    batches = make(device=torch.device("meta"), seed=seed)
    for _, (x, y) in zip(range(3), batches.epoch(0), strict=False):
        assert x.shape == (16, 3, 32, 32) and y.shape == (16,)
        assert x.is_meta and y.is_meta
        assert x.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises((RuntimeError, NotImplementedError)):
        y[y > 3]
