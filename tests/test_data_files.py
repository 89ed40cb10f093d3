"""Fetching, checking and unpacking: from a server on this machine, with every way it can fail."""

import gzip
import hashlib
import socket
from dataclasses import replace

import numpy as np
import pytest
from data_files import write_cifar10, write_mnist, write_tiny_imagenet
from file_server import Broken, Handler, content, serve

from startsparse.data import cifar, files, mnist, tiny_imagenet
from startsparse.data.files import File
from startsparse.errors import UserError


def fails(load, *args, **options):
    """The message of the `UserError`, which has one line."""
    with pytest.raises(UserError) as error:
        load(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def nobody():
    """The URL of a port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def cifar10(tmp_path):
    """A tiny CIFAR-10 on a server's disk, and an empty folder to load it into."""
    server, root = tmp_path / "server", tmp_path / "root"
    server.mkdir()
    return write_cifar10(server), server, root


def matches(arrays, tiny):
    for (images, labels), (expected, targets) in (
        (arrays.train, tiny.train),
        (arrays.test, tiny.test),
    ):
        np.testing.assert_array_equal(images.numpy(), expected)
        assert labels.tolist() == targets
    return True


# Where the files come from


def test_the_archive_is_fetched_from_the_mirror_and_unpacked(cifar10):
    tiny, server, root = cifar10
    with serve(server) as url:
        assert matches(tiny.loader(root, url + "/"), tiny)
    names = [file.name for file in (*tiny.spec.train, *tiny.spec.test, tiny.spec.meta)]
    kept = [f"{tiny.spec.folder}/{name}" for name in names]
    assert content(root) == sorted([*kept, tiny.spec.archive.name])
    assert matches(tiny.loader(root, nobody()), tiny)  # no network needed any more


def test_the_published_place_is_used_without_a_mirror(cifar10):
    tiny, server, root = cifar10
    with serve(server) as url:
        assert matches(cifar.load(replace(tiny.spec, url=url), root), tiny)


def test_an_archive_in_the_root_needs_no_network(cifar10):
    tiny, server, root = cifar10
    root.mkdir()
    (server / tiny.spec.archive.name).rename(root / tiny.spec.archive.name)
    assert matches(tiny.loader(root, ""), tiny)


def test_a_missing_file_is_restored_and_the_others_left_alone(cifar10):
    tiny, root = cifar10[:2]
    folder = root / tiny.spec.folder
    (folder / "data_batch_3").unlink()
    (folder / "notes.txt").write_text("mine")
    before = (folder / "data_batch_1").stat().st_ino
    assert matches(tiny.loader(root, ""), tiny)
    assert (folder / "data_batch_1").stat().st_ino == before
    assert (folder / "notes.txt").read_text() == "mine"


def test_mnist_fetches_single_files(tmp_path):
    tiny = write_mnist(tmp_path / "server")
    folder = tmp_path / "server" / tiny.spec.folder
    with serve(folder) as url:
        assert matches(tiny.loader(tmp_path / "root", url), tiny)
    assert content(tmp_path / "root" / tiny.spec.folder) == content(folder)


def test_tiny_imagenet_is_unpacked_from_its_zip(tmp_path):
    tiny = write_tiny_imagenet(tmp_path / "server")
    with serve(tmp_path / "server") as url:
        assert matches(tiny.loader(tmp_path / "root", url), tiny)
    assert content(tmp_path / "root" / tiny.spec.folder) == content(
        tmp_path / "server" / tiny.spec.folder
    )


def test_a_mirror_may_be_a_folder_of_this_machine(cifar10):
    tiny, server, root = cifar10
    assert matches(tiny.loader(root, server.as_uri()), tiny)


# What goes wrong on the way


def test_no_network_and_no_file(cifar10):
    tiny, _, root = cifar10
    url = nobody()
    message = fails(tiny.loader, root, url)
    archive = tiny.spec.archive.name
    assert str(root / archive) in message and f"{url}/{archive}" in message
    assert "--mirror" in message and "--set digits" in message
    assert content(root) == []


def test_no_network_and_no_mnist(tmp_path):
    tiny = write_mnist(tmp_path)
    (tmp_path / tiny.spec.folder / "t10k-labels-idx1-ubyte.gz").unlink()
    message = fails(tiny.loader, tmp_path, nobody())
    assert str(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz") in message
    assert "--set digits" in message


def test_a_mirror_without_the_file(cifar10, tmp_path):
    tiny, _, root = cifar10
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as url:
        assert "404" in fails(tiny.loader, root, url)
    assert content(root) == []


@pytest.mark.parametrize("mirror", ["not a URL", "nothing://x", "http://127.0.0.1:no"])
def test_a_mirror_that_is_no_url(cifar10, mirror):
    tiny, _, root = cifar10
    assert mirror in fails(tiny.loader, root, mirror)


@pytest.mark.parametrize("handler", [Handler, Broken])
def test_a_wrong_or_truncated_download_leaves_nothing(cifar10, handler):
    tiny, server, root = cifar10
    archive = server / tiny.spec.archive.name
    if handler is Handler:
        archive.write_bytes(archive.read_bytes() + b"x")
    data = archive.read_bytes()
    arrived = data[: len(data) // 2] if handler is Broken else data
    with serve(server, handler) as url:
        message = fails(tiny.loader, root, url)
    assert f"{url}/{archive.name}" in message
    assert tiny.spec.archive.md5 in message and hashlib.md5(arrived).hexdigest() in message
    assert list(root.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(cifar10, monkeypatch):
    tiny, server, root = cifar10

    def interrupt(bar, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.tqdm, "update", interrupt)
    with serve(server) as url, pytest.raises(KeyboardInterrupt):
        tiny.loader(root, url)
    assert list(root.iterdir()) == []


def test_a_root_that_cannot_be_written(cifar10, tmp_path):
    tiny, server, _ = cifar10
    (tmp_path / "file").write_text("")
    with serve(server) as url:
        assert str(tmp_path / "file") in fails(tiny.loader, tmp_path / "file" / "root", url)


def test_a_damaged_archive_is_named_and_not_touched(cifar10):
    tiny, server, root = cifar10
    root.mkdir()
    archive = root / tiny.spec.archive.name
    archive.write_bytes((server / archive.name).read_bytes()[:-9])
    found = hashlib.md5(archive.read_bytes()).hexdigest()
    message = fails(tiny.loader, root, "")
    assert str(archive) in message and "delete it" in message
    assert tiny.spec.archive.md5 in message and found in message
    assert content(root) == [archive.name]


def test_an_archive_that_cannot_be_unpacked_leaves_nothing(cifar10):
    tiny, root = cifar10[:2]
    names = [f"{tiny.spec.folder}/{name}" for name in ("data_batch_1", "not_in_the_archive")]
    before = content(root)
    archive = tiny.spec.archive
    message = fails(files.unpacked, root, names, archive, tiny.spec.url, "", largest=1 << 20)
    assert str(root / tiny.spec.archive.name) in message
    assert content(root) == before


# Damaged files


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
@pytest.mark.parametrize("write", [write_cifar10, write_mnist])
def test_a_damaged_file_is_named(tmp_path, write, damage):
    tiny = write(tmp_path)
    file = tiny.spec.train[-1]
    path = tmp_path / tiny.spec.folder / file.name
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "truncated": data[:middle],
            "corrupted": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    found = hashlib.md5(path.read_bytes()).hexdigest()
    message = fails(tiny.loader, tmp_path, "")
    assert str(path) in message and file.md5 in message and found in message
    assert "delete it" in message


def test_nothing_is_unpickled_before_its_md5_is_right(cifar10, monkeypatch):
    tiny, root = cifar10[:2]
    path = root / tiny.spec.folder / "data_batch_1"
    path.write_bytes(b"cbuiltins\nexit\n(I7\ntR.")  # a pickle that would leave the process
    assert str(path) in fails(tiny.loader, root, "")


def test_a_file_that_cannot_be_read(cifar10):
    tiny, root = cifar10[:2]
    path = root / tiny.spec.folder / "test_batch"
    path.unlink()
    path.mkdir()
    assert str(path) in fails(tiny.loader, root, "")


def test_a_file_that_is_no_image(tmp_path):
    for data in (b"", b"not an image", b"\xff\xd8\xff\xe0\x00\x10JFIF"):
        (tmp_path / "x.JPEG").write_bytes(data)
        assert str(tmp_path / "x.JPEG") in fails(files.open_image, tmp_path / "x.JPEG")
    assert str(tmp_path / "none.JPEG") in fails(files.open_image, tmp_path / "none.JPEG")


# What is published


def test_the_md5_tables_are_those_of_torchvision():
    from torchvision import datasets

    for spec, published in (
        (cifar.CIFAR10, datasets.CIFAR10),
        (cifar.CIFAR100, datasets.CIFAR100),
    ):
        assert spec.folder == published.base_folder
        assert f"{spec.url}/{spec.archive.name}" == published.url
        assert spec.archive.md5 == published.tgz_md5
        assert [[file.name, file.md5] for file in spec.train] == published.train_list
        assert [[file.name, file.md5] for file in spec.test] == published.test_list
        meta = {"filename": spec.meta.name, "key": spec.names_key, "md5": spec.meta.md5}
        assert meta == published.meta
    resources = [(file.name, file.md5) for file in mnist.MNIST.train + mnist.MNIST.test]
    assert resources == datasets.MNIST.resources
    assert mnist.MNIST.url + "/" in datasets.MNIST.mirrors
    assert tiny_imagenet.TINY_IMAGENET.archive == File(
        "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
    )


def test_the_tiny_files_are_in_the_true_formats(tmp_path):
    """What torchvision reads is what `data_files` wrote."""
    from torchvision import datasets

    tiny = write_cifar10(tmp_path)

    tables = {
        "train_list": [[file.name, file.md5] for file in tiny.spec.train],
        "test_list": [[file.name, file.md5] for file in tiny.spec.test],
        "_load_meta": lambda self: None,
    }
    theirs = type("Tiny", (datasets.CIFAR10,), tables)(str(tmp_path), train=True)
    np.testing.assert_array_equal(theirs.data, tiny.train[0])
    assert theirs.targets == tiny.train[1]
    tiny = write_mnist(tmp_path)
    for file in tiny.spec.train + tiny.spec.test:
        path = tmp_path / tiny.spec.folder / file.name
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    theirs = datasets.MNIST(str(tmp_path), train=False)
    np.testing.assert_array_equal(theirs.data.numpy(), tiny.test[0][:, 2:-2, 2:-2, 0])
