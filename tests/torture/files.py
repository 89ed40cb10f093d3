"""Files of a run."""

import contextlib
import io
import os
import shutil
import subprocess
import warnings
import zipfile
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import Mock

import pytest
import torch
from hypothesis import strategies as st

import ER_DST.main
import ER_SLT.main
import STR.main
from startsparse import checkpoint, finding, plots, results
from startsparse.atomic import replacing, write_text
from startsparse.errors import UserError, run_script
from startsparse.trainer import Trainer
from torture.promises import promise

SCRIPTS = {"STR": STR.main.main, "ER_DST": ER_DST.main.main, "ER_SLT": ER_SLT.main.main}
SMALL = [
    *("--config", "", "--arch", "mlp", "--width", "4", "--batch-size", "500"),
    *("--sparse-compute", "off", "--epochs", "2"),
]
MORE = {
    "STR": ["--threshold-list", "0.1", "--final-prune-epoch", "1"],
    "ER_DST": ["--sparse", "--method", "GraNet", "--update-frequency", "2"],
    "ER_SLT": ["--levels", "2"],
}


def in_process(*argv: object, script: str = "") -> tuple[int, list[str]]:
    """Exit code and error lines of a small run, or of one that is resumed.

    Other errors are raised. No picture is drawn, which takes longer than the run.

    Args:
        script: with levels and moving masks; "": STR/main.py with a mask that stays.
    """
    main = SCRIPTS[script or "STR"]
    words = [*([] if "--resume" in argv else [*SMALL, *MORE.get(script, [])]), *map(str, argv)]
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(plots, "plot_run_by_rank_0", lambda *_: None)
        with contextlib.redirect_stdout(io.StringIO()):
            code = 0
            try:
                run_script(partial(main, words), said.append)
            except SystemExit as stop:
                code = int(stop.code or 0)
    assert code or not said
    return code, said


def places(folder: Path) -> list[str]:
    return ["--log-dir", f"{folder}/runs", "--result-dir", str(folder)]


def run_folder(folder: Path) -> Path:
    (found,) = folder.glob("runs/*/*/seed-1")
    return found


@cache
def finished(script: str = "") -> Path:
    """The folder of a run that is finished; it is copied, not changed."""
    folder = Path(mkdtemp()).resolve()
    assert in_process(*places(folder), script=script) == (0, [])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder that hold anything."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@promise("A write that fails leaves the old file", st.binary(max_size=64), cases=100, sample=5)
def a_failed_write(content, folder):
    path = folder / "file"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyError), replacing(path) as temporary:
        temporary.write_bytes(content)
        raise KeyError
    assert path.read_bytes() == b"old"
    assert [p.name for p in folder.iterdir()] == ["file"]


@promise(
    "Files have the mode that umask gives; one that is replaced keeps its own",
    st.tuples(st.integers(0, 0o777), st.none() | st.integers(0o400, 0o777), st.booleans()),
    cases=1000,
    sample=20,
)
def modes(case, folder):
    umask, before, link = case
    path = folder / "file"
    if before is not None:
        path.write_bytes(b"old")
        path.chmod(before)
    if link:
        (folder / "link").symlink_to("file")
    umask &= ~0o600  # without these, its owner could not read it
    usual = os.umask(umask)
    try:
        write_text(folder / ("link" if link else "file"), "new")
    finally:
        os.umask(usual)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o7777 == (0o666 & ~umask if before is None else before)
    assert sorted(p.name for p in folder.iterdir()) == ["file", *["link"] * link]
    assert (folder / "link").is_symlink() == link


NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda name: name not in (".", "..") and not name.startswith("~"))


@promise(
    "Folders of runs and results may have any name, or it is refused by one line",
    NAMES,
    cases=200,
    sample=3,
)
def names(name, folder):
    there = folder / name
    try:
        there.mkdir()
    except OSError:  # the file system takes no such name
        return
    code, said = in_process("--epochs", 1, *places(there))
    if code:  # what no table can hold, such as a line break
        assert (code, len(said)) == (2, 1)
        return
    run = run_folder(there)
    assert len(results.read_runs(there / "results.csv")) == 1
    assert in_process("--resume", run, "--evaluate") == (0, [])


DAMAGES = ("flip", "cut", "extend", "zeros", "swap", "repeat", "header")


