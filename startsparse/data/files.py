"""Files of a data set: fetched where missing, checked by MD5 if known, never half-written."""

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
from urllib.error import URLError

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from startsparse.atomic import replacing
from startsparse.errors import UserError

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 30  # seconds without an answer

# what PIL raises on a damaged file, or on one that would fill the memory
_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class File:
    """A published file: its name, and the MD5 of its bytes in 32 hex digits ("" if unpublished)."""

    name: str
    md5: str = ""


def reason(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def read(path: Path, md5: str) -> bytes:
    """The bytes of ``path``; raises `UserError` where their MD5 is not ``md5``, if there is one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    if md5:
        _compare(path, hashlib.md5(data).hexdigest(), md5)
    return data


def check(path: Path, md5: str) -> None:
    """Raise `UserError` where the MD5 of ``path`` differs; for files too large for `read`."""
    digest = hashlib.md5()
    try:
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
    checksum: bool = True,
    extra: Sequence[str] = (),
) -> None:
    """Make sure that ``root/name`` exists for all ``names``, which ``archive`` holds.

    Existing files and folders are left alone. Missing ones come from ``root/archive.name``, which
    is fetched if missing, and stays. Each appears only complete.

    Args:
        names: files; those of a zip may be folders.
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
            _extract(path, folder, [*names, *extra])
            for name in (*names, *extra):
                unpacked, target = Path(folder, name), root / name
                if not target.exists() and (name in names or unpacked.exists()):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _move(unpacked, target)
    except Exception as error:  # a damaged archive raises anything
        raise UserError(f"{path}: cannot be unpacked in {root} ({reason(error)})") from error


def _extract(path: Path, folder: str, names: Sequence[str]) -> None:
    """Unpack at least ``names`` into ``folder``, and nothing outside it."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)  # takes roots, drives and .. out of the names
        return
    # Only what is asked for: Python before 3.10.12 cannot filter links and names of a tar.
    with tarfile.open(path) as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if name in names and (content := archive.extractfile(member)):
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError:
        # A folder cannot replace a folder; another process has unpacked the same one meanwhile.
        if not target.is_dir():
            raise


def open_image(path: str | Path, mode: str = "RGB", *, upright: bool = False) -> Image.Image:
    """The decoded image as ``mode``: "RGB", or "L" for grey; raises `UserError` if it is damaged.

    16 bits become 8. Transparent pixels are white. ``upright`` turns a photo as its EXIF says.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image) if upright else image
            if image.mode.startswith("I"):  # what PIL calls 16 bits; it would cut them off at 255
                wide = np.asarray(image).astype(np.int64)
                image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except _DAMAGED as error:
        raise UserError(f"{path}: cannot be decoded as an image ({reason(error)})") from error


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an upright image; raises `UserError` if it is damaged."""
    return open_image(path, upright=True).size
