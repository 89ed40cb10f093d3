"""Where kernels are built and kept, and what happens where they cannot be."""

import logging
import os
import pwd
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import kernel_cache as kernels
import pytest
import torch
from engine_runs import SHAPE, network

import startsparse
from startsparse import processes
from startsparse.data import decoded
from startsparse.engine import build
from startsparse.engine.compiler import NoKernelsError
from startsparse.engine.compute import Compute

KEPT = "float-*.so"


@pytest.fixture
def cache(tmp_path):
    """The cache, and a good compiler of the kind that a test asks for."""
    folder = tmp_path / "cache"
    with kernels.environment(STARTSPARSE_CACHE=str(folder), CXX=kernels.cxx("good", tmp_path)):
        yield folder


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "not a library"])
def test_a_damaged_library_is_built_anew(damage, cache):
    """Loading a truncated one ended the process by SIGBUS, at every start."""
    kernels.opened()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.unlink()
    if damage == "not a library":  # though its checksum is right
        path.write_bytes(b"text")
        path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}-{build._checksum(path)}.so"))
    else:
        content = {"truncated": whole[:5000], "empty": b"", "other bytes": whole[:-1] + b"\1"}
        path.write_bytes(content[damage])
    assert kernels.works(kernels.opened())
    (path,) = cache.iterdir()
    assert path.read_bytes() == whole


def test_a_build_leaves_the_library_alone_in_the_cache(cache, tmp_path):
    kernels.opened()
    assert len([*cache.iterdir()]) == 1
    before = kernels.runs(tmp_path)
    assert kernels.works(kernels.opened())
    assert kernels.runs(tmp_path) == before > 0


def test_another_version_of_the_compiler_builds_anew(cache, tmp_path):
    kernels.opened()
    script = tmp_path / "a compiler"
    script.write_text(script.read_text().replace("quick 1.0", "quick 1.1"))
    kernels.opened()
    names = [path.name.split("-") for path in cache.iterdir()]
    assert len({name[2] for name in names}) == len(names) == 2  # the key of the compiler


def test_another_libc_or_machine_builds_anew(monkeypatch):
    stem = build._stem(torch.float32)
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "2.0"))
    assert build._stem(torch.float32) != stem


def test_without_a_compiler_any_library_that_fits_will_do(cache, monkeypatch):
    kernels.opened()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.works(kernels.opened())


@pytest.mark.parametrize("kind", ["words", "launcher"])
def test_cxx_may_be_several_words(kind, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", kernels.cxx(kind, tmp_path))
    assert kernels.works(kernels.opened())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "there is no C++ compiler no-such-compiler (set CXX, or install g++)"),
        ("quote", 'CXX: no closing quotation in "g++ \'-O1"'),
        ("no program", "a compiler cannot be started (Exec format error)"),
        ("fails", "a compiler cannot build the kernels: x.cpp:1: error: no such thing"),
        ("latin", "a compiler cannot build the kernels: error: \ufffd\\x1b[1m"),
        ("killed", "a compiler cannot build the kernels: killed by signal 9"),
        ("hangs", "a compiler --version does not answer within 0.3 s (set CXX to another)"),
        ("hangs later", "a compiler has not built the kernels within 0.3 s (set CXX to another"),
        ("writes nothing", "the kernels that were built cannot be loaded"),
        ("full disk", "nor a temporary folder (No space left on device)"),
    ],
)
def test_one_line_says_why_the_compiler_fails(kind, reason, cache, tmp_path):
    with (
        kernels.environment(kind, CXX=kernels.cxx(kind, tmp_path)),
        pytest.raises(NoKernelsError) as error,
    ):
        kernels.opened()
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_a_quote_in_the_flags_is_named(cache, monkeypatch):
    monkeypatch.setenv("STARTSPARSE_CXXFLAGS", "-O1 '")
    with pytest.raises(NoKernelsError, match="^STARTSPARSE_CXXFLAGS: no closing quotation in"):
        kernels.opened()


