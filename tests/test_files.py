"""What a user, a disk or another process does to the files of a run."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from script_runs import MLP, crashing

from ER_DST.main import found_ratio
from startsparse import atomic, beginning, checkpoint, finding, locks, runs
from startsparse.atomic import replacing, write_text
from startsparse.console import log
from startsparse.errors import OptionError, UserError, about, run_script
from startsparse.options import Options
from startsparse.trainer import Trainer
from STR.main import main

TINY_MLP = [*MLP, "--sparse-compute", "off", "--epochs", "2"]


@pytest.fixture
def small(tmp_path, no_pictures, few_images):
    """A function that runs STR/main.py on few images; returns the run folder."""

    def run(*argv, where=tmp_path):
        main([*TINY_MLP, "--log-dir", f"{where}/runs", "--result-dir", str(where), *map(str, argv)])
        return next(where.glob("runs/*/*/seed-1"))

    return run


@pytest.fixture
def interrupted(small, monkeypatch, tmp_path):
    """The folder of a run that stopped after its first epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", crashing("after", 1))
        with pytest.raises(BaseException, match="^$"):
            small()
    return next(tmp_path.glob("runs/*/*/seed-1"))


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- writing --------------------------------------------------------------------------------------


def test_a_file_that_is_replaced_keeps_its_group_and_mode(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    groups = [1] if os.geteuid() == 0 else os.getgroups()
    os.chown(path, -1, groups[-1])
    path.chmod(0o640)
    write_text(path, "new")
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (groups[-1], 0o640)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to("real/a")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"
    assert len(list((tmp_path / "real").iterdir())) == 1


def test_the_longest_name_can_be_replaced(tmp_path):
    path = tmp_path / ("ü" * 127)
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


def test_the_folder_is_synced_after_the_file(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(handle):
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are not known here")
    monkeypatch.setattr(os, "fsync", note)
    write_text(tmp_path / "a", "new")
    assert Path(synced[0]).name.startswith(".a-")
    assert synced[1:] == [str(tmp_path)]


def test_a_pipe_is_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no ordinary file"):
        write_text(tmp_path / "pipe", "new")
    assert (tmp_path / "pipe").is_fifo()


def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space") as error, replacing(tmp_path / "a"):
        pass
    assert about(error.value) == f"{tmp_path}/a: No space left on device; free space"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_no_runtime_error_of_torch(monkeypatch, tmp_path):
    @contextmanager
    def full(*_, **__):
        yield Path("/dev/full")

    monkeypatch.setattr(checkpoint, "replacing", full)
    for size in (1, 10**5):
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_by_rank_0(tmp_path / "a.pt", {"model": {"w": torch.zeros(size)}})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_cannot_be_written_is_one_line(capsys):
    with runs._logging_to(Path("/dev/full")):
        for _ in range(3):
            log.info("a line")
    said, errors_said = capsys.readouterr()
    assert errors_said == ""
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: /dev/full: the log ends here: No space left on device; free space"
    ]


def test_equal_states_make_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        checkpoint.save_by_rank_0(tmp_path / name, {"model": {"w": torch.arange(5)}, "x": [1, "a"]})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


# --- lines ----------------------------------------------------------------------------------------

LINES = {
    "a: File name too long; a name has at most 255 bytes": OSError(errno.ENAMETOOLONG,
                                                                   "File name too long", "a"),
    "a\\nb: Is a directory": IsADirectoryError(errno.EISDIR, "Is a directory", "a\nb"),
    "Connection reset": ConnectionResetError("Connection reset"),
    "OSError": OSError(),
    "out of memory; try a smaller --batch-size or network": MemoryError(),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_an_error_of_the_system_is_one_line(line):
    said: list[str] = []
    with pytest.raises(SystemExit) as stop:
        run_script(Mock(side_effect=LINES[line]), said.append)
    assert (stop.value.code, said) == (1, [f"error: {line}"])


def test_an_end_of_memory_is_one_line():
    said: list[str] = []
    with pytest.raises(SystemExit):
        run_script(lambda: torch.empty(10**15), said.append)
    assert said == ["error: out of memory (tried to allocate 4000000000000000 bytes); try a "
                    "smaller --batch-size or network"]  # fmt: skip


def test_an_error_of_the_program_is_a_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(Mock(side_effect=RuntimeError("shapes")))


def test_ascii_and_closed_streams_take_every_line(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: print("1 ± 2"))
    assert (stop.value.code, out.buffer.getvalue()) == (0, b"1 \\xb1 2\n")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: print("lost"))
    assert stop.value.code == 0
    sys.stdout.close()


# --- run folders ----------------------------------------------------------------------------------


def test_evaluating_needs_no_lock_and_writes_nothing(small, caplog):
    run = small()
    before = content(run)
    with locks.locked(run / ".lock", "x"):
        small("--resume", run, "--evaluate")
    assert content(run) == before
    assert "test accuracy" in caplog.text


def test_a_run_stops_when_its_folder_is_gone(small, tmp_path, monkeypatch):
    record = runs.Run.record

    def remove(run, *args):
        record(run, *args)
        shutil.rmtree(run.folder)

    monkeypatch.setattr(runs.Run, "record", remove)
    with pytest.raises(UserError, match="the run folder was removed or renamed while the run used"):
        small()
    assert not list(tmp_path.glob("runs/*/*/seed-1"))


def test_a_full_disk_says_how_to_go_on(small, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", no_space)
        with pytest.raises(UserError, match="No space left on device; free space, then --resume "
                           f"{tmp_path}/runs/.*/seed-1 continues"):  # fmt: skip
            small()
    run = next(tmp_path.glob("runs/*/*/seed-1"))
    small("--resume", run)
    assert runs.summary(run)


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(beginning, "write_yaml", no_space)
    with pytest.raises(OSError, match="No space"):
        finding.open_run(Options(log_dir=str(tmp_path / "runs")))
    assert not list(tmp_path.glob("runs/*/*/*"))


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_without_locks_one_line_warns_and_the_run_goes_on(
    small, tmp_path, monkeypatch, code, caplog
):
    monkeypatch.setattr(locks.fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))
    monkeypatch.setattr(locks, "_warned", set())
    small()
    (run,) = [r.message for r in caplog.records if "the same run" in r.message]
    assert run.startswith("warning: ")
    assert run.endswith(f"the file system has no locks ({os.strerror(code)}); let no two processes "
                        "train the same run")  # fmt: skip
    assert len(pd.read_csv(tmp_path / "results.csv")) == 1


def test_best_weights_are_no_state_of_a_run(interrupted, small):
    shutil.copy(interrupted / "best.pt", interrupted / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint.pt: holds weights only, as best.pt does"):
        small("--resume", interrupted)


def test_a_run_that_had_begun_does_not_start_again_without_a_word(interrupted, small):
    (interrupted / "checkpoint.pt").unlink()
    (interrupted / "epochs.csv").write_text("epoch\n1\n")
    before = content(interrupted)
    with pytest.raises(UserError, match=r"checkpoint.pt: is gone, and the run cannot continue"):
        small("--resume", interrupted)
    assert content(interrupted).keys() - before.keys() == set()
    (interrupted / "epochs.csv").unlink()  # it had not begun
    small("--resume", interrupted)


CHANGES = {
    "there is no 'position.step'": lambda s: s["position"].pop("step"),
    "there is no 'ledger.dense'": lambda s: s["ledger"].pop("dense"),
    "'history' should be a list": lambda s: s.update(history={}),
    "'history' has 0 epochs, its position is behind 1": lambda s: s.update(history=[], best={}),
    "it stands behind the end of the run": lambda s: s["position"].update(phase=7),
    "'position' is step 3 of 1": lambda s: s["position"].update(step=2),
    "'optimizer': 'momentum_buffer' of parameter 0 is (3,) instead of": lambda s: s["optimizer"][
        "state"
    ][0].update(momentum_buffer=torch.zeros(3)),
    "'hidden.0.weight' has values that are not finite": lambda s: s["model"][
        "hidden.0.weight"
    ].fill_(torch.nan),
    "'hidden.0.weight_mask' is torch.uint8 instead of torch.bool": lambda s: s["model"].update(
        {"hidden.0.weight_mask": s["model"]["hidden.0.weight_mask"].to(torch.uint8)}
    ),
    "'hidden.0.weight_mask' has values that are neither 0 nor 1": lambda s: s["model"][
        "hidden.0.weight_mask"
    ].view(torch.uint8).fill_(2),
    "'best.valid_accuracy' should be a share": lambda s: s["best"].update(valid_accuracy=2.0),
    "'clock.seconds' should be a finite number from 0 on": lambda s: s["clock"].update(
        seconds=float("inf")
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", CHANGES)
def test_wrong_content_of_a_checkpoint_is_named(interrupted, small, message):
    path = interrupted / "checkpoint.pt"
    state = checkpoint.load(path)
    CHANGES[message](state)
    checkpoint.save_by_rank_0(path, state)
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        small("--resume", interrupted)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"requested": "0.2"}', "[" * 10**5])
@pytest.mark.parametrize("name", ["summary.json", "data.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    read = runs.summary if name == "summary.json" else runs.images
    with pytest.raises(UserError, match=rf"{name}: is damaged") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"flops": null}', "\x00"])
def test_a_damaged_search_is_named(tmp_path, text):
    (tmp_path / "ratios.json").write_text('{"fc": 0.1}')
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(UserError, match=r"--resume: .*search.json is damaged; start the run anew"):
        found_ratio(tmp_path)
    (tmp_path / "search.json").write_text('{"flops": 3}')
    assert found_ratio(tmp_path) == ({"fc": 0.1}, 3.0)
    (tmp_path / "ratios.json").unlink()
    with pytest.raises(UserError, match=r"--resume: .*ratios.json does not exist"):
        found_ratio(tmp_path)


def test_empty_options_are_no_options(interrupted, small):
    (interrupted / "options.yaml").write_text("")
    with pytest.raises(OptionError, match=r"--resume: .*options.yaml is empty"):
        small("--resume", interrupted)


# --- paths ----------------------------------------------------------------------------------------


def test_a_run_finds_its_table_from_another_folder(tmp_path, monkeypatch, no_pictures, few_images):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with monkeypatch.context() as patch, pytest.raises(BaseException, match="^$"):
        patch.setattr(Trainer, "save", crashing("after", 1))
        main([*TINY_MLP, "--result-dir", "tables"])
    (run,) = (tmp_path / "here").glob("runs/*/*/seed-1")
    monkeypatch.chdir(tmp_path / "there")
    main(["--resume", str(run)])
    assert len(pd.read_csv(tmp_path / "here" / "tables" / "results.csv")) == 1
    assert not list((tmp_path / "there").iterdir())
    options = runs.read_values(run / "options.yaml")
    assert options["result_dir"] == f"{tmp_path}/here/tables"
    assert options["log_dir"] == f"{tmp_path}/here/runs"


def test_a_home_stands_for_its_folder(tmp_path, monkeypatch, no_pictures, few_images):
    monkeypatch.setenv("HOME", str(tmp_path))
    main([*TINY_MLP, "--log-dir=~/runs", "--result-dir", "~"])
    assert (tmp_path / "results.csv").exists()
    (run,) = tmp_path.glob("runs/*/*/seed-1")
    main([f"--resume=~/{run.relative_to(tmp_path)}"])


PATHS = ["--data", "--log-dir", "--result-dir", "--resume", "--config", "--er-sparsity-file",
         "--start-from", "--target-expt-name"]  # fmt: skip


@pytest.mark.parametrize("option", PATHS)
def test_an_unknown_user_is_one_line(option):
    with pytest.raises(OptionError) as error:
        main([*MLP, option, "~nosuch/x"])
    end = "'~nosuch/x': there is no user 'nosuch'; ./~ begins a name with ~"
    assert str(error.value) == f"{option}: {end}"
    with pytest.raises(OptionError, match="^STARTSPARSE_DATA: '~nosuch'"), \
            pytest.MonkeyPatch.context() as patch:  # fmt: skip
        patch.setenv("STARTSPARSE_DATA", "~nosuch")
        main(MLP)


def test_a_name_that_is_too_long_is_an_option_error(tmp_path):
    said: list[str] = []
    with pytest.raises(SystemExit) as stop:
        run_script(partial(main, ["--resume", "x" * 300]), said.append)
    assert (stop.value.code, len(said)) == (2, 1)
    assert "File name too long" in said[0]


@pytest.mark.skipif(sys.platform != "linux", reason="of locales by Linux's rules")
def test_files_are_utf_8_whatever_the_locale(tmp_path):
    code = (
        "from startsparse import errors, finding, runs; from startsparse.options import Options\n"
        "def main():\n"
        f"    with finding.open_run(Options(log_dir={str(tmp_path)!r}, mirror={'größe'!a})):\n"
        f"        runs.log.warning({'± 1'!a})\n"
        "errors.run_script(main)"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | ascii_only, capture_output=True
    )
    (run,) = tmp_path.glob("*/*/seed-1")
    assert "± 1" in (run / "log.txt").read_text(encoding="utf-8")
    assert runs.read_values(run / "options.yaml")["mirror"] == "größe"
    assert json.loads((run / "environment.json").read_text(encoding="utf-8"))
