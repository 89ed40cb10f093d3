"""Sweeps on a cluster: what is submitted, that preempted runs go on, what --status says."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pandas as pd
import pytest
import submitit
from script_runs import ROOT, same

from startsparse import cluster, sweep
from startsparse.errors import Interrupted, OptionError, UserError
from startsparse.remote import Remote
from STR import main as script
from STR import run_imp

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="signals of Linux")

KARATE = ["--", "--set", "karate", "--epochs", "2", "--passes", "1"]
ON_SLURM = ["STR", "--launcher", "slurm"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of the jobs of a fake Slurm; the test works in the folder above."""
    programs = fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(cluster, "_POLL", 0.2)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "slurm/jobs"
    (tmp_path / "slurm/jobs/end").touch()


def until(what, seconds=120):
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sweep_on_a_cluster(slurm, capsys):
    """Queued, seen by another shell, not submitted again, run, and reported."""
    where = ["--partition", "fast", "--time", "2:00:00", "--sbatch", "qos=low", "exclusive"]
    size = ["--gpus-per-run", "0", "--cpus-per-run", "3", "--memory", "4G"]
    argv = [*ON_SLURM, "--seeds", "1", "2", "--jobs", "1", *where, *size]
    (slurm / "hold").touch()
    assert sweep.main([*argv, *KARATE]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 runs submitted as 100\n2 of 2 runs are queued or at work; --status")
    lines = (slurm / "100.sh").read_text().splitlines()
    for line in (
        *("partition=fast", "time=120", "cpus-per-task=3", "mem=4G", "qos=low", "exclusive"),
        *("array=0-1%1", "requeue", "signal=USR2@120", "open-mode=append", "job-name=startsparse"),
    ):
        assert f"#SBATCH --{line}" in lines
    assert "gpus" not in (slurm / "100.sh").read_text()

    assert sweep.main([*argv, "--status", *KARATE]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "state   epochs  run",
        "queued     0/2  gcn-ConvMask-balanced-0.5, seed 1",
        "queued     0/2  gcn-ConvMask-balanced-0.5, seed 2",
        "2 queued",
    ]
    assert sweep.main([*argv, *KARATE]) == 0
    assert "submitted" not in capsys.readouterr().out

    (slurm / "hold").unlink()
    assert sweep.main([*argv, "--wait", *KARATE]) == 0
    assert "| 2 | " in capsys.readouterr().out
    assert list(pd.read_csv("results/sweep/results.csv")["seed"]) == [1, 2]
    assert (slurm / "100_0").read_text() == "COMPLETED"
    assert sweep.main([*argv, "--status", *KARATE]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 finished"
    assert len(list(slurm.glob("*.sh"))) == 1


LONG = ["--set", "digits", "--config", "", "--arch", "mlp", "--width", "16", "--batch-size", "256",
        "--epochs", "200", "--sparse-compute", "off"]  # fmt: skip


def test_preempted_it_goes_on_as_the_same_run(slurm, monkeypatch, capsys):
    """Warned by SIGUSR2, which some clusters send to the run, too; then by SIGTERM; then killed."""
    argv = [*ON_SLURM, "--gpus-per-run", "0", "--", *LONG]
    assert sweep.main(argv) == 0
    log = Path("runs/sweep/mlp-ConvMask-balanced-0.2-seed-1.log")

    def epochs():
        said = log.read_text() if log.exists() else ""
        return list(map(int, re.findall(r"^epoch +(\d+) ", said, re.MULTILINE)))

    def stop(*signals, of_run=0):
        already = len(epochs())
        until(lambda: len(epochs()) > already)
        number = slurm / "100.pid"
        before = number.stat().st_mtime_ns
        if of_run:
            child = subprocess.check_output(["pgrep", "--parent", number.read_text()])
            os.kill(int(child), of_run)
        for signum in signals:
            subprocess.check_call(["scancel", f"--signal={int(signum)}", "100"])
        until(lambda: number.stat().st_mtime_ns > before)

    stop(signal.SIGUSR2, of_run=signal.SIGUSR2)
    stop(signal.SIGTERM, signal.SIGUSR2)
    assert log.read_text().count("error: stopped by SIGUSR2 before epoch") == 2
    capsys.readouterr()
    assert sweep.main([*argv[:5], "--wait", *argv[5:]]) == 0
    assert "| 1 | " in capsys.readouterr().out
    assert log.read_text().count("resumed at epoch") == 2
    assert epochs() == list(range(1, 201))  # none was trained twice

    monkeypatch.setattr("startsparse.plots.plot_run_by_rank_0", lambda *_: None)
    script.main([*LONG, "--log-dir", "whole", "--result-dir", "whole"])
    run = next(Path("runs/sweep").glob("digits/*/seed-1"))
    assert same(run, next(Path("whole").glob("digits/*/seed-1")))


def test_what_fails_is_said_and_submitted_again(slurm, capsys):
    argv = [*ON_SLURM, "--gpus-per-run", "0", "--wait", "--seeds", "1"]
    blocked = Path("runs/sweep/karate/gcn-ConvMask-balanced-0.5")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")  # where the run folder has to be
    assert sweep.main([*argv, *KARATE]) == 1
    assert "error: gcn-ConvMask-balanced-0.5, seed 1 failed; see " in capsys.readouterr().err
    assert (slurm / "100").read_text() == "FAILED"
    assert sweep.main([*argv[:-3], *argv[-2:], "--status", *KARATE]) == 0
    assert capsys.readouterr().out.endswith("1 failed\n")
    blocked.unlink()
    assert sweep.main([*argv, *KARATE]) == 0
    assert (slurm / "101").read_text() == "COMPLETED"


def test_a_signal_ends_the_waiting_and_not_the_jobs(slurm, monkeypatch):
    (slurm / "hold").touch()
    argv = [*ON_SLURM, "--gpus-per-run", "0", *KARATE]
    assert sweep.main(argv) == 0
    states, calls = cluster.states, []

    def looking(jobs):
        calls.append(1)
        if len(calls) == 3:  # the first is before it submits
            os.kill(os.getpid(), signal.SIGINT)
        return states(jobs)

    monkeypatch.setattr(cluster, "states", looking)
    with pytest.raises(Interrupted, match="^stopped; the jobs go on") as stop:
        sweep.main([*argv[:5], "--wait", *argv[5:]])
    assert stop.value.exit_code == 130
    assert (slurm / "100").read_text() == "PENDING"


def test_sbatch_that_refuses_is_one_line(slurm):
    argv = [*ON_SLURM, "--partition", "nosuch", *KARATE]
    with pytest.raises(UserError, match="^sbatch: .*invalid partition specified: nosuch$") as error:
        sweep.main(argv)
    assert "\n" not in str(error.value)


def test_run_imp_on_a_cluster(slurm):
    argv = [
        "--launcher",
        "slurm",
        "--gpus-per-run",
        "2",
        "--config",
        f"{ROOT}/STR/configs/digits.yaml",
    ]
    (slurm / "hold").touch()
    assert run_imp.main(argv) == 0
    assert "#SBATCH --gpus-per-node=2" in (slurm / "100.sh").read_text()
    (pickle,) = Path("runs/imp/submitit").glob("100_submitted.pkl")
    remote = submitit.core.utils.DelayedSubmission.load(pickle).function
    assert remote.command[1:3] == ["-m", "startsparse.held"]
    assert remote.command[4:6] == ["2", "STR.main"]  # torchrun starts two processes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "soon"], "--time: 'soon' is no time such as 90"),
        (["--time", "0:04:00"], "--time: 0:04:00 should be at least 5 minutes"),
        (["--memory", "lots"], "--memory: 'lots' is no amount such as 32G"),
        (["--cpus-per-run", "0"], "--cpus-per-run: 0 should be at least 1"),
        (["--gpus-per-run", "-1"], "--gpus-per-run: -1 should be at least 0"),
        (["--sbatch", "Account x"], "--sbatch: 'Account x' is no parameter such as account=NAME"),
        (["--sbatch", "time=3"], "--sbatch: time is the option --time"),
        (["--sbatch", "signal=3"], "--sbatch: signal is set by the sweep"),
        (["--sbatch", "qos=a", "qos=b"], "--sbatch: qos is named twice"),
        (["--devices", "0"], "--devices: has no effect with --launcher slurm; see --gpus-per-run"),
    ],
)
def test_options_of_the_cluster_that_make_no_sense(slurm, flags, message):
    for main, first in ((sweep.main, ["STR"]), (run_imp.main, [])):
        with pytest.raises(OptionError, match=f"^{message}"):
            main([*first, "--launcher", "slurm", *flags])
    assert list(slurm.iterdir()) == []