@pytest.mark.parametrize("how", ["hangs", "interrupted"])
def test_what_the_compiler_has_started_ends_with_it(how, cache, tmp_path, monkeypatch):
    child = tmp_path / "child"
    script = kernels.GOOD.replace("echo >> {folder}/runs", f"sleep 60 & echo $! > {child}; wait")
    monkeypatch.setitem(kernels.SCRIPTS, "hangs later", script)
    cxx = kernels.cxx("hangs later", tmp_path)
    if how == "interrupted":
        sleep = time.sleep

        def interrupt(seconds):
            sleep(seconds)
            if child.exists() and child.read_text():
                raise KeyboardInterrupt

        monkeypatch.setattr(time, "sleep", interrupt)
    expected = KeyboardInterrupt if how == "interrupted" else NoKernelsError
    with kernels.environment("hangs" * (how == "hangs"), CXX=cxx), pytest.raises(expected):
        kernels.opened()
    monkeypatch.undo()
    pid = int(child.read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except OSError:
            break
        if state == "Z":  # nobody waits for it in a container without init
            break
        time.sleep(0.02)
    else:
        pytest.fail("it goes on")
    assert not [*cache.iterdir()]


def test_processes_that_build_at_the_same_time_need_no_lock(cache, tmp_path):
    script = tmp_path / "a compiler"
    script.write_text(script.read_text().replace("#!/bin/sh", "#!/bin/sh\nsleep 0.02"))
    found = []
    threads = [threading.Thread(target=lambda: found.append(kernels.opened())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [kernels.works(one) for one in found] == [True] * 3
    assert len([*cache.iterdir()]) == 1  # with the same bytes, so they have one name


def test_the_next_build_clears_up_after_one_that_was_killed(cache):
    cache.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, old = build._machine(), time.time() - 2 * build._FORGOTTEN
    for name, gone in {
        f"{here}-{dead.pid}-x": True,
        f"{here}-{os.getppid()}-x": False,  # a live build
        f"elsewhere-{dead.pid}-x": False,
        "elsewhere-7-old": True,
        "of-another-kind": False,
    }.items():
        work = cache / f"{build._WORK}{name}"
        work.mkdir()
        (work / "affine.o").write_text("")
        if "old" in name:
            os.utime(work, (old, old))
        kernels.opened()
        for path in cache.glob(KEPT):
            path.unlink()
        assert work.exists() != gone, name


def test_what_is_not_of_the_project_stays(cache):
    cache.mkdir()
    (cache / "float-mine.so").write_text("")
    (cache / "images").mkdir()
    kernels.opened()
    assert {"float-mine.so", "images"} <= {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("where", ["none", "below a file", "noexec"])
def test_where_the_cache_cannot_be_used_kernels_are_built_for_the_run(
    where, cache, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if where == "none":
        monkeypatch.delenv("STARTSPARSE_CACHE")
        monkeypatch.setattr(startsparse.Path, "expanduser", _no_home)
    elif where == "below a file":
        monkeypatch.setenv("STARTSPARSE_CACHE", f"{tmp_path}/file/cache")
    else:
        kernels.opened()
        monkeypatch.setattr(build, "_noexec", lambda path: path == cache)
    before = kernels.runs(tmp_path)
    caplog.clear()
    assert kernels.works(kernels.opened())
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.endswith("this run has kernels of its own; STARTSPARSE_CACHE names another folder")
    assert (kernels.runs(tmp_path) == before) == (where == "noexec")  # there it is copied
    assert not [*tmp_path.glob(f"{build._WORK}*")]


def _no_home(_path):
    raise RuntimeError("Could not determine home directory.")


def test_without_a_place_for_programs_it_is_said(cache, monkeypatch):
    monkeypatch.setattr(build, "_noexec", lambda _: True)
    with pytest.raises(NoKernelsError, match=r"mounted noexec, nor from .*; STARTSPARSE_CACHE"):
        kernels.opened()


def test_an_account_without_a_home_has_no_cache_unless_it_names_one(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "STARTSPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert startsparse.cache_folder() is None
    monkeypatch.setenv("STARTSPARSE_CACHE", "~/cache")
    assert startsparse.cache_folder() is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARTSPARSE_CACHE", "cache")
    assert startsparse.cache_folder() == tmp_path / "cache"


def test_without_a_cache_images_are_decoded_into_memory(monkeypatch, tmp_path):
    (tmp_path / decoded.STORE).write_text("")  # nothing can be kept there
    monkeypatch.setattr(startsparse, "cache_folder", lambda: None)
    assert decoded._store(tmp_path) is None


def test_the_compiler_writes_beside_the_library_only(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    script = tmp_path / "a compiler"
    script.write_text(script.read_text() + 'echo "$TMPDIR $LC_ALL" >> ' + f"{tmp_path}/said\n")
    kernels.opened()
    (said,) = {line.split()[1] for line in (tmp_path / "said").read_text().splitlines()}
    places = {line.split()[0] for line in (tmp_path / "said").read_text().splitlines()}
    assert said == "C"
    assert all(place.startswith(f"{cache}/{build._WORK}") for place in places)


def test_all_processes_compute_masked_if_one_has_no_kernels(monkeypatch, caplog):
    """One that computed sparsely would wait for ever for what the other does not ask."""
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setattr(processes, "all_reduce", lambda sums: sums + 1)
    model = network("mlp")
    assert Compute(model, model, mode="on", shape=SHAPE).form is None
    assert caplog.messages[-1] == "sparse compute: off, another process of this run has no kernels"
