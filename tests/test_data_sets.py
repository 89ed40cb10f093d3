"""Every loader on tiny files in the true format, and `load`: split, sizes, options."""

import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    jpeg,
    pixels,
    put,
    write_cifar10,
    write_cifar100,
    write_imagenet,
    write_mnist,
    write_tiny_imagenet,
)

from startsparse import seeding
from startsparse.data import SETS, data_root, load, tiny_imagenet
from startsparse.errors import OptionError, UserError

CPU = torch.device("cpu")
WRITE = {
    "mnist": write_mnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tiny-imagenet": write_tiny_imagenet,
}


def loaded(name="digits", root=Path("nowhere"), **options):
    options = {"batch_size": 64, "valid_split": 0.1, "seed": 0, "workers": 0, **options}
    return load(name, root=root, device=CPU, **options)


def gathered(batches, epoch=0):
    """All images and labels of an epoch."""
    x, y = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(x), torch.cat(y)


def fails(kind, **options):
    with pytest.raises(kind) as error:
        loaded(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert (data.classes, data.channels, data.size) == (classes, channels, size)
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


def test_digits_come_with_scikit_learn():
    from sklearn.datasets import load_digits

    data = loaded(valid_split=0)
    assert (data.classes, data.channels, data.size) == (10, 3, 32)
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


def test_what_numpy_says_of_old_pickles_is_not_shown(tmp_path, monkeypatch):
    """NumPy 2.4.0 to 2.4.4 warn; here pickle.loads does."""
    true = pickle.loads

    def loads(data, **options):
        warnings.warn("dtype(): align should be passed as Python or NumPy boolean", stacklevel=2)
        return true(data, **options)

    tiny = write_cifar10(tmp_path)
    monkeypatch.setattr(pickle, "loads", loads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.loader(tmp_path, "")


# Tiny ImageNet


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_imagenet(tmp_path)


def decoded(monkeypatch):
    """The paths that are decoded from now on."""
    paths, true = [], tiny_imagenet._pixels

    def record(path):
        paths.append(path)
        return true(path)

    monkeypatch.setattr(tiny_imagenet, "_pixels", record)
    return paths


def same(arrays, tiny):
    return (arrays.train[0].numpy() == tiny.train[0]).all() and (
        arrays.test[0].numpy() == tiny.test[0]
    ).all()


def test_the_cache_saves_decoding(tmp_path, tiny, monkeypatch):
    paths = decoded(monkeypatch)
    tiny.loader(tmp_path, "")
    assert len(paths) == len(tiny.train[0]) + len(tiny.test[0])
    paths.clear()
    assert same(tiny.loader(tmp_path, ""), tiny)
    assert paths == []
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("change", ["written again", "renamed"])
def test_the_cache_is_not_used_for_other_images(tmp_path, tiny, monkeypatch, change):
    tiny.loader(tmp_path, "")
    first = min((tmp_path / tiny.spec.folder / "train").glob("*/images/*.JPEG"))
    if change == "renamed":
        first.rename(first.with_name("zzz.JPEG"))
        tiny.train[0][:4] = tiny.train[0][[1, 2, 3, 0]]  # the first of its class is now the last
    else:
        data, image = jpeg(pixels(64, 64, 3, seed=77))
        first.write_bytes(data)
        tiny.train[0][0] = image
    paths = decoded(monkeypatch)
    assert same(tiny.loader(tmp_path, ""), tiny)
    assert paths
    paths.clear()
    assert same(tiny.loader(tmp_path, ""), tiny)  # kept anew
    assert paths == []


@pytest.mark.parametrize(
    "damage", ["truncated", "corrupted", "empty", "another file", "old format"]
)
def test_a_damaged_cache_is_made_again(tmp_path, tiny, monkeypatch, damage):
    tiny.loader(tmp_path, "")
    cache = tmp_path / "tiny-imagenet-200.npz"
    data = cache.read_bytes()
    place = len(data) - 5000  # among the pixels
    if damage == "another file":
        with cache.open("wb") as file:
            np.savez(file, other=np.zeros(3))
    elif damage == "old format":
        monkeypatch.setattr(tiny_imagenet, "FORMAT", 2)
    else:
        cache.write_bytes(
            {
                "truncated": data[:place],
                "corrupted": data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :],
                "empty": b"",
            }[damage]
        )
    paths = decoded(monkeypatch)
    assert same(tiny.loader(tmp_path, ""), tiny)
    assert paths


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, tiny, capsys):
    (tmp_path / "tiny-imagenet-200.npz").mkdir()  # stands in the way
    for _ in range(2):
        assert same(tiny.loader(tmp_path, ""), tiny)
    assert "not kept" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_no_error(tmp_path, tiny):
    tmp_path.chmod(0o555)
    try:
        assert same(tiny.loader(tmp_path, ""), tiny)
    finally:
        tmp_path.chmod(0o755)