def test_without_slurm_or_submitit(tmp_path, monkeypatch):
    argv = ["STR", "--launcher", "slurm", "--log-dir", str(tmp_path)]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match="^--launcher: slurm needs sbatch, which is not on the"):
        sweep.main(argv)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(OptionError, match="^--launcher: slurm needs submitit; pip install 'submit"):
        sweep.main(argv)
    with pytest.raises(OptionError, match="^--time: has no effect without --launcher slurm"):
        sweep.main(["STR", "--time", "90"])


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 90), ("90:30", 91), ("12:00:00", 720), ("1-0", 1440), ("2-03:30", 3090),
     ("1-02:03:04", 1564)],
)  # fmt: skip
def test_time_limits_mean_what_slurm_says(limit, expected):
    assert cluster.minutes(limit) == expected


# --- submitit's local executor --------------------------------------------------------------------

PROGRAM = """
import signal, sys, time
from pathlib import Path
from startsparse import errors, stopping, threads
stopping.watch()
threads.fit = lambda: None
here = Path(sys.argv[1])
def main():
    print("begins", flush=True)
    if here.exists():  # it was stopped before
        here.with_name("done").touch()
        return
    with stopping.StopSignal() as stop:
        here.with_name("ready").touch()
        while not stop.received:
            time.sleep(0.01)
        time.sleep(0.5)  # saves its checkpoint, while further signals come
        here.touch()
        raise errors.Interrupted(stop.received, "stopped")
errors.run_script(main)
"""


