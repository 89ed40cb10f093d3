"""ImageNet from folders: pixels, randomness, workers, resuming, and what can be wrong."""

import gc
import multiprocessing
from pathlib import Path

import pytest
import torch
from data_files import fails, gathered, jpeg, loaded, pixels, put, write_imagenet

from startsparse import seeding
from startsparse.data import Shape
from startsparse.errors import UserError


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_imagenet(root)
    return root


def centre(path):
    """Shorter side to 256, then the 224 x 224 in the centre, normalised: [3, 224, 224]."""
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    from startsparse.data.files import open_image

    normalise = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Compose([Resize(256), CenterCrop(224), ToTensor(), normalise])(open_image(path))


def test_imagenet(imagenet):
    data = loaded("imagenet", imagenet, batch_size=4, valid_split=0.3)
    assert data.shape == Shape(2, 3, 224)
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


def test_workers_stay_and_read_each_epoch_as_new_ones_do(imagenet):
    """Also when an epoch was left in its middle, or failed."""
    options = {"batch_size": 2, "valid_split": 0}
    here, there = (loaded("imagenet", imagenet, workers=n, **options).train for n in (0, 2))
    pids = set()
    for epoch in (0, 1, 1, 2):
        next(there.epoch(7))
        for (x, y), (x1, y1) in zip(here.epoch(epoch), there.epoch(epoch), strict=True):
            assert torch.equal(x, x1) and torch.equal(y, y1)
        pids |= {worker.pid for worker in multiprocessing.active_children()}
    assert len(pids) == 2
    kept, there.samples[0] = there.samples[0], ("gone.JPEG", 0)
    there.__dict__.pop("_loader")
    with pytest.raises(UserError, match=r"gone\.JPEG"):
        list(there.epoch(0))
    there.samples[0] = kept
    del there
    gc.collect()
    assert not multiprocessing.active_children()


def test_imagenet_draws_by_example_and_epoch(imagenet):
    """The augmentation of an image does not depend on the batch it is in."""
    small = loaded("imagenet", imagenet, batch_size=2, valid_split=0).train
    large = loaded("imagenet", imagenet, batch_size=5, valid_split=0).train
    assert torch.equal(gathered(small)[0], gathered(large)[0])


def test_imagenet_cuts_an_image_differently_in_every_epoch(tmp_path):
    write_imagenet(tmp_path, classes=3, train=1, test=1)  # so the label tells which image it is
    train = loaded("imagenet", tmp_path, valid_split=0).train
    x, y = next(train.epoch(0))
    x1, y1 = next(train.epoch(1))
    assert not any(torch.equal(x[y == label], x1[y1 == label]) for label in range(3))


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


def test_what_lies_beside_the_images_is_left_out(tmp_path):
    folder = write_imagenet(tmp_path, train=2, test=1)
    image = (folder / "val/n00000000/0.JPEG").read_bytes()
    before = loaded("imagenet", tmp_path, valid_split=0)
    for name in (".ipynb_checkpoints/0.JPEG", "n00000000/._0.JPEG", "n00000000/.DS_Store"):
        put(folder / "train" / name, image)
        put(folder / "val" / name, image)
    put(folder / "train/n00000001/Thumbs.db", b"")
    found = loaded("imagenet", tmp_path, valid_split=0)
    assert found.train.samples == before.train.samples
    assert found.test.samples == before.test.samples
    assert found.images.class_names == ("n00000000", "n00000001")


def test_a_class_without_images_is_named(tmp_path):
    folder = write_imagenet(tmp_path, train=1, test=1)
    (folder / "train/n00000001/0.JPEG").unlink()
    message = fails(UserError, name="imagenet", root=tmp_path)
    assert message.startswith(f"{folder}/train/n00000001: has no image; images end in .jpg .jpeg")


def test_imagenet_without_validation(imagenet):
    data = loaded("imagenet", imagenet, valid_split=0)
    assert (len(data.valid), data.valid.examples, list(data.valid.epoch(0))) == (0, 0, [])
