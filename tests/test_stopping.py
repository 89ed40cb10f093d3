"""Signals and kills: a program ends soon, with one line, and leaves nothing that disturbs."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from script_runs import MLP, ROOT, newest

from startsparse import atomic, beginning, finding, results, stopping
from startsparse.commandline import parse
from startsparse.finding import open_run
from startsparse.stopping import StopSignal
from STR import main as script

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="sends signals")

# A program that does what the line {} says, as our scripts do it; "ready" says that it is there.
PROGRAM = """
import contextlib, os, subprocess, sys, time
from pathlib import Path
from startsparse import errors, stopping, threads
stopping.watch()
threads.fit = lambda: None
def ready():
    print("ready", flush=True)
def library():
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # half a minute, in which no handler is called
{}
"""


def start(body, tmp_path, **environment):
    """The program, when it has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process, tmp_path):
    """Exit code, seconds until the end, and what was said."""
    since = time.monotonic()
    code = process.wait(30)
    return code, time.monotonic() - since, (tmp_path / "stderr").read_text()


WHERE = {
    "importing": "ready()\nwhile True: time.sleep(0.01)",
    "importing, in a library": "ready()\nlibrary()",
    "at work": "def main():\n ready()\n while True: time.sleep(0.01)\nerrors.run_script(main)",
    "swallowed": "def main():\n ready()\n while True:\n  with contextlib.suppress(BaseException): "
    "time.sleep(60)\nerrors.run_script(main)",
    "turned into another error": "def main():\n ready()\n try: time.sleep(60)\n"
    " except BaseException: raise ImportError from None\nerrors.run_script(main)",
}


@unix
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", WHERE)
def test_a_signal_ends_a_program_with_one_line(tmp_path, where, signum):
    process = start(WHERE[where], tmp_path)
    process.send_signal(signum)
    code, seconds, said = end(process, tmp_path)
    assert code == 128 + signum
    assert said == f"error: stopped by {signum.name}\n"
    assert seconds < 5


@unix
@pytest.mark.parametrize("gap", [0.003, 0.05, 0.3])
def test_a_second_signal_ends_it_at_once(tmp_path, gap):
    """Where the first was noted, by a step that lasts long, in a library."""
    body = "def main():\n with stopping.StopSignal():\n  ready()\n  library()\n"
    process = start(f"{body}errors.run_script(main)", tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(gap)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, seconds, said = end(process, tmp_path)
    assert (code, said) == (143, "")
    assert seconds < 1


@unix
def test_warnings_of_slurm_stop_a_program_and_never_end_it_at_once(tmp_path):
    """SIGTERM may follow, while the checkpoint is being saved; a second one ends it at once."""
    body = (
        "def main():\n with stopping.StopSignal() as stop:\n  ready()\n"
        "  while not stop.received: time.sleep(0.01)\n"
        "  ready()\n  time.sleep(3)\n  raise errors.Interrupted(stop.received, 'saved')\n"
        "errors.run_script(main)"
    )
    for last, expected in ((), (138, "error: saved\n")), ((signal.SIGTERM,), (143, "")):
        process = start(body, tmp_path)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "ready\n"
        for signum in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, *last):
            time.sleep(0.05)
            process.send_signal(signum)
        assert end(process, tmp_path)[::2] == expected


@unix
def test_a_program_of_somebody_else_keeps_its_own_handlers_of_warnings():
    def own(*_):
        pass

    before = signal.signal(signal.SIGUSR2, own)
    with StopSignal():
        assert signal.getsignal(signal.SIGUSR2) is own
    signal.signal(signal.SIGUSR2, before)


@unix
def test_in_a_program_of_somebody_else_a_signal_counts_for_its_run_only():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == stopping.requested() == signal.SIGTERM
    assert stopping.requested() == 0


@unix
def test_a_signal_that_was_noted_too_late_is_not_lost(tmp_path):
    body = (
        "def main():\n with stopping.StopSignal():\n  ready()\n  time.sleep(0.5)\n time.sleep(60)\n"
    )
    process = start(f"{body}errors.run_script(main)", tmp_path)
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path)[0] == 143


