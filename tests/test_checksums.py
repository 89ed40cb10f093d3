"""Re-encoded copies of known sets: --no-checksum, what is checked all the same, what records it."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from data_files import (
    idx,
    pixels,
    put,
    python2_pickle,
    write_cifar10,
    write_cifar100,
    write_mnist,
    write_tiny_imagenet,
)
from file_server import content, serve
from option_names import SCRIPTS
from script_runs import ROOT

from startsparse import runs
from startsparse.commandline import parse
from startsparse.data import SETS
from startsparse.errors import OptionError, UserError
from STR import main as script
from STR import run_imp

MLP = ["--arch", "mlp", "--width", "16", "--epochs", "1", "-b", "8", "--valid-split", "0.2"]


def fails(load, *args, **options):
    with pytest.raises(UserError) as error:
        load(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def labels(arrays):
    return arrays.train[1].tolist(), arrays.test[1].tolist()


# Copies with other sums


def reencoded(content, dump):
    """The same pickle of CIFAR with other pixels, written by ``dump``."""
    found = pickle.loads(content, encoding="bytes")
    found[b"data"] = 255 - found[b"data"]
    return dump(found)


def as_text(found):
    return {key.decode(): value for key, value in found.items()}


WAYS = {
    "python 2": python2_pickle,
    "bytes": pickle.dumps,
    "oldest": lambda found: pickle.dumps(as_text(found), 0),
    "newest": lambda found: pickle.dumps(as_text(found), 5),
    "numpy labels": lambda found: pickle.dumps(
        {k: np.array(v) if "labels" in k else v for k, v in as_text(found).items()}
    ),
    "numpy numbers": lambda found: pickle.dumps(
        {k: list(np.array(v)) if "labels" in k else v for k, v in as_text(found).items()}
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", [write_cifar10, write_cifar100])
def test_a_reencoded_cifar(tmp_path, write, way):
    tiny = write(tmp_path)
    before, folder = tiny.loader(tmp_path), tmp_path / tiny.spec.folder
    for file in tiny.spec.train + tiny.spec.test:
        path = folder / file.name
        path.write_bytes(reencoded(path.read_bytes(), WAYS[way]))
    message = fails(tiny.loader, tmp_path)
    assert message.startswith(f"{folder / tiny.spec.train[0].name}: damaged or another file: ")
    assert message.endswith("fetch it, or use a re-encoded copy with --no-checksum")
    after = tiny.loader(tmp_path, checksum=False)
    np.testing.assert_array_equal(after.train[0], 255 - before.train[0])
    np.testing.assert_array_equal(after.test[0], 255 - before.test[0])
    assert labels(after) == labels(before)
    assert after.class_names == before.class_names


def test_a_reencoded_mnist(tmp_path):
    tiny = write_mnist(tmp_path)
    before = tiny.loader(tmp_path)
    for file in tiny.spec.train + tiny.spec.test:
        path = tmp_path / tiny.spec.folder / file.name
        data = path.read_bytes()
        path.write_bytes(gzip.compress(gzip.decompress(data), compresslevel=1, mtime=9))
        assert path.read_bytes() != data
    assert "--no-checksum" in fails(tiny.loader, tmp_path)
    after = tiny.loader(tmp_path, checksum=False)
    np.testing.assert_array_equal(after.train[0], before.train[0])
    assert labels(after) == labels(before)


def test_reencoded_archives(tmp_path):
    """Those beside which nothing is unpacked."""
    for tiny in (write_cifar10(tmp_path), write_tiny_imagenet(tmp_path)):
        before = tiny.loader(tmp_path)
        spec = replace(tiny.spec, archive=replace(tiny.spec.archive, md5="0" * 32))
        archive, other = tmp_path / spec.archive.name, tmp_path / spec.folder
        root = tmp_path / f"root-{spec.folder}"
        root.mkdir()
        archive.rename(root / archive.name)
        load = tiny.loader.func
        assert "--no-checksum" in fails(load, spec, root)
        assert labels(load(spec, root, checksum=False)) == labels(before)
        assert other.exists() and (root / spec.folder).exists()


def test_an_archive_puts_nothing_elsewhere(tmp_path):
    tiny = write_cifar10(tmp_path / "true")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / tiny.spec.archive.name, "w:gz") as archive:
        archive.add(tmp_path / "true" / tiny.spec.folder, f"./{tiny.spec.folder}")
        for name in ("../escaped", f"{tmp_path}/escaped", "more"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("link/escaped"), io.BytesIO())
    assert labels(tiny.loader(root, checksum=False)) == labels(tiny.loader(tmp_path / "true"))
    assert {Path(name).parts[0] for name in content(root)} == {
        tiny.spec.folder,
        tiny.spec.archive.name,
    }
    assert not list(tmp_path.glob("**/escaped"))


@pytest.mark.parametrize("write", [write_cifar10, write_tiny_imagenet])
@pytest.mark.parametrize("damage", [b"", b"not an archive", None])
def test_a_damaged_archive(tmp_path, write, damage):
    tiny = write(tmp_path / "true")
    name = tiny.spec.archive.name
    data = (tmp_path / "true" / name).read_bytes()
    path = tmp_path / "root" / name
    put(path, data[: len(data) // 2] if damage is None else damage)
    message = fails(tiny.loader, path.parent, checksum=False)
    assert message.startswith(f"{path}: cannot be unpacked in ")
    assert content(path.parent) == [name]


def other_tar(path, members, packed=True):
    """A tar of (name, size, type, link), all zeros inside."""
    with tarfile.open(path, "w:gz" if packed else "w") as archive:
        for name, size, kind, link in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = size, kind, link
            archive.addfile(member, io.BytesIO(bytes(size)))


def test_a_bomb_is_refused(tmp_path):
    """The disk would fill, or the memory."""
    tiny = write_cifar10(tmp_path / "true")
    path = tmp_path / "root" / tiny.spec.archive.name
    path.parent.mkdir()
    first = f"{tiny.spec.folder}/data_batch_1"
    other_tar(path, [(first, 40 << 20, tarfile.REGTYPE, "")])
    message = fails(tiny.loader, path.parent, checksum=False)
    assert f"{path}: cannot be unpacked in {path.parent} ({first} has more than 17," in message
    other_tar(path, [("other", 40 << 20, tarfile.REGTYPE, "")])
    assert "(it unpacks to more than 17," in fails(tiny.loader, path.parent, checksum=False)
    assert content(path.parent) == [path.name]

    zipped = write_tiny_imagenet(tmp_path / "other")
    path = tmp_path / "root" / zipped.spec.archive.name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{zipped.spec.folder}/wnids.txt", bytes(70 << 20))
    assert "(it unpacks to more than 67," in fails(zipped.loader, path.parent, checksum=False)

    digits = write_mnist(tmp_path / "digits")
    path = tmp_path / "digits" / digits.spec.folder / digits.spec.train[0].name
    head = gzip.decompress(path.read_bytes())[:16]
    path.write_bytes(gzip.compress(head + bytes(200 << 20), 1))
    tracemalloc.start()
    message = fails(digits.loader, tmp_path / "digits", checksum=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.endswith("more numbers than 31360")
    assert peak < 20 << 20


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_only_files_are_unpacked(tmp_path, kind):
    tiny = write_cifar10(tmp_path / "true")
    path = tmp_path / "root" / tiny.spec.archive.name
    path.parent.mkdir()
    names = [f"{tiny.spec.folder}/{file.name}" for file in (*tiny.spec.train, *tiny.spec.test)]
    other_tar(path, [(name, 0, kind, "/etc/hostname") for name in names])
    assert "cannot be unpacked" in fails(tiny.loader, path.parent, checksum=False)
    assert content(path.parent) == [path.name]


def test_a_tar_that_is_not_gzipped(tmp_path):
    tiny = write_cifar10(tmp_path / "true")
    path = tmp_path / "root" / tiny.spec.archive.name
    put(path, gzip.decompress((tmp_path / "true" / path.name).read_bytes()))
    expected = labels(tiny.loader(tmp_path / "true"))
    assert labels(tiny.loader(path.parent, checksum=False)) == expected


def test_the_checksum_of_gzip_is_read(tmp_path):
    """It comes after all that tar asks for."""
    tiny = write_cifar10(tmp_path / "true")
    path = tmp_path / "root" / tiny.spec.archive.name
    data = bytearray((tmp_path / "true" / path.name).read_bytes())
    data[-6] ^= 1
    put(path, data)
    assert "CRC check failed" in fails(tiny.loader, path.parent, checksum=False)
    assert content(path.parent) == [path.name]


def test_a_pipe_is_no_data_file(tmp_path):
    tiny = write_cifar10(tmp_path)
    path = tmp_path / tiny.spec.folder / "data_batch_1"
    path.unlink()
    os.mkfifo(path)
    for checksum in (True, False):
        message = fails(tiny.loader, tmp_path, checksum=checksum)
        assert message == f"{path}: cannot be read (is a pipe or a device, not a file)"


@pytest.mark.parametrize("write", [write_cifar10, write_mnist, write_tiny_imagenet])
def test_what_is_fetched_has_the_published_sum(tmp_path, write):
    tiny = write(tmp_path)
    served = tmp_path if hasattr(tiny.spec, "archive") else tmp_path / tiny.spec.folder
    for path in served.iterdir():
        if path.is_file():
            path.write_bytes(path.read_bytes() + b"\0")
    with serve(served) as url:
        message = fails(tiny.loader, tmp_path / "root", url, checksum=False)
    assert "truncated or another file: expected MD5" in message
    assert content(tmp_path / "root") == []


# What is checked without sums


class Runs:
    def __reduce__(self):
        return (print, ("it ran",))


IMAGES = {b"data": pixels(8, 3072), b"labels": [3] * 8}
OBJECTS = np.array([Runs()] * 8, dtype=object)
CIFAR = {
    "no pickle of images (it asks for builtins.print)": pickle.dumps({"data": Runs()}),
    "no pickle of images (it has an array of dtype 'O8'": pickle.dumps({"data": OBJECTS}),
    "no pickle of images (pickle data was truncated or is damaged)": python2_pickle(IMAGES)[:-99],
    "no pickle of images (pickle data was truncated or": b"",
    "a list, no dict": python2_pickle([1]),
    "has no 'data'": python2_pickle({b"labels": [3] * 8}),
    "has no 'labels'": python2_pickle({b"data": IMAGES[b"data"]}),
    "'data' is uint8 [7, 3072], not uint8 [8, 3072]": {b"data": pixels(7, 3072)},
    "'data' is uint8 [8, 32, 32, 3], not": {b"data": pixels(8, 32, 32, 3)},
    "'data' is float64 [8, 3072], not uint8": {b"data": IMAGES[b"data"] / 255},
    "'data' is a list, not uint8": {b"data": [[0] * 3072] * 8},
    "'labels' is int64 [7], not integer [8]": {b"labels": [3] * 7},
    "'labels' is float64 [8], not integer": {b"labels": np.ones(8)},
    "'labels' is a list, not integer": {b"labels": [[3]] * 8},
    "'labels' is a list, not integer [8]": {b"labels": ["3"] * 8},
    "'labels' is object [8], not integer": {b"labels": [2**70] * 8},
    "'labels' is a dict, not integer": {b"labels": {}},
    "label 10, not 0 to 9": {b"labels": [*range(7), 10]},
    "label -1, not 0 to 9": {b"labels": [*range(7), -1]},
}


@pytest.mark.parametrize("message", CIFAR)
def test_a_wrong_cifar_file_is_named(tmp_path, capsys, message):
    tiny = write_cifar10(tmp_path)
    wrong = CIFAR[message]
    path = tmp_path / tiny.spec.folder / "data_batch_2"
    path.write_bytes(pickle.dumps(IMAGES | wrong, 2) if isinstance(wrong, dict) else wrong)
    assert fails(tiny.loader, tmp_path, checksum=False).startswith(
        f"{path}: damaged or another file: {message}"
    )
    file = replace(tiny.spec.train[1], md5=hashlib.md5(path.read_bytes()).hexdigest())
    spec = replace(tiny.spec, train=(tiny.spec.train[0], file, *tiny.spec.train[2:]))
    assert message in fails(tiny.loader.func, spec, tmp_path)  # with the right sum alike
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "names", [None, [], ["one"], ["x"] * 9 + [1], "abcdefghij", dict.fromkeys("abcdefghij")]
)
def test_wrong_class_names_are_named(tmp_path, names):
    tiny = write_cifar10(tmp_path)
    path = tmp_path / tiny.spec.folder / "batches.meta"
    path.write_bytes(pickle.dumps({"label_names": names}))
    assert "--no-checksum" in fails(tiny.loader, tmp_path)
    expected = f"{path}: damaged or another file: 'label_names' is no list of 10 names"
    assert fails(tiny.loader, tmp_path, checksum=False) == expected


TENS = idx(np.full(40, 10, np.uint8))
MNIST = {
    "images: no gzipped IDX file (": b"not gzipped",
    "images: no gzipped IDX file (Compressed file ended": idx(pixels(40, 28, 28))[:-99],
    "labels: no gzipped IDX file (unpack_from": gzip.compress(b"\0\0"),
    "images: type 8 [40, 27, 28], not 8 (bytes) [40, 28, 28]": idx(pixels(40, 27, 28)),
    "images: type 8 [39, 28, 28], not": idx(pixels(39, 28, 28)),
    "labels: type 9 [40], not 8 (bytes) [40]": gzip.compress(b"\0\0\x09\1\0\0\0\x28" + bytes(40)),
    "labels: 39 numbers, not 40": gzip.compress(b"\0\0\x08\1\0\0\0\x28" + bytes(39)),
    "labels: label 10, not 0 to 9": TENS,
}


@pytest.mark.parametrize("message", MNIST)
def test_a_wrong_mnist_file_is_named(tmp_path, message):
    tiny = write_mnist(tmp_path)
    which, _, what = message.partition(": ")
    file = tiny.spec.train[which == "labels"]
    path = tmp_path / tiny.spec.folder / file.name
    path.write_bytes(MNIST[message])
    found = fails(tiny.loader, tmp_path, checksum=False)
    assert found.startswith(f"{path}: damaged or another file: {what}")


def test_the_published_sizes_are_asked_for(tmp_path):
    write_cifar10(tmp_path), write_cifar100(tmp_path), write_mnist(tmp_path)
    for name, size in (("cifar10", "10000, 3072"), ("cifar100", "50000, 3072"), ("mnist", "60000")):
        assert f"[{size}" in fails(SETS[name], tmp_path, checksum=False)


# The option


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_option_of_every_script(name):
    kind, configs = SCRIPTS[name]
    for set_ in ("mnist", "cifar10", "cifar100", "tiny-imagenet"):
        assert parse(kind, configs, ["--set", set_]).checksum
        for flag in (["--no-checksum"], ["--no_checksum"], ["--checksum", "False"]):
            assert not parse(kind, configs, ["--set", set_, *flag]).checksum
    for set_ in ("digits", "imagenet", "karate", "cora"):
        arch = ["--arch", "gcn" if set_ in ("karate", "cora") else "resnet18"]
        with pytest.raises(OptionError, match=f"^--checksum: has no effect with --.* {set_}, for "):
            parse(kind, configs, ["--set", set_, *arch, "--no-checksum"])


def test_a_sweep_hands_it_on(capsys):
    sweep = ["--config", str(ROOT / "STR/configs/cifar10.yaml"), "--dry-run", "--", "--no-checksum"]
    assert run_imp.main(sweep) == 0
    assert " --no-checksum" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_records_it(run, tmp_path, monkeypatch, caplog):
    tiny = write_cifar10(tmp_path / "data")
    monkeypatch.setitem(SETS, "cifar10", tiny.loader)
    path = tmp_path / "data" / tiny.spec.folder / "test_batch"
    argv = [*MLP, "--set", "cifar10", "--data", str(tmp_path / "data")]
    plain = run(*argv)
    assert "checksums" not in caplog.text
    path.write_bytes(reencoded(path.read_bytes(), python2_pickle))
    with pytest.raises(UserError, match="--no-checksum$"):
        run(*argv, "--name", "refused")
    folder = run(*argv, "--name", "reencoded", "--no-checksum")
    assert "checksums            not compared" in caplog.text
    assert yaml.safe_load((folder / "options.yaml").read_text())["checksum"] is False
    assert json.loads((folder / "summary.json").read_text())["checksum"] is False
    assert "checksum" not in json.loads((plain / "summary.json").read_text())
    table = pd.read_csv(tmp_path / "a/results.csv")
    assert table["checksum"].tolist() == [True, False]
    assert table["images"].isna().tolist() == [True, False]
    assert [bool(runs.images(f).content) for f in (plain, folder)] == [False, True]
    other = run(*argv, "--name", "again", "--no-checksum")
    assert runs.images(other) == runs.images(folder)
    with pytest.raises(OptionError, match="^--checksum: True, but the run .* with False$"):
        script.main([*argv, "--resume", str(folder), "--checksum", "True"])