def test_a_jpeg_that_cannot_be_decoded(tmp_path, tiny):
    path = max((tmp_path / tiny.spec.folder / "train").glob("*/images/*.JPEG"))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError) as error:
        tiny.loader(tmp_path, "")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "tiny-imagenet-200.npz").exists()


def test_an_image_of_another_size(tmp_path, tiny):
    path = max((tmp_path / tiny.spec.folder / "train").glob("*/images/*.JPEG"))
    path.write_bytes(jpeg(pixels(64, 60, 3))[0])
    with pytest.raises(UserError, match="60"):
        tiny.loader(tmp_path, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("val_99.JPEG\tn00000007\t0\t0\t63\t63", ["missing image", "val_99.JPEG", "line 7"]),
        ("val_0.JPEG\tn12345678\t0\t0\t63\t63", ["unknown class", "n12345678", "line 7"]),
        ("nonsense", ["unknown class", "line 7"]),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, tiny, line, words):
    path = tmp_path / tiny.spec.folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError) as error:
        tiny.loader(tmp_path, "")
    for word in (str(path), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["wnids.txt", "val/val_annotations.txt"])
def test_lists_that_are_missing(tmp_path, tiny, lost):
    (tmp_path / tiny.spec.folder / lost).unlink()
    with pytest.raises(UserError, match=lost):
        tiny.loader(tmp_path, "")


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_incomplete_folder(tmp_path, tiny, part):
    folder = tmp_path / tiny.spec.folder
    if part == "train":
        min((folder / "train").glob("*/images/*.JPEG")).unlink()
    else:
        path = folder / "val" / "val_annotations.txt"
        path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(UserError, match=f"incomplete.*{part}.*delete the folder"):
        tiny.loader(tmp_path, "")


def test_classes_are_counted(tmp_path, tiny):
    spec = replace(tiny.spec, classes=200)
    with pytest.raises(UserError, match="expected 200 classes, found 3"):
        tiny_imagenet.load(spec, tmp_path)


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


def test_negative_workers():
    assert fails(OptionError, workers=-1).startswith("--workers: ")


def test_an_unknown_set():
    message = fails(OptionError, name="cifar")
    assert "'cifar'" in message
    assert all(name in message for name in SETS)


def test_the_sets_have_their_names():
    names = ["digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet"]
    assert list(SETS) == names


def test_data_root(monkeypatch):
    monkeypatch.delenv("STARTSPARSE_DATA", raising=False)
    assert data_root("") == Path("data")
    monkeypatch.setenv("STARTSPARSE_DATA", "/some/where")
    assert data_root("") == Path("/some/where")
    assert data_root("else/where") == Path("else/where")
    assert data_root("~/x") == Path.home() / "x"


# ImageNet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_imagenet(root)
    return root


def centre(path):
    """Shorter side to 256, then the 224 x 224 in the centre, normalised: [3, 224, 224]."""
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    from startsparse.data.files import open_rgb

    normalise = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Compose([Resize(256), CenterCrop(224), ToTensor(), normalise])(open_rgb(path))


