"""Files of data sets: damaged ones, crafted ones, odd images."""

import functools
import io
import os
import pickle
import tarfile
import tempfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data_files import write_cifar10, write_cifar100, write_mnist, write_tiny_imagenet
from graph_files import write_planetoid
from hypothesis import strategies as st
from PIL import Image

from startsparse import checkpoint, data
from startsparse.data import decoded, files, folder, planetoid
from startsparse.errors import UserError
from torture.damage import damages, refused
from torture.promises import promise

WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "mnist": write_mnist,
    "tiny-imagenet": functools.partial(write_tiny_imagenet, classes=2, train=2, test=2),
    "planetoid": write_planetoid,
}
WITH_SUMS = ("cifar10", "cifar100", "mnist", "cifar10 archive", "tiny-imagenet archive")


@functools.cache
def _written(name: str):
    """Spec, loader and files of a tiny set: as an archive alone, or unpacked."""
    name, _, archive = name.partition(" ")
    with tempfile.TemporaryDirectory() as where:
        tiny = WRITERS[name](Path(where))
        paths = sorted(p for p in Path(where).rglob("*") if p.is_file())
        packed = getattr(tiny.spec, "archive", None)
        paths = [p for p in paths if (bool(packed) and p.name == packed.name) == bool(archive)]
        found = {str(path.relative_to(where)): path.read_bytes() for path in paths}
    return tiny, found


def _put(name: str, where: Path, damage=None, which: int = 0) -> Path:
    """Write the files of a set, one of them damaged; returns the path of that one."""
    content = _written(name)[1]
    names = [n for n in content if not n.endswith(("words.txt", "_boxes.txt", "test_0.JPEG"))]
    chosen = names[which % len(names)]
    for name_, file in content.items():
        path = where / name_
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage.of(file) if damage and name_ == chosen else file)
    return where / chosen


def _tensors(arrays) -> list:
    if isinstance(arrays, data.Graph):
        joined = arrays.adjacency.to_dense()
        return [arrays.features.dense, arrays.labels, joined, arrays.train, *arrays.held_out(0)]
    return [*arrays.train, *arrays.test, arrays.class_names]


def _same(one: list, other: list) -> bool:
    return all(a == b if isinstance(a, tuple) else torch.equal(a, b) for a, b in zip(one, other))


@functools.cache
def _whole(name: str) -> list:
    with tempfile.TemporaryDirectory() as where:
        _put(name, Path(where))
        return _tensors(_written(name)[0].loader(Path(where)))


@promise(
    "A damaged file of a set with sums is named, or the data are the same",
    st.tuples(st.sampled_from(WITH_SUMS), damages, st.integers(0, 99)),
    cases=1000,
    sample=15,
)
def a_damaged_file_with_a_sum(case, folder):
    name, damage, which = case
    path = _put(name, folder, damage, which)
    before = path.read_bytes()
    found = refused(_written(name)[0].loader, folder, naming=path)
    assert found is None or _same(_tensors(found), _whole(name))
    assert path.read_bytes() == before
    assert not list(folder.glob("unpacking-*"))


@promise(
    "A damaged file of a set without sums is named, or gives numbers of the right kind",
    st.tuples(st.sampled_from((*WITH_SUMS, "tiny-imagenet")), damages, st.integers(0, 99)),
    cases=1000,
    sample=15,
)
def a_damaged_file_without_a_sum(case, folder):
    name, damage, which = case
    _put(name, folder, damage, which)
    tiny = _written(name)[0]
    found = refused(tiny.loader, folder, checksum=False, naming=folder)
    if found is not None:
        expected = _whole(name)
        for tensor, one in zip(_tensors(found)[:4], expected):
            assert (tensor.shape, tensor.dtype) == (one.shape, one.dtype)
        assert max(found.train[1]) < found.classes


@functools.cache
def _graph():
    small, seen = _written("planetoid")[0], []
    content = planetoid._content
    try:
        planetoid._content = lambda *parts: seen.append(content(*parts)) or seen[-1]
        with tempfile.TemporaryDirectory() as where:
            _put("planetoid", Path(where))
            planetoid.load(replace(small.spec, content="x"), Path(where))
    finally:
        planetoid._content = content
    return replace(small.spec, content=seen[0])