@unix
def test_what_was_open_is_cleaned_up_and_advice_is_given(tmp_path):
    body = (
        "from startsparse.atomic import replacing\n"
        "def main():\n"
        f" with stopping.advice('go on'), replacing(Path({str(tmp_path / 'file')!r})):\n"
        "  child = subprocess.Popen(['sleep', '60'])\n"
        "  stopping.adopt(child)\n"
        "  print('ready', flush=True)\n  print(child.pid, flush=True)\n"
        "  while True: time.sleep(0.01)\n"
        "errors.run_script(main)"
    )
    process = start(body, tmp_path)
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    code, _, said = end(process, tmp_path)
    assert (code, said) == (143, "error: stopped by SIGTERM; go on\n")
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(child, 0)  # gone once init has waited for it
            if Path(f"/proc/{child}/stat").exists():
                stat = Path(f"/proc/{child}/stat").read_text()
                if stat.rpartition(")")[2].split()[0] == "Z":
                    raise ProcessLookupError


@unix
def test_a_forked_process_has_signals_of_its_own(tmp_path):
    body = (
        "def main():\n"
        " import signal\n"
        " child = os.fork()\n"
        " if not child:\n"
        "  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "  time.sleep(20)\n"
        "  os._exit(0)\n"
        " os.kill(child, signal.SIGTERM)\n"
        " assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM\n"
        " ready()\n"
        "errors.run_script(main)"
    )
    assert end(start(body, tmp_path), tmp_path)[::2] == (0, "")