@pytest.mark.parametrize("signals", [["SIGUSR2"], ["SIGUSR1", "SIGTERM", "SIGUSR2", "SIGUSR2"]])
def test_the_local_executor_of_submitit_requeues(tmp_path, monkeypatch, signals):
    """All signals also come to the process of the run itself, as where Slurm signals them all."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "stopped")]
    queue = submitit.LocalExecutor(tmp_path / "submitit")
    queue.update_parameters(timeout_min=5)
    job = queue.submit(Remote(command, str(tmp_path), str(tmp_path / "log")))
    until((tmp_path / "ready").exists)
    (run,) = subprocess.check_output(["pgrep", "-f", command[2]]).split()
    for name in signals:
        os.kill(int(run), getattr(signal, name))
        time.sleep(0.02)
    task = subprocess.check_output(["pgrep", "--parent", job.job_id])
    os.kill(int(task), signal.SIGUSR2)  # as Slurm warns the job
    until((tmp_path / "done").exists)
    until(job.done)
    assert job.result() is None
    assert (tmp_path / "log").read_text() == "begins\nerror: stopped\nbegins\n"


def test_a_run_that_fails_is_not_requeued(tmp_path):
    remote = Remote([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path), f"{tmp_path}/log")
    with pytest.raises(RuntimeError, match="^the run ended with exit code 3; see "):
        remote()
    assert remote.checkpoint() is None


TORCHRUN = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(0.5)
    here.with_name("saved").touch()
    sys.exit(1)  # as torchrun does
here = Path(sys.argv[1])
signal.signal(signal.SIGTERM, stop)
here.touch()
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM])
def test_several_processes_of_a_run_are_stopped_and_awaited(tmp_path, signum):
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    program = "from startsparse import held, stopping; stopping.watch(); held._several({})"
    words = [str(tmp_path / "torchrun.py"), str(tmp_path / "ready")]
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(words)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    until((tmp_path / "ready").exists)
    process.send_signal(signum)
    assert process.wait(30) == 128 + signum
    assert (tmp_path / "saved").exists()