@promise(
    "A damaged file of a graph is named or warned of, or the graph is the same",
    st.tuples(damages, st.integers(0, 99)),
    cases=600,
    sample=20,
)
def a_damaged_graph(case, folder):
    spec, warned = _graph(), []
    _put("planetoid", folder, *case)
    warning = planetoid.log.warning
    try:
        planetoid.log.warning = lambda *line: warned.append(line)
        found = refused(planetoid.load, spec, folder, naming=folder)
    finally:
        planetoid.log.warning = warning
    assert found is None or warned or _same(_tensors(found), _whole("planetoid"))


# Pickles that would run code

TARGETS = ("posix.system", "builtins.eval", "builtins.exec", "os.mkdir", "builtins.open", "io.open")
TARGETS += ("numpy.load", "torch.load", "torch.hub.load", "subprocess.Popen", "pathlib.Path.touch")
TARGETS += ("builtins.getattr", "builtins.__import__", "numpy.ndarray.tofile", "shutil.copy")


class _Calls:
    def __init__(self, module, name, arguments):
        self.call = module, name, arguments

    def pickled(self, protocol: int) -> bytes:
        module, name, arguments = self.call
        text = pickle.dumps(arguments, protocol)
        start = 2 if protocol > 1 else 0
        start += 9 * (protocol > 3 and text[2:3] == b"\x95")
        call = f"c{module}\n{name}\n".encode() + text[start:-1]
        return text[: 2 * (protocol > 1)] + call + b"R."


def _archive(content: bytes) -> bytes:
    """A checkpoint with another pickle inside."""
    made, changed = io.BytesIO(), io.BytesIO()
    torch.save({"model": {"a": torch.ones(2)}}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(changed, "w") as new:
        for member in old.infolist():
            inside = content if member.filename.endswith("data.pkl") else old.read(member)
            new.writestr(member.filename, inside)
    return changed.getvalue()


@promise(
    "A pickle that asks for code is refused by name, and runs nothing",
    st.tuples(
        st.sampled_from(TARGETS),
        st.integers(0, 5),
        st.sampled_from(["checkpoint", "plain checkpoint", "cifar", "planetoid"]),
    ),
    cases=360,
    sample=25,
)
def a_pickle_that_runs(case, folder):
    target, protocol, where = case
    module, _, name = target.rpartition(".")
    evidence = folder / "ran"
    arguments = (f"touch {evidence}",) if name == "system" else (str(evidence), "w")
    content = _Calls(module, name, arguments).pickled(protocol)
    if "checkpoint" in where:
        path = folder / "best.pt"
        path.write_bytes(_archive(content) if where == "checkpoint" else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, of the protocol
            found = refused(checkpoint.load, path, naming=path)
    elif where == "cifar":
        _put("cifar10", folder)
        path = folder / "cifar-10-batches-py/data_batch_2"
        path.write_bytes(content)
        found = refused(_written("cifar10")[0].loader, folder, checksum=False, naming=path)
    else:
        _put("planetoid", folder)
        path = folder / "planetoid/cora/ind.cora.graph"
        path.write_bytes(content)
        found = refused(planetoid.load, _graph(), folder, naming=path)
    assert found is None
    assert not evidence.exists()


# Archives

PLACES = ("{spec}/data_batch_1", "../escaped", "{root}/escaped", "{spec}/../../escaped", "./a/../x")
PLACES += ("{spec}", "{spec}/data_batch_1/../../../escaped", "C:\\escaped", "a\0b", "x" * 300, "")
MEMBERS = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
MEMBERS += (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)

members = st.lists(
    st.tuples(
        st.sampled_from(PLACES),
        st.sampled_from(MEMBERS),
        st.sampled_from(["..", "/etc", "{root}", "data_batch_1", ""]),
        st.booleans(),
    ),
    max_size=6,
)


@promise(
    "An archive writes nothing outside its set, whatever its names and links",
    st.tuples(members, st.booleans(), st.sampled_from(["tar", "zip"])),
    cases=400,
    sample=20,
)
def a_crafted_archive(case, folder):
    others, whole, kind = case
    name = "cifar10" if kind == "tar" else "tiny-imagenet"
    tiny, content = _written(name)
    root = folder / "in" / "root"
    root.mkdir(parents=True)
    path = root / tiny.spec.archive.name
    content = content if whole else {}
    words = {"spec": tiny.spec.folder, "root": str(folder / "in")}
    if kind == "tar":
        _pack_tar(path, others, content, words)
    else:
        _pack_zip(path, others, content, words)
    packed = path.read_bytes()
    refused(tiny.loader, root, checksum=False, naming=root)
    assert path.read_bytes() == packed
    inside = {p.name for p in root.iterdir()}
    assert inside <= {path.name, tiny.spec.folder, f"{tiny.spec.folder}.npz"}, inside
    assert [p.name for p in (folder / "in").iterdir()] == ["root"]
    assert [p.name for p in folder.iterdir()] == ["in"]
    assert not any(p.is_symlink() for p in root.rglob("*"))


def _pack_tar(path: Path, others, content, words) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for place, kind, link, first in others:
            member = tarfile.TarInfo(place.format(**words))
            member.type, member.linkname = kind, link.format(**words)
            if first:
                archive.addfile(member)
        for name, file in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))