@st.composite
def damage(draw, path=None):
    """A kind of damage and where, as shares of the length."""
    kind = draw(st.sampled_from(DAMAGES))
    return kind, draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.integers(0, 7))


def damaged(data: bytes, case) -> bytes:
    """The bytes of a file after `damage`."""
    kind, first, second, bit = case
    a, b = sorted((int(first * (len(data) - 1)), int(second * (len(data) - 1))))
    if kind == "header":  # of an archive: a byte among the names and places at its end
        a = max(0, len(data) - 1 - int(first * 2000))
    if kind in ("flip", "header"):
        return data[:a] + bytes([data[a] ^ (1 << bit)]) + data[a + 1 :]
    size = max(1, (b - a) // 2)
    one, other = data[a : a + size], data[b : b + size]
    return {
        "cut": data[:a],
        "extend": data + data[a:b] + b"x",
        "zeros": data[:a] + bytes(b - a) + data[b:],
        "swap": data[:a] + other + data[a + size : b] + one + data[b + size :],
        "repeat": data[:b] + one + data[b:],
    }[kind]


@cache
def sealed() -> bytes:
    """A checkpoint."""
    return (run_folder(finished()) / "checkpoint.pt").read_bytes()


def refused(path: Path) -> None:
    """Fail unless the checkpoint is refused by one line that names it."""
    try:
        checkpoint.load(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
        return
    raise AssertionError(f"{path} was loaded")


@promise("A damaged checkpoint is named", damage(), cases=1000, sample=20)
def damaged_checkpoints(case, folder):
    data = damaged(sealed(), case)
    if data == sealed():
        return
    path = folder / "checkpoint.pt"
    path.write_bytes(data)
    refused(path)
    assert path.read_bytes() == data


@promise(
    "A damaged checkpoint of an older version, without a digest, is read as it was or named",
    damage(),
    cases=1000,
    sample=20,
)
def damaged_older_checkpoints(case, folder):
    whole, path = io.BytesIO(), folder / "a.pt"
    state = {"model": {"w": torch.arange(1000.0), "m": torch.ones(9, dtype=torch.bool)}}
    torch.save(state, whole)
    path.write_bytes(damaged(whole.getvalue(), case))
    try:
        read = checkpoint.load(path)["model"]
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert read.keys() == state["model"].keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in state["model"].items())


KINDS_OF_FILES = st.sampled_from(
    [
        *("nothing", "empty", "folder", "pipe", "device", "zeros", "loop", "text", "foreign zip"),
        *("absolute names", "two entries", "pickle", "deep"),
    ]
)


@promise("What is no checkpoint is named, without waiting", KINDS_OF_FILES, cases=100, sample=13)
def no_checkpoints(kind, folder):
    path = folder / "a.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("device", "zeros", "loop"):
        path.symlink_to({"device": "/dev/tty", "zeros": "/dev/zero", "loop": path}[kind])
    elif kind in ("foreign zip", "absolute names", "two entries"):
        name = "/data.pkl" if kind == "absolute names" else "data.pkl"
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the second entry has the name of the first
            for _ in range(1 + (kind == "two entries")):
                archive.writestr(name, b"\x80\x02}.")
    elif kind != "nothing":
        bodies = {"empty": b"", "text": b"hello", "pickle": b"\x80\x02}.", "deep": b"(" * 10**5}
        path.write_bytes(bodies[kind])
    refused(path)


FILES = ("checkpoint.pt", "best.pt", "options.yaml", "summary.json", "data.json", "epochs.csv")
FILES += ("environment.json", "density.csv", "layers.json", "log.txt", "")
OF_RUNS = st.tuples(
    st.sampled_from(FILES[:-1]),
    st.sampled_from(("damage", "damage", "damage", "empty", "delete", "folder")),
    damage(),
    st.booleans(),
)


@promise(
    "A damaged or missing file of a run folder is named, or does not matter; nothing is "
    "overwritten by another run",
    OF_RUNS,
    cases=200,
    sample=4,
)
def damaged_runs(case, folder):
    name, kind, where, done = case
    shutil.copytree(finished(), folder, dirs_exist_ok=True)
    run = run_folder(folder)
    if not done and name != "summary.json":
        (run / "summary.json").unlink()
    path = run / name
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "delete":
        path.write_bytes(b"" if kind == "empty" else damaged(data, where))
    before = content(run)
    code, said = in_process("--resume", run, *places(folder))
    if code:
        assert len(said) == 1
        after = content(run)
        changed = {n for n in before if before[n] != after.get(n)}
        assert changed <= {"log.txt"}
    elif not done:
        weights = checkpoint.load(run / "best.pt")["model"]
        right = checkpoint.load(run_folder(finished()) / "best.pt")["model"]
        assert all(torch.equal(weights[name], right[name]) for name in right)


VALUES = (None, "x", -1, 10**9, 1.5, float("nan"), float("inf"), [], [{}], {}, {"x": 1}, True)
VALUES += (torch.tensor(3), torch.full((4,), float("nan")), b"x")


def leaves(value, path=()):
    """The places of everything in a checkpoint."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list) else parts
    for name, part in parts:
        yield from leaves(part, (*path, name))


@cache
def half_way() -> Path:
    """The folder of a run that stands after the first of its two epochs; it is copied."""
    folder = Path(mkdtemp()).resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "write_tables", Mock(side_effect=OSError(5, "stop")))
        code, _ = in_process(*places(folder))
    assert code == 1
    return folder


@promise(
    "A checkpoint with wrong content is named, or the run goes on",
    st.tuples(st.integers(0, 10**6), st.sampled_from((..., *VALUES))),  # ...: the part is missing
    cases=400,
    sample=5,
)
def wrong_contents(case, folder):
    number, value = case
    shutil.copytree(half_way(), folder, dirs_exist_ok=True)
    path = run_folder(folder) / "checkpoint.pt"
    part = state = checkpoint.load(path)
    parts = list(leaves(state))
    *place, name = parts[number % len(parts)]
    for step in place:
        part = part[step]
    if value is ...:
        del part[name]
    else:
        part[name] = value
    checkpoint.save_by_rank_0(path, state)
    before = path.read_bytes()
    code, said = in_process("--resume", path.parent, *places(folder))
    if code:
        assert (code, len(said)) == (1, 1)
        starts = (f"error: {path}: ", "error: --resume: ")  # the latter of its options
        assert said[0].startswith(starts), (place, name, said)
        assert path.read_bytes() == before
    elif place or name not in ("images", "options"):  # older versions had none
        right = checkpoint.load(run_folder(finished()) / "best.pt")["model"]
        weights = checkpoint.load(path.with_name("best.pt"))["model"]
        assert all(torch.equal(weights[n], right[n]) for n in right), (place, name)


@cache
def may_mount() -> bool:
    """Whether this user may mount a small disk."""
    folder = mkdtemp()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


@contextlib.contextmanager
def disk(folder: Path, size: int):
    """Mount a disk of ``size`` KiB on ``folder``; yields a function that resizes it."""
    folder.mkdir()
    if not may_mount():
        pytest.skip("may not mount a small disk")
    mount = partial(subprocess.run, check=True)
    mount(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder])
    try:
        yield lambda size: mount(["mount", "-o", f"remount,size={size}k", folder])
    finally:
        mount(["umount", folder])


@promise(
    "A full disk is one line; with space the run goes on as the same run",
    st.tuples(st.sampled_from(sorted(SCRIPTS)), st.integers(1, 80).map(lambda n: 4 * n)),
    cases=240,
    sample=3,
)
def full_disks(case, folder):
    script, size = case
    with disk(folder / "disk", size) as resize:
        there = folder / "disk"
        with pytest.MonkeyPatch.context() as patch:  # others fill the disk after the start
            patch.setattr(finding, "check_room", lambda *_: None)
            code, said = in_process(*places(there), script=script)
        if code == 0:
            return
        assert len(said) == 1
        # What is not there after the checks at the start is an option's fault.
        assert code == 2 or "No space left on device; free space" in said[0], said
        resize(50_000)
        again = list(there.glob("runs/*/*/seed-1"))
        assert not list(there.rglob(".*.pt-*"))
        assert code == 2 or bool(again) == ("--resume" in said[0]), said
        resume = ["--resume", *again][: 2 * len(again)]
        assert in_process(*resume, *places(there), script=script) == (0, [])
        one, right = (content(run_folder(where)) for where in (there, finished(script)))
        for name in right:
            if name.endswith((".pt", ".safetensors")) and name != "checkpoint.pt":  # it has times
                assert one[name] == right[name], name
        assert len(results.read_runs(there / "results.csv")) == 1
