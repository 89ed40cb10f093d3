"""Files of a data set: fetched where missing, checked by MD5 if known, never half-written."""

import gzip
import hashlib
import posixpath
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from startsparse.atomic import replacing
from startsparse.errors import UserError, reason
from startsparse.reading import LARGEST, read_bytes, regular

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 30  # seconds without an answer

# What PIL may take a file for; among its other formats is EPS, which it hands to Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class File:
    """A published file: its name, and the MD5 of its bytes in 32 hex digits ("" if unpublished)."""

    name: str
    md5: str = ""


def read(path: Path, md5: str) -> bytes:
    """The bytes of ``path``; raises `UserError` where their MD5 is not ``md5``, if there is one."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    if md5:
        _compare(path, hashlib.md5(data).hexdigest(), md5)
    return data


def check(path: Path, md5: str) -> None:
    """Raise `UserError` where the MD5 of ``path`` differs; for files too large for `read`."""
    digest = hashlib.md5()
    try:
        regular(path)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    _compare(path, digest.hexdigest(), md5)


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{path}: damaged or another file: expected MD5 {expected}, found {found}; "
            "delete it and run again to fetch it, or use a re-encoded copy with --no-checksum"
        )


def fetch(url: str, path: Path, md5: str) -> None:
    """Download ``url`` to ``path``, which appears only complete and with the right MD5.

    Without an MD5 ("") only the length that the server announces is checked. Raises `UserError`
    where there is no network, no such file, or another MD5.
    """
    digest, size = hashlib.md5(), 0
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
            replacing(path) as part,
            part.open("wb") as file,
            tqdm(
                total=int(answer.headers.get("Content-Length") or 0) or None,
                desc=path.name,
                unit="B",
                unit_scale=True,
                disable=None,  # no bar in a log file
            ) as bar,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if size > LARGEST:
                    raise ValueError(f"it has more than {LARGEST:,} bytes")
                bar.update(len(chunk))
            length = answer.headers.get("Content-Length") or str(size)
            what, expected, found = "MD5", md5, digest.hexdigest()
            if not md5:
                what, expected, found = "length", length, str(size)
            if found != expected:
                raise UserError(
                    f"{url}: truncated or another file: expected {what} {expected}, found {found}; "
                    "nothing was kept: run again, or fetch it from another place with --mirror"
                )
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        raise UserError(
            f"{path}: missing, and fetching it from {url} failed ({reason(error)}): put it there "
            "yourself, name another place with --mirror, or use --set digits, which needs no file"
        ) from error


def present(root: Path, file: File, url: str, mirror: str) -> Path:
    """The path of ``root/file.name``, fetched from the folder ``mirror`` (or ``url``) if missing.

    An existing file is not checked here.
    """
    path = root / file.name
    if not path.exists():
        fetch(f"{(mirror or url).rstrip('/')}/{file.name}", path, file.md5)
    return path


def unpacked(
    root: Path,
    names: Sequence[str],
    archive: File,
    url: str,
    mirror: str,
    *,
    largest: int,
    checksum: bool = True,
    extra: Sequence[str] = (),
) -> None:
    """Make sure that ``root/name`` exists for all ``names``, which ``archive`` holds.

    Existing files and folders are left alone. Missing ones come from ``root/archive.name``, which
    is fetched if missing, and stays. Each appears only complete.

    Args:
        names: files; those of a zip may be folders.
        largest: bytes that the archive may unpack to; one with more is refused.
        checksum: whether an archive that was there has to be the published one.
        extra: files that nobody misses, unpacked with the others if the archive has them.
    """
    if all((root / name).exists() for name in names):
        return
    path = present(root, archive, url, mirror)
    if checksum:
        check(path, archive.md5)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix="unpacking-") as folder:
            _extract(path, folder, [*names, *extra], largest)
            for name in (*names, *extra):
                unpacked, target = Path(folder, name), root / name
                if not target.exists() and (name in names or unpacked.exists()):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _move(unpacked, target)
    except Exception as error:  # a damaged archive raises anything
        raise UserError(f"{path}: cannot be unpacked in {root} ({reason(error)})") from error


def _extract(path: Path, folder: str, names: Sequence[str], largest: int) -> None:
    """Unpack ``names`` into ``folder``, and nothing outside it, and no more than ``largest``."""
    regular(path)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            inside = tuple(f"{name}/" for name in names)
            wanted = [m for m in archive.infolist() if m.filename.startswith(inside)]
            if sum(member.file_size for member in wanted) > largest:
                raise ValueError(f"it unpacks to more than {largest:,} bytes")
            # A zip has no links; this takes roots, drives and .. out of the names.
            archive.extractall(folder, wanted)
        return
    # Only files, and only what is asked for: links and other names stay in the archive.
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        bounded = _Bounded(file, largest)
        with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                if name in names and member.isfile():
                    if member.size > largest:  # of a sparse file, which takes no room in a tar
                        raise ValueError(f"{name} has more than {largest:,} bytes")
                    content = archive.extractfile(member)
                    assert content is not None  # for a file
                    target = Path(folder, name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as written:
                        shutil.copyfileobj(content, written)
        while bounded.read(CHUNK):  # the checksum of gzip comes last
            pass


class _Bounded:
    """A file to read, of which only so many bytes exist; one more is an error."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, largest: int) -> None:
        self._file, self._left, self._largest = file, largest, largest

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {self._largest:,} bytes")
        return data


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError:
        # A folder cannot replace a folder; another process has unpacked the same one meanwhile.
        if not target.is_dir():
            raise


def open_image(path: str | Path, mode: str = "RGB", *, upright: bool = False) -> Image.Image:
    """The decoded image as ``mode``: "RGB", or "L" for grey; raises `UserError` if it is damaged.

    16 bits become 8. Transparent pixels are white. Of an animation it is the first picture.
    ``upright`` turns a photo as its EXIF says.
    """
    try:
        regular(Path(path))
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            image = ImageOps.exif_transpose(image) if upright else image
            if image.mode == "F":
                raise ValueError("its pixels are fractions, and it is not known of what")
            if image.mode.startswith("I"):  # what PIL calls 16 bits; it would cut them off at 255
                image = _eight_bits(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except Exception as error:  # a damaged image raises anything
        raise UserError(f"{path}: cannot be decoded as an image ({reason(error)})") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits with 8, and its transparent shade with an alpha of 0."""
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("its pixels have more than 16 bits")
    grey = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8)))
    return grey


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an upright image; raises `UserError` if it is damaged."""
    return open_image(path, upright=True).size