def _pack_zip(path: Path, others, content, words) -> None:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for place, kind, link, _ in others:
            member = zipfile.ZipInfo(place.format(**words) or "x")
            if kind == tarfile.SYMTYPE:
                member.external_attr = 0o120777 << 16
            archive.writestr(member, link.format(**words))
        for name, file in content.items():
            archive.writestr(name, file)


# Images

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB", "HSV")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "EPS", "ICO", "PDF")


@functools.cache
def _image(mode: str, form: str) -> bytes | None:
    """An image of noise; None if the format has no such pixels."""
    noise = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    try:
        image = Image.fromarray(noise)
        image = image.convert("L").convert(mode) if mode[0] in "IF" else image.convert(mode)
        image.save(file, form)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


@promise(
    "A damaged or odd image is named, or decoded to one of its size",
    st.tuples(st.sampled_from(MODES), st.sampled_from(FORMATS), st.none() | damages),
    cases=2000,
    sample=60,
)
def an_odd_image(case, folder):
    mode, form, damage = case
    content = _image(mode, form)
    if content is None:
        return
    path = folder / "x.png"
    path.write_bytes(damage.of(content) if damage else content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = refused(files.open_image, path, upright=True, naming=path)
    assert found is None or found.mode == "RGB"
    unknown = form in ("EPS", "ICO", "PDF") or (mode, form) in (("F", "TIFF"), ("F", "PPM"))
    assert damage or (found is None) == unknown


ODD = ("._1.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/1.png", "notes.txt", "1.PNG")
ODD += ("a\nb.png", "a,b.png", "é.png", " .png", "--x.png", "loop", "pipe.png", "gone.png")
ODD += ("sub/1.png",)
CONTENTS = ("image", "empty", "text", "cut", "folder", "small")


@promise(
    "A folder of images with odd files is read or refused by name",
    st.lists(st.tuples(st.sampled_from(ODD), st.sampled_from(CONTENTS)), max_size=4),
    cases=400,
    sample=20,
)
def an_odd_folder(odd, folder_):
    image = _image("RGB", "PNG")
    files_ = {"image": image, "empty": b"", "text": b"hello", "cut": image[:50]}
    files_["small"] = _image("L", "GIF")
    for name in ("a/0.png", "a/9.png", "b/0.png"):
        (folder_ / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder_ / "train" / name).write_bytes(image)
    for name, content in odd:
        path = folder_ / "train/a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        if name == "loop":
            path.symlink_to("..")
        elif name == "gone.png":
            path.symlink_to("nowhere")
        elif name == "pipe.png":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        else:
            path.write_bytes(files_[content])
    try:
        found = folder.load(folder_)
    except UserError as error:
        assert str(folder_) in str(error)
        return
    assert found.class_names == ("a", "b")
    hidden = {name for name, _ in odd if name.startswith(".")}
    assert found.examples >= 3
    assert not any(name in path for path in folder.listing(folder_).all for name in hidden)


def _decode(root: Path) -> decoded.Pixels:
    for number in range(3):
        (root / f"{number}.png").write_bytes(_image("RGB", "PNG"))
        os.utime(root / f"{number}.png", (1e9, 1e9))
    return decoded.decoded(root, ["0.png", "1.png", "2.png"], decoded.Form(8, 3, resize=False))


@promise(
    "A damaged cache of decoded images changes no pixel",
    st.tuples(damages, st.integers(0, 99)),
    cases=400,
    sample=20,
)
def a_damaged_cache(case, folder):
    damage, which = case
    expected = _decode(folder)
    images = expected.images.copy()  # of the file that is damaged now
    paths = sorted((folder / decoded.STORE).iterdir())
    path = paths[which % len(paths)]
    path.write_bytes(damage.of(path.read_bytes()))
    found = _decode(folder)
    assert np.array_equal(found.images, images)
    assert np.array_equal(found.moments, expected.moments)
    assert found.content == expected.content