def test_imagenet(imagenet):
    data = loaded("imagenet", imagenet, batch_size=4, valid_split=0.3)
    assert (data.classes, data.channels, data.size) == (2, 3, 224)
    assert (data.train.examples, data.valid.examples, data.test.examples) == (7, 3, 6)
    assert (len(data.train), len(data.valid), len(data.test)) == (2, 1, 2)
    paths = sorted((imagenet / "imagenet" / "val").glob("*/*.JPEG"))
    x, y = gathered(data.test)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    for image, path in zip(x, paths, strict=True):
        torch.testing.assert_close(image, centre(path), atol=1e-5, rtol=0)
    # The validation part comes from train/, but is prepared like a test image.
    paths = sorted((imagenet / "imagenet" / "train").glob("*/*.JPEG"))
    plain = [centre(path) for path in paths]
    x, _ = gathered(data.valid)
    assert all(any(torch.allclose(image, other, atol=1e-5) for other in plain) for image in x)
    x, y = next(data.train.epoch(0))
    assert x.shape == (4, 3, 224, 224) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert not any(torch.allclose(image, other, atol=1e-5) for image in x for other in plain)
    x, _ = next(loaded("imagenet", imagenet, valid_split=0, augment=False).train.epoch(0))
    assert all(any(torch.allclose(image, other, atol=1e-5) for other in plain) for image in x)


def test_imagenet_does_not_depend_on_the_workers(imagenet):
    def all_of(workers, start=0, seed=0, epoch=1):
        options = {"batch_size": 2, "valid_split": 0, "workers": workers, "seed": seed}
        return list(loaded("imagenet", imagenet, **options).train.epoch(epoch, start))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    here = all_of(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    there = all_of(2)
    assert len(here) == len(there) == 5
    for (x, y), (x1, y1) in zip(here, there, strict=True):
        assert torch.equal(x, x1) and torch.equal(y, y1)
    for workers in (0, 2):
        tail = all_of(workers, start=3)
        assert len(tail) == 2
        for (x, y), (x1, y1) in zip(tail, here[3:], strict=True):
            assert torch.equal(x, x1) and torch.equal(y, y1)
    for other in (all_of(0, seed=5), all_of(0, epoch=2)):
        assert [y.tolist() for _, y in other] != [y.tolist() for _, y in here]
        assert not any(torch.equal(x, x1) for (x, _), (x1, _) in zip(other, here, strict=True))


def test_imagenet_draws_by_example_and_epoch(imagenet):
    """The augmentation of an image does not depend on the batch it is in."""
    small = loaded("imagenet", imagenet, batch_size=2, valid_split=0).train
    large = loaded("imagenet", imagenet, batch_size=5, valid_split=0).train
    assert torch.equal(gathered(small)[0], gathered(large)[0])


def test_resuming_imagenet_does_not_read_what_was_done(tmp_path):
    write_imagenet(tmp_path, train=3, test=1)
    train = loaded("imagenet", tmp_path, batch_size=2, valid_split=0).train
    order = [y for _, y in train.epoch(0)]
    assert len(order) == 3
    rows = torch.randperm(6, generator=seeding.generator(0, "shuffle"))
    for row in rows[:4].tolist():
        Path(train.samples[row][0]).unlink()
    tail = list(train.epoch(0, start=2))
    assert len(tail) == 1 and torch.equal(tail[0][1], order[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_imagenet_file_that_cannot_be_decoded(tmp_path, workers):
    path = write_imagenet(tmp_path, train=3, test=1) / "train" / "n00000001" / "2.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    data = loaded("imagenet", tmp_path, valid_split=0, workers=workers)
    with pytest.raises(UserError) as error:
        list(data.train.epoch(0))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_imagenet_is_never_fetched(tmp_path):
    for part in ("train", "val"):
        message = fails(UserError, name="imagenet", root=tmp_path)
        assert str(tmp_path / "imagenet" / part) in message and "--set digits" in message
        put(tmp_path / "imagenet" / part / "n0" / "0.JPEG", jpeg(pixels(40, 40, 3))[0])


def test_imagenet_folders_that_do_not_fit(tmp_path):
    folder = write_imagenet(tmp_path, train=2, test=1)
    (folder / "val" / "n00000001").rename(folder / "val" / "n7")
    assert "n00000001" in fails(UserError, name="imagenet", root=tmp_path)
    (folder / "val" / "n7" / "0.JPEG").unlink()
    assert "n7" in fails(UserError, name="imagenet", root=tmp_path)


def test_imagenet_without_validation(imagenet):
    data = loaded("imagenet", imagenet, valid_split=0)
    assert (len(data.valid), data.valid.examples, list(data.valid.epoch(0))) == (0, 0, [])
