"""Images decoded once: a memory-mapped file of their pixels, found again by their content."""

import hashlib
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from numpy.lib import format as npy
from PIL import Image, ImageOps
from tqdm import tqdm

import startsparse
from startsparse import threads
from startsparse.atomic import remove_leftovers, replacing, write_text
from startsparse.data import files
from startsparse.errors import UserError, reason
from startsparse.reading import read_bytes, strict_json

FORMAT = 1  # raise it when the same images give another content
STORE = ".startsparse"  # in the folder of the images
MODES = {1: "L", 3: "RGB"}  # channels -> what PIL calls them

_NAMES = ("utf-8", "surrogateescape")  # of files, which may be any bytes
_PIECE = 1024  # images that share a checksum
_NAMED = 3  # damaged images that a message names

T = TypeVar("T")
R = TypeVar("R")


class Pixels(NamedTuple):
    """The images of a list.

    Attributes:
        images: uint8 [N, S, S, C]; where it was kept, its pages come from the disk as needed.
        moments: int64 [N, 2, C], the sum and the sum of squares of each image's pixels.
        content: a key of the names and bytes of the images.
    """

    images: np.ndarray
    moments: np.ndarray
    content: str


@dataclass(frozen=True)
class Form:
    """What images are decoded to.

    Attributes:
        size: height and width.
        channels: 3, or 1 for grey.
        resize: bring images of other sizes to it: the shorter side is resized, and the middle is
            cut out. Otherwise they are errors.
    """

    size: int
    channels: int
    resize: bool