@unix
def test_ignored_signals_stay_ignored(tmp_path):
    """As nohup ignores SIGHUP, and a shell SIGINT of what runs in the background."""
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    code = f"{ignore}import os, startsparse.stopping as s; s.watch(); os.kill(os.getpid(), 1)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@unix
def test_a_process_of_torchrun_stops_when_torchrun_is_gone(tmp_path):
    parent = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, *sys.argv[1:]])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    body = PROGRAM.format("def main():\n ready()\n time.sleep(60)\nerrors.run_script(main)")
    torchrun = subprocess.Popen(
        [sys.executable, "-c", parent, "-c", body],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x", "RANK": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    pid, ready = int(torchrun.stdout.readline()), torchrun.stdout.readline()
    assert ready == "ready\n"
    torchrun.kill()
    assert torchrun.stdout.read() == ""  # the end of the last process that has it
    torchrun.wait()
    assert not Path(f"/proc/{pid}/stat").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_in_another_thread_signals_are_left_alone():
    """Python lets only the main thread handle them, as in a notebook's server."""
    seen = []

    def use():
        with StopSignal() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [0]


@pytest.mark.parametrize("module", ["export", "report", "sweep", "tabular"])
@unix
def test_modules_that_are_commands_watch_before_they_import(tmp_path, module):
    (tmp_path / "numpy.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", f"startsparse.{module}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")


@pytest.mark.parametrize(
    "path",
    ["STR/main.py", "STR/run_imp.py", "ER_DST/main.py", "ER_SLT/main.py", "ER_SLT/cifar_main.py"],
)
@unix
def test_scripts_watch_before_they_import(tmp_path, path):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")


# --- what kills leave -----------------------------------------------------------------------------


def options(tmp_path, *more):
    folders = ["--log-dir", f"{tmp_path}/runs", "--result-dir", str(tmp_path)]
    return parse(script.STROptions, script.CONFIGS, [*MLP, *folders, *more])


class Killed(BaseException):
    """Nothing can catch it."""


@pytest.mark.parametrize("written", ["environment.json", "options.yaml", "after"])
def test_a_run_that_is_killed_as_it_begins_leaves_no_orphan(tmp_path, monkeypatch, written):
    """Its number is free again, and what it has written goes."""

    def killed(path, text, write=atomic.write_text):
        if path.name == written:
            raise Killed
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(beginning, "write_text", killed)
        patch.setattr(beginning.shutil, "rmtree", lambda *_, **__: None)  # a kill runs no `finally`
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        if written == "after":
            patch.setattr(Path, "rename", lambda *_: exec("raise Killed", {"Killed": Killed}))
        open_run(options(tmp_path))
    assert finding.find_run_by_rank_0(options(tmp_path, "--resume", "auto")) is None
    left = list((tmp_path / "runs/digits/mlp-ConvMask-balanced-0.2").iterdir())
    assert left and all(path.name.startswith(".new-") for path in left)
    with open_run(options(tmp_path)) as run:
        assert run.folder.name == "seed-1"
        assert list(run.folder.parent.iterdir()) == [run.folder]
    assert finding.find_run_by_rank_0(options(tmp_path, "--resume", "auto")) == run.folder


def test_runs_that_begin_at_the_same_time_do_not_disturb_each_other(tmp_path, monkeypatch):
    found, write = [], atomic.write_text

    def meanwhile(path, text):
        write(path, text)
        if path.name == "environment.json" and not found:
            found.append(path)
            with open_run(options(tmp_path)) as run:
                found.append(run.folder.name)

    monkeypatch.setattr(beginning, "write_text", meanwhile)
    with open_run(options(tmp_path)) as run:
        assert (found[1], run.folder.name) == ("seed-1", "seed-1-2")


def test_an_empty_folder_is_used(tmp_path):
    empty = tmp_path / "runs/digits/mlp-ConvMask-balanced-0.2/seed-1"
    empty.mkdir(parents=True)
    assert finding.next_folder(options(tmp_path)) == empty
    with open_run(options(tmp_path)) as run:
        assert run.folder == empty


def test_temporary_files_of_killed_processes_go(tmp_path):
    with open_run(options(tmp_path)) as run:
        folder = run.folder
    (folder / "levels").mkdir()
    (tmp_path / "results.csv").write_text("run\n")
    left = [
        folder / ".checkpoint.pt-0a1b2c3d",
        folder / ".best-12.pt-abcdefgh",
        folder / "levels/.level-1.pt-a_b_c_d_",
        tmp_path / ".results.csv-0a1b2c3d",
    ]
    kept = [folder / "options.yaml", folder / ".lock", tmp_path / ".table.md-0a1b2c3d"]
    for path in (*left, kept[-1]):
        path.write_text("")
    with open_run(options(tmp_path), folder):
        pass
    results.add(tmp_path / "results.csv", [{"run": folder}])
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_a_stopped_run_says_where_it_is(tmp_path, monkeypatch, no_pictures):
    """Outside of an epoch: between the training and the summary."""
    from startsparse import stopping
    from startsparse.trainer import Trainer

    def stop(_):
        monkeypatch.setattr(stopping._program, "first", (0, 0.0))
        stopping._note_first(signal.SIGTERM)
        raise stopping.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(stopping.Stopped):
        patch.setattr(Trainer, "test", stop)
        script.main([*MLP, "--log-dir", f"{tmp_path}/runs", "--result-dir", str(tmp_path)])
    folder = newest(tmp_path)
    assert stopping._program.reason == f"stopped by SIGTERM; --resume {folder} continues"
    stopping._program.__init__()
    script.main(["--resume", str(folder), "--result-dir", str(tmp_path)])
    log = (folder / "log.txt").read_text()
    assert len(re.findall(r"INFO epoch +1 ", log)) == 1  # it was not trained again
    assert (folder / "summary.json").exists()


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """Else the lines of a program whose standard output is closed would go into that file."""
    code = (
        "import os; from startsparse import stopping; stopping.watch(); "
        f"os.write(os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY), b'kept'); "
        "os.write(1, b'lost'); os.write(2, b'lost')"
    )
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_a_lock_that_was_left_before_its_folder_goes(tmp_path):
    left = tmp_path / "runs/digits/mlp-ConvMask-balanced-0.2/.new-0.lock"
    left.parent.mkdir(parents=True)
    left.touch()
    with open_run(options(tmp_path)) as run:
        assert list(run.folder.parent.iterdir()) == [run.folder]
