"""Tiny ImageNet: the cache of decoded pixels, and folders that are damaged or incomplete."""

import os
from dataclasses import replace

import numpy as np
import pytest
from data_files import jpeg, pixels, write_tiny_imagenet

from startsparse.data import tiny_imagenet
from startsparse.errors import UserError


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


@pytest.mark.parametrize("change", ["written again", "renamed", "touched"])
def test_the_cache_is_not_used_for_other_images(tmp_path, tiny, monkeypatch, change):
    tiny.loader(tmp_path, "")
    first = min((tmp_path / tiny.spec.folder / "train").glob("*/images/*.JPEG"))
    if change == "renamed":
        first.rename(first.with_name("zzz.JPEG"))
        tiny.train[0][:4] = tiny.train[0][[1, 2, 3, 0]]  # the first of its class is now the last
    elif change == "touched":  # another image may have the same size
        os.utime(first, (0, 0))
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


def test_hidden_files_are_no_images(tmp_path, tiny):
    image = min((tmp_path / tiny.spec.folder / "train").glob("*/images/*.JPEG"))
    image.with_name(f"._{image.name}").write_bytes(b"of a Mac")
    assert same(tiny.loader(tmp_path, ""), tiny)
