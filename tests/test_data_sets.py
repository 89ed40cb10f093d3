"""Every loader on tiny files in the true format, and `load`: split, sizes, options."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    fails,
    gathered,
    loaded,
    write_cifar10,
    write_cifar100,
    write_imagenet,
    write_mnist,
    write_tiny_imagenet,
)

from startsparse.data import SETS, SHAPES, Shape, cifar, data_root
from startsparse.errors import OptionError, UserError

WRITE = {
    "mnist": write_mnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tiny-imagenet": write_tiny_imagenet,
}


# The loaders


@pytest.mark.parametrize("name", WRITE)
def test_pixels_and_labels_are_those_of_the_files(tmp_path, name):
    tiny = WRITE[name](tmp_path)
    arrays = tiny.loader(tmp_path, "")
    for (images, labels), (expected, targets) in (
        (arrays.train, tiny.train),
        (arrays.test, tiny.test),
    ):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        np.testing.assert_array_equal(images.numpy(), expected)
        assert labels.tolist() == targets


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size", "pad", "flip"),
    [
        ("mnist", 10, 1, 32, 2, False),
        ("cifar10", 10, 3, 32, 4, True),
        ("cifar100", 100, 3, 32, 4, True),
        ("tiny-imagenet", 3, 3, 64, 4, True),
    ],
)
def test_load(tmp_path, monkeypatch, name, classes, channels, size, pad, flip):
    tiny = WRITE[name](tmp_path)
    monkeypatch.setitem(SETS, name, tiny.loader)
    data = loaded(name, tmp_path, batch_size=5, valid_split=0.25)
    assert data.shape == Shape(classes, channels, size)
    if name != "tiny-imagenet":  # of which the small one has three classes
        assert data.shape == SHAPES[name]
    assert (data.train.pad, data.train.flip) == (pad, flip)
    examples = len(tiny.train[0])
    assert data.valid.examples == examples // 4
    assert data.train.examples == examples - examples // 4
    x, y = gathered(data.test)
    arrays = tiny.loader(tmp_path, "")
    expected = (tiny.test[0] / 255 - np.array(arrays.mean)) / np.array(arrays.std)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert y.tolist() == tiny.test[1]
    x, _ = gathered(data.train)
    assert x.shape[1:] == (channels, size, size)
    plain = loaded(name, tmp_path, batch_size=5, valid_split=0.25, augment=False)
    assert (plain.train.pad, plain.train.flip) == (0, False)
    for padding, corners in (("zeros", {0}), ("reflect", {1})):  # all pixels are 1: what is added?
        monkeypatch.setitem(SETS, name, lambda *_, **__: white(tiny.loader(tmp_path, "")))
        padded = loaded(name, tmp_path, batch_size=5, valid_split=0, padding=padding).train._images
        assert set(padded[:, 0, 0].flatten().tolist()) == corners


def white(arrays):
    arrays.train[0].fill_(1)
    return arrays


def test_digits_come_with_scikit_learn():
    from sklearn.datasets import load_digits

    data = loaded(valid_split=0)
    assert data.shape == SHAPES["digits"]
    assert (data.train.examples, data.test.examples) == (1437, 360)
    assert (data.train.pad, data.train.flip) == (4, False)
    arrays = SETS["digits"](Path("nowhere"), "")
    images = torch.cat([arrays.train[0], arrays.test[0]])
    assert images.shape == (1797, 32, 32, 3) and images.dtype == torch.uint8
    assert (images[..., 0] == images[..., 2]).all()
    assert images.max() == 255 and images.min() == 0
    # Back to 8 x 8: the four inner pixels of a block lie around its centre. As a multiset it is
    # the original set, with its labels.
    blocks = images[..., 0].view(1797, 8, 4, 8, 4)[:, :, 1:3, :, 1:3].float().mean((2, 4))
    labels = torch.cat([arrays.train[1], arrays.test[1]])
    original = load_digits()
    for row in range(0, 1797, 100):
        distance = (blocks - torch.from_numpy(original.images[row] * 255 / 16)).abs().mean((1, 2))
        assert distance.min() < 12
        assert labels[distance.argmin()] == original.target[row]


def test_the_test_part_of_digits_is_stratified_and_fixed():
    one, two = loaded(seed=0), loaded(seed=1)
    (x, y), (x1, y1) = gathered(one.test), gathered(two.test)
    assert torch.equal(x, x1) and torch.equal(y, y1)
    assert set(torch.bincount(y).tolist()) <= {35, 36, 37}


def test_normalised_digits_have_mean_0_and_deviation_1():
    x, _ = gathered(loaded(valid_split=0, augment=False).train)
    assert x.mean().abs() < 0.01
    assert (x.std() - 1).abs() < 0.01


def test_every_set_of_images_names_its_classes(tmp_path):
    cifar10, cifar100 = write_cifar10(tmp_path), write_cifar100(tmp_path)
    for tiny, own in ((cifar10, cifar.CIFAR10), (cifar100, cifar.CIFAR100)):
        meta = tmp_path / own.folder / own.meta.name
        count = len(own.class_names)
        assert tiny.loader(tmp_path).class_names == tuple(f"class {n}" for n in range(count))
        meta.unlink()
        assert tiny.loader(tmp_path).class_names == own.class_names
    assert cifar.CIFAR10.class_names[::9] == ("airplane", "truck")
    assert cifar.CIFAR100.class_names == tuple(str(number) for number in range(100))
    digits = tuple(str(number) for number in range(10))
    assert write_mnist(tmp_path).loader(tmp_path).class_names == digits
    assert SETS["digits"](tmp_path).class_names == digits
    wnids = ("n00000007", "n00000008", "n00000009")
    assert write_tiny_imagenet(tmp_path).loader(tmp_path).class_names == wnids
    write_imagenet(tmp_path)
    assert SETS["imagenet"](tmp_path).class_names == ("n00000000", "n00000001")


# The validation split


def split(monkeypatch, tmp_path, **options):
    """Rows of the training and the validation part of 100 examples whose label is their row."""
    tiny = write_cifar100(tmp_path, train=100)
    monkeypatch.setitem(SETS, "cifar100", tiny.loader)
    data = loaded("cifar100", tmp_path, batch_size=9, **options)
    return data, [gathered(part)[1].tolist() for part in (data.train, data.valid)]


def test_training_and_validation_are_disjoint_and_complete(monkeypatch, tmp_path):
    data, (train, valid) = split(monkeypatch, tmp_path, valid_split=0.2)
    assert (data.train.examples, data.valid.examples) == (80, 20)
    assert sorted(train + valid) == list(range(100))
    assert valid == sorted(valid) != list(range(20))
    for epoch in (1, 5):
        assert gathered(data.valid, epoch)[1].tolist() == valid
        assert sorted(gathered(data.train, epoch)[1].tolist()) == sorted(train)
        assert gathered(data.train, epoch)[1].tolist() != train
    # Held out, an image is neither cut nor mirrored.
    assert torch.equal(gathered(data.valid, 0)[0], gathered(data.valid, 1)[0])


def test_the_split_depends_on_the_seed_alone(monkeypatch, tmp_path):
    _, (_, valid) = split(monkeypatch, tmp_path, valid_split=0.2, seed=3)
    torch.manual_seed(99)
    _, (_, again) = split(monkeypatch, tmp_path, valid_split=0.2, seed=3, augment=False)
    _, (_, other) = split(monkeypatch, tmp_path, valid_split=0.2, seed=4)
    assert valid == again != other


def test_no_validation(monkeypatch, tmp_path):
    monkeypatch.setitem(SETS, "cifar100", write_cifar100(tmp_path, train=100).loader)
    data = loaded("cifar100", tmp_path, batch_size=50, valid_split=0)
    assert sorted(gathered(data.train)[1].tolist()) == list(range(100))
    assert (len(data.valid), data.valid.examples) == (0, 0)
    assert list(data.valid.epoch(0)) == []


# Options


@pytest.mark.parametrize("valid_split", [-0.1, 1, 1.5, float("nan")])
def test_a_valid_split_out_of_range(valid_split):
    message = fails(OptionError, name="cifar10", valid_split=valid_split)
    assert message.startswith("--valid-split: ") and str(valid_split) in message


@pytest.mark.parametrize("valid_split", [0.0001, 0.9999])
def test_a_valid_split_that_leaves_a_part_empty(valid_split):
    assert fails(UserError, valid_split=valid_split).startswith("--valid-split: ")


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_1(batch_size):
    assert fails(OptionError, batch_size=batch_size).startswith("--batch-size: ")


def test_a_batch_size_that_leaves_no_step(tmp_path, monkeypatch):
    tiny = write_cifar100(tmp_path, train=2)
    monkeypatch.setitem(SETS, "cifar100", tiny.loader)
    options = {"name": "cifar100", "root": tmp_path, "valid_split": 0.5}
    assert fails(UserError, batch_size=2, **options).startswith("--batch-size: 2 ")
    assert len(loaded(batch_size=1, **options).train) == 1
    assert len(loaded(batch_size=10_000).train) == 1  # larger than the set: one step


def test_an_unknown_padding():
    assert fails(OptionError, padding="edge") == "--padding: 'edge' is none of zeros, reflect"


def test_negative_workers():
    assert fails(OptionError, workers=-1).startswith("--workers: ")


def test_an_unknown_set():
    message = fails(OptionError, name="cifar")
    assert "'cifar'" in message
    assert all(name in message for name in SETS)


def test_the_sets_have_their_names():
    names = ["digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "folder", "imagenet"]
    names += ["karate", "cora", "citeseer", "pubmed", "modular-addition"]
    assert list(SETS) == list(SHAPES) == names


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STARTSPARSE_DATA", raising=False)
    assert data_root("") == Path(__file__).parents[1] / "data"
    monkeypatch.setenv("STARTSPARSE_DATA", "/some/where")
    assert data_root("") == Path("/some/where")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "else/where").mkdir(parents=True)
    assert data_root("else/where") == Path("else/where")
    assert data_root("~/else") == tmp_path / "else"
    with pytest.raises(OptionError, match="^--data: 'nowhere' is no folder"):
        data_root("nowhere")