def decoded(root: Path, paths: Sequence[str], form: Form) -> Pixels:
    """The images ``root/path``.

    The pixels are kept in ``root/.startsparse``, or where nothing can be written in the cache
    folder, and found again for as long as the names and bytes of the images stay. Where names,
    sizes and times have stayed, the bytes are not read for that.

    Raises:
        UserError: images cannot be decoded, or have another size.
    """
    times = _by_times(root, paths)
    store = _store(root)
    if store is None:
        return _decode(root, paths, form, _by_bytes(root, paths), None)
    with _locked(store):  # other runs wait for the first, which decodes
        listed = store / f"listed-{times}.json"
        content = _listed(listed, times)
        if content is None:
            content = _by_bytes(root, paths)
            with suppress(OSError):  # a full disk only costs time
                write_text(listed, json.dumps(_sealed(times, content)) + "\n")
        kept = _kept(store, content, form, len(paths))
        return kept or _decode(root, paths, form, content, store)


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keep others out of a store; without a lock, where its file system has none, both decode."""
    lock = FileLock(store / ".lock")
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _sealed(times: str, content: str) -> dict[str, str]:
    return {"content": content, "check": hashlib.blake2b(f"{times} {content}".encode()).hexdigest()}


def _listed(path: Path, times: str) -> str | None:
    """The key of images that have stayed as they were; None if it is missing or damaged."""
    try:
        found = strict_json(read_bytes(path))
        return found["content"] if found == _sealed(times, found["content"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(root: Path) -> Path | None:
    """The folder to keep pixels in; None if nothing can be written anywhere."""
    cache = startsparse.cache_folder()
    for store in (root / STORE, *([cache / "images"] if cache else [])):
        try:
            store.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=store):
                return store
        except OSError:
            continue
    return None


def _by_times(root: Path, paths: Sequence[str]) -> str:
    """A key that changes when an image is added, removed, renamed or written again."""
    digest = hashlib.blake2b(f"{FORMAT} {root.resolve()}".encode(*_NAMES), digest_size=16)
    for path in paths:
        try:
            stat = (root / path).stat()
        except OSError as error:
            raise UserError(f"{root / path}: cannot be read ({reason(error)})") from error
        digest.update(f"\n{path} {stat.st_size} {stat.st_mtime_ns}".encode(*_NAMES))
    return digest.hexdigest()


def _by_bytes(root: Path, paths: Sequence[str]) -> str:
    """A key of the names and bytes of the images."""
    digest = hashlib.blake2b(str(FORMAT).encode(), digest_size=16)

    def one(path: str) -> bytes:
        return hashlib.blake2b(_bytes(root / path)).digest()

    for path, hashed in zip(paths, _parallel(one, paths, "reading"), strict=True):
        digest.update(path.encode(*_NAMES) + b"\n" + hashed)
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def _parallel(function: Callable[[T], R], items: Sequence[T], what: str) -> Iterator[R]:
    """The values of ``function``, in order, with a bar. Threads: PIL works outside the lock."""
    bar = tqdm(total=len(items), desc=what, unit=" images", disable=None)
    with ThreadPoolExecutor(threads.cores()) as pool, bar:
        # In pieces: all at once would be held in memory where the reader is slower.
        for first in range(0, len(items), 1024):
            for value in pool.map(function, items[first : first + 1024]):
                yield value
                bar.update()


def _files(store: Path, content: str, form: Form) -> tuple[Path, Path]:
    """Where pixels are kept, and what tells whether they are whole."""
    stem = f"{content}-{form.size}{'-resized' * form.resize}-{form.channels}"
    return store / f"{stem}.npy", store / f"{stem}-sums.npz"


def _kept(store: Path, content: str, form: Form, count: int) -> Pixels | None:
    """The pixels in a store; None if they are missing, or damaged in as much as one bit."""
    pixels, sums = _files(store, content, form)
    try:
        # Copy on write: PyTorch warns of memory that cannot be written.
        images = np.load(pixels, mmap_mode="c", allow_pickle=False)
        with np.load(sums, allow_pickle=False) as file:
            moments, crcs = file["moments"], file["crcs"]  # reading checks the CRCs of these
    except Exception:  # a damaged file raises anything
        return None
    shape = (count, form.size, form.size, form.channels)
    if (images.dtype, images.shape) != (np.uint8, shape) or not images.flags.c_contiguous:
        return None
    pieces = [images[first : first + _PIECE] for first in range(0, count, _PIECE)]
    with ThreadPoolExecutor(threads.cores()) as pool:
        whole = list(pool.map(zlib.crc32, pieces)) == crcs.tolist()
    return Pixels(images, moments, content) if whole else None


def _decode(
    root: Path, paths: Sequence[str], form: Form, content: str, store: Path | None
) -> Pixels:
    """Decode all images, into ``store`` or into memory."""
    moments = np.empty((len(paths), 2, form.channels), np.int64)
    crcs = [0] * -(-len(paths) // _PIECE)
    shape = (len(paths), form.size, form.size, form.channels)

    def images() -> Iterator[np.ndarray]:
        damaged: list[str] = []
        one = partial(_image, root, form)
        for row, image in enumerate(_parallel(one, paths, "decoding")):
            if isinstance(image, UserError):
                damaged.append(str(image))
            elif not damaged:
                wide = image.astype(np.int64)
                moments[row] = wide.sum((0, 1)), (wide * wide).sum((0, 1))
                crcs[row // _PIECE] = zlib.crc32(image.data, crcs[row // _PIECE])
                yield image
        if damaged:
            more = len(damaged) - _NAMED
            raise UserError(
                "; ".join(damaged[:_NAMED])
                + f"; and {more} more" * (more > 0)
                + "; delete what is damaged"
                + ", and bring all to one size with --image-size" * (not form.resize)
            )

    if store is None:
        return Pixels(np.stack(list(images())).reshape(shape), moments, content)
    target, sums = _files(store, content, form)
    try:
        remove_leftovers(store)  # by a process that was killed: no other writes now
        with replacing(target) as part, part.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            npy.write_array_header_2_0(file, header)
            for image in images():
                file.write(image.data)
            with replacing(sums) as small, small.open("wb") as other:
                np.savez(other, moments=moments, crcs=np.array(crcs))
    except OSError as error:
        tqdm.write(f"{target}: not kept ({reason(error)})", file=sys.stderr)
        return _decode(root, paths, form, content, None)
    # Once more if what was written cannot be read back: a store may be a failing disk.
    kept = _kept(store, content, form, len(paths))
    return kept or _decode(root, paths, form, content, None)


def _image(root: Path, form: Form, path: str) -> np.ndarray | UserError:
    """uint8 [S, S, C]; an error is a value, so that all of them can be named."""
    try:
        image = files.open_image(root / path, MODES[form.channels], upright=True)
    except UserError as error:
        return error
    width, height = image.size
    if (width, height) != (form.size, form.size):
        if not form.resize:
            return UserError(
                f"{root / path}: {width} x {height} pixels, not {form.size} x {form.size}"
            )
        image = ImageOps.fit(image, (form.size, form.size), Image.Resampling.BILINEAR)
    return np.array(image).reshape(form.size, form.size, form.channels)
