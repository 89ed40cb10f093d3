"""Sweeps: what they run, that they go on after anything, and what they report."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from forked import Script
from script_runs import weights

from startsparse import checkpoint, jobs, threads
from startsparse.errors import OptionError
from STR import main as script
from STR import run_imp

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "STR/configs/digits.yaml")
TINY = ["--", "--arch", "mlp", "--width", "16", "--epochs", "2", "--final_prune_epoch", "2",
        "-b", "256", "--warmup-length", "0", "--save-every", "2"]  # fmt: skip
TWO = ["--er-sparse-inits", "0.5", "--densities", "0.2", "0.05"]


def argv(where, *options):
    folders = ["--log-dir", str(where / "runs"), "--result-dir", str(where)]
    return ["--config", CONFIG, *folders, *options, *TINY]


def test_dry_run_of_the_published_sweep(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    assert run_imp.main(["--dry-run", "--seeds", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for words in (
        "--er-sparse-method balanced",
        "--er-sparse-init 0.3",
        "--rewind weights",
        "--pruner mag",
        "--threshold-list 0.24 0.192 0.1536 ",
        " 0.0164927 0.0131941 0.01 --name",  # 0.3 * 0.8^13, 0.3 * 0.8^14, the target
        "--seed 1",
    ):
        assert words in lines[0]
    words = lines[0].split()
    assert words.index("--name") - words.index("--threshold-list") == 1 + 15
    assert lines[2] == f"2 runs, {2 * 2410} epochs"  # 15 levels of 150 and a last of 160


def test_the_status_of_a_sweep_that_has_not_begun(capsys, tmp_path):
    assert run_imp.main(argv(tmp_path, *TWO, "--seeds", "1", "2", "--status")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "state    epochs  run",
        "waiting     0/6  balanced-0.5-mag-weights, seed 1",  # 2 before each level, 2 at the end
        "waiting     0/6  balanced-0.5-mag-weights, seed 2",
        "2 waiting",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_dense_start_is_not_repeated_for_every_ratio():
    options = run_imp.SweepOptions(
        er_sparse_methods=("balanced", "ERK"), er_sparse_inits=(1.0, 0.5), seeds=(1, 2)
    )
    names = [job.options.name for job in run_imp.plan(options, [])]
    assert len(names) == 2 + 4
    assert sorted(set(names)) == [
        "ERK-0.5-mag-weights", "balanced-0.5-mag-weights", "balanced-1-mag-weights"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "1"], "--keep: 1.0 should be above 0 and below 1"),
        (["--er-sparse-inits", "0.5", "0"], "--er-sparse-inits: 0.0 should be above 0 and at most"),
        (["--er-sparse-inits", "1e-400"], "--er-sparse-inits: '1e-400' is too small to be told"),
        (["--densities", "2"], "--densities: 2.0 should be above 0 and at most 1"),
        (["--jobs", "0"], "--jobs: 0 should be at least 1"),
        (["--devices", "cpu"], "--devices: 'cpu' is no list of GPUs such as 0 or 0,1"),
        (["--devices", "0,1", "--jobs", "1"], "--jobs: 1 uses only some of --devices 0,1"),
        (["--pruners", "mask-ref"], "--pruner: mask-ref needs a --target-expt-name"),
        (["--target-expt-name", "r"], "--target-expt-name: goes with --pruners mask-ref"),
        (["--", "--name", "{sead}"], "'{sead}': there is no {sead}; choose from {seed}, {method}"),
        (["--seeds"], "--seeds: needs at least one value"),
        (["--er-sparse-inits", "0.01"], "--er-sparse-inits: 0.01 has no level below it"),
        (["--densities", "0.1", "--keep", "0.5"], "--keep: has no effect with --densities"),
        (["--densities", "0.5"], "--er-sparse-inits: 0.3 has no level below it"),
        (["--pruners", "magic"], "--pruner: 'magic' is none of mag, random-global"),
        (["--dry-run", "--", "--lrr", "3"], "--lrr: unknown option; did you mean --lr"),
    ],
)
def test_bad_options_stop_before_anything_runs(flags, message, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(OptionError, match=f"^{message}"):
        run_imp.main(flags)


def test_a_sweep_reports_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    sweep = argv(tmp_path, *TWO, "--seeds", "1", "2", "--jobs", "2")
    assert run_imp.main(sweep) == 0
    levels = pd.read_csv(tmp_path / "levels.csv")
    assert len(levels) == 2 * 3
    assert sorted(set(levels["requested"])) == [0.05, 0.2, 0.5]
    table = pd.read_csv(tmp_path / "table.csv")
    for row in table.itertuples():
        own = levels[levels["requested"] == row.density]["test_accuracy"]
        assert row.test_accuracy == pytest.approx(own.mean())
        # Student's t for two runs: 12.7062 standard deviations / sqrt(2)
        assert row.test_accuracy_ci95 == pytest.approx(12.7062 * own.std() / 2**0.5, rel=1e-4)
    markdown = (tmp_path / "table.md").read_text()
    assert markdown in capsys.readouterr().out
    head, _, line = markdown.splitlines()
    assert head == "| pruning | start | at density | 0.5 | 0.2 | 0.05 |"
    assert line.startswith("| mag, rewind weights | balanced | 0.5 | ")
    assert line.count(" ± ") == 3
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "final" in (tmp_path / "runs/balanced-0.5-mag-weights-seed-1.log").read_text()

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("run again"))
    assert run_imp.main(sweep) == 0

    # The masks of each seed's run, in the same table; the runs in this process, to save time.
    def launch(job, *_):
        script.main(job.argv)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.undo()
    monkeypatch.setattr(jobs, "_launch", launch)
    target = f"{tmp_path}/runs/digits/{{method}}-{{init}}-mag-{{rewind}}/seed-{{seed}}"
    more = ["--pruners", "mag", "mask-ref", "--target-expt-name", target, "--seeds", "1", "2"]
    assert run_imp.main(argv(tmp_path, *TWO, *more)) == 0
    for seed in (1, 2):
        mine, theirs = (
            weights(tmp_path / f"runs/digits/balanced-0.5-{pruner}-weights/seed-{seed}")
            for pruner in ("mask-ref", "mag")
        )
        masks = [name for name in mine if name.endswith("_mask")]
        assert all(torch.equal(mine[name], theirs[name]) for name in masks)
    assert len(pd.read_csv(tmp_path / "levels.csv")) == 2 * 2 * 3


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a sweep in this process, to save time; returns those that were started."""
    started = []

    def launch(job, *_):
        started.append(job.title)
        script.main(job.argv)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(jobs, "_launch", launch)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("startsparse.plots.plot_run_by_rank_0", lambda *_: None)
    return started


SHORT = ["--epochs", "1", "--final_prune_epoch", "1"]


def test_a_second_start_finds_the_runs_of_each_seed(tmp_path, in_this_process):
    for seeds in (["1"], ["12", "1"], ["1", "12", "2"]):
        assert run_imp.main([*argv(tmp_path, *TWO, "--seeds", *seeds), *SHORT]) == 0
    assert [title.split()[-1] for title in in_this_process] == ["1", "12", "2"]
    levels = pd.read_csv(tmp_path / "levels.csv")
    assert sorted(levels["seed"]) == [1] * 3 + [2] * 3 + [12] * 3
    assert set(pd.read_csv(tmp_path / "table.csv")["runs"]) == {3}


def test_sweeps_with_one_result_dir_are_in_one_table_and_not_mixed(tmp_path, in_this_process):
    first = argv(tmp_path, *TWO, "--seeds", "1", "2")
    assert run_imp.main([*first, *SHORT]) == 0
    before = pd.read_csv(tmp_path / "levels.csv")
    other = argv(tmp_path, *TWO, "--seeds", "1", "--rewind", "none", "--log-dir", f"{tmp_path}/b")
    assert run_imp.main([*other, *SHORT, "--lr", "0.01"]) == 0
    third = argv(tmp_path, *TWO, "--seeds", "1", "--log-dir", f"{tmp_path}/c")
    assert run_imp.main([*third, *SHORT, "--lr", "0.02"]) == 0
    levels = pd.read_csv(tmp_path / "levels.csv")
    assert len(levels) == len(before) + 2 * 3
    for name in ("levels.csv", "results.csv"):  # no paths of this machine
        assert str(tmp_path) not in (tmp_path / name).read_text()
    pd.testing.assert_frame_equal(levels[: len(before)], before)
    table = pd.read_csv(tmp_path / "table.csv")
    assert dict(zip(table["pruning"], table["runs"])) == {
        "mag, rewind weights, lr 0.1": 2,
        "mag, rewind none, lr 0.01": 1,
        "mag, rewind weights, lr 0.02": 1,
    }
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 3
    # The same run in another folder would be a seed that repeats: said before it is trained.
    count = len(in_this_process)
    again = argv(tmp_path, *TWO, "--seeds", "2", "--log-dir", f"{tmp_path}/d")
    with pytest.raises(OptionError, match=r"^--result-dir: .*levels\.csv: seed 2 repeats in one"):
        run_imp.main([*again, *SHORT])
    assert len(in_this_process) == count


def test_a_table_whose_run_folders_are_gone_is_made_again(tmp_path, in_this_process):
    """As in a fresh checkout: tables are committed, run folders are not."""
    again = [*argv(tmp_path, *TWO, "--seeds", "1"), *SHORT]
    assert run_imp.main(again) == 0
    before = pd.read_csv(tmp_path / "levels.csv")
    shutil.rmtree(tmp_path / "runs")
    assert run_imp.main(again) == 0
    assert len(in_this_process) == 2
    after = pd.read_csv(tmp_path / "levels.csv")
    pd.testing.assert_frame_equal(after, before)


@pytest.mark.parametrize("twice", [["--seeds", "1", "1"], ["--er-sparse-methods", "balanced",
                                                          "ER_same_params"]])  # fmt: skip
def test_a_run_that_a_sweep_names_twice(tmp_path, twice):
    with pytest.raises(OptionError, match=r"^the sweep has one run twice: balanced-0\.5-mag-weig"):
        run_imp.main(argv(tmp_path, *TWO, *twice))


def test_a_sweep_checks_its_table_first(tmp_path, in_this_process):
    (tmp_path / "levels.csv").write_text("level,seed\n0,1\n")
    with pytest.raises(OptionError, match=r"^--result-dir: .*levels\.csv: has no column 'run'"):
        run_imp.main(argv(tmp_path, *TWO))
    assert in_this_process == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [None] * 3),
        (["--devices", "0,1"], ["0", "1", "0"]),
        (["--devices", "2", "--jobs", "2"], ["2", "2", "2"]),
    ],
)
def test_every_device_has_a_run(tmp_path, monkeypatch, options, expected):
    given, at_once = [], []

    class Process:
        """Ends at the second look."""

        def __init__(self, command, **_):
            options = dict(itertools.pairwise(command))
            given.append(options.get("--multigpu"))
            at_once.append(self)
            self.returncode, self.looks = 0, 0

        def poll(self):
            self.looks += 1
            most.append(len(at_once))
            if self.looks == 2:
                at_once.remove(self)
                return 0
            return None

    most = []
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert run_imp.main(argv(tmp_path, *TWO, "--seeds", "1", "2", "3", *options)) == 0
    assert given == expected
    assert max(most) == (2 if options else 1)


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        (["--jobs", "3"], {}, "2"),
        (["--jobs", "9"], {}, "1"),
        (["--jobs", "1"], {}, None),
        (["--jobs", "3"], {"OMP_NUM_THREADS": "5"}, "5"),
        (["--jobs", "3"], {"MKL_NUM_THREADS": "5"}, None),
    ],
)
def test_runs_at_the_same_time_share_the_cores(tmp_path, monkeypatch, options, given, expected):
    for name in threads.NUMBER:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = []

    class Process:
        """Has ended before the first look."""

        def __init__(self, _command, env, **_):
            found.append(env.get("OMP_NUM_THREADS"))
            self.returncode = 0
            assert env["PATH"] == os.environ["PATH"]

        def poll(self):
            return 0

    monkeypatch.setattr(threads, "cores", lambda: 7)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert run_imp.main(argv(tmp_path, *TWO, "--seeds", "1", "2", *options)) == 0
    assert found == [expected] * 2


def started(where, argv):
    """A sweep as a process."""
    return Script(ROOT / "STR/run_imp.py", argv, where / "said", forks=True)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    # A file where the first run's folder has to be.
    blocked = tmp_path / "runs/digits/balanced-0.5-mag-weights"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    process = started(tmp_path, argv(tmp_path, *TWO, "--er-sparse-methods", "balanced", "uniform"))
    _, errors = process.wait()
    assert process.exit_code == 1
    assert "error: balanced-0.5-mag-weights, seed 1 failed; see " in errors
    levels = pd.read_csv(tmp_path / "levels.csv")
    assert set(levels["er_sparse_method"]) == {"uniform"}


# So that there is a middle to be stopped in, and a checkpoint after each epoch.
LONG = ["--final_prune_epoch", "20", "--save-seconds", "1e-9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """levels.csv of the sweep that nothing stops."""
    where = tmp_path_factory.mktemp("whole")
    sweep(where)
    return (where / "levels.csv").read_bytes()


def sweep(where):
    """What the sweep says that goes on to its end."""
    process = started(where, [*argv(where, *TWO), *LONG])
    out, errors = process.wait()
    assert process.exit_code == 0, errors
    return out


def trained(where):
    """The sweep as a process, once its run has trained on: a checkpoint is newer than before."""
    before = changed(where)
    process = started(where, [*argv(where, *TWO), *LONG])
    while changed(where) == before:
        assert process.exit_code is None, process.wait()
        time.sleep(0.01)
    return process


def changed(where):
    return [path.stat().st_mtime_ns for path in where.rglob("checkpoint.pt")]


def run_of(where):
    (folder,) = where.glob("runs/digits/*/seed-*")
    return folder


def place(where):
    """Epochs that the checkpoint has, and the next step after them."""
    state = checkpoint.load(run_of(where) / "checkpoint.pt")
    return len(state["history"]), state["position"]["step"] + 1


def resumed(where):
    """Where the run went on each time, as it said, and the epochs that it said were trained."""
    said = (run_of(where) / "log.txt").read_text()
    places = re.findall(r"resumed at epoch (\d+), step (\d+)", said)
    epochs = re.findall(r"INFO epoch +(\d+) ", said)
    return [(int(epoch) - 1, int(step)) for epoch, step in places], epochs


def kill(process, *others):
    for pid in (process.pid, *others):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def works(pid):
    """Whether there is such a process, and not only its exit code for whoever asks."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds children in /proc")
def test_killed_at_random_moments_it_ends_with_the_same_levels(tmp_path, whole):
    moments, places = random.Random(), []
    for with_children in (True, True, False):
        process = trained(tmp_path)
        time.sleep(moments.uniform(0, 0.1))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        kill(process, *(map(int, children) if with_children else ()))
        if with_children:
            places.append(place(tmp_path))
    # The run of the last sweep lives on, and is waited for.
    assert "runs in another sweep already; waiting" in sweep(tmp_path)
    assert not works(children[0])
    assert (tmp_path / "levels.csv").read_bytes() == whole
    went_on, epochs = resumed(tmp_path)
    assert went_on[:2] == places
    assert len(epochs) == len(set(epochs)) >= 40  # none was trained twice


def test_signals_stop_the_children_cleanly_and_the_sweep_goes_on(tmp_path, whole):
    places = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = trained(tmp_path)
        os.kill(process.pid, signum)
        _, errors = process.wait()
        assert process.exit_code == 128 + signum
        assert "the same command continues" in errors
        places.append(place(tmp_path))
    said = (tmp_path / "runs/balanced-0.5-mag-weights-seed-1.log").read_text()
    assert said.count("stopped by SIGTERM") == 3
    sweep(tmp_path)
    assert (tmp_path / "levels.csv").read_bytes() == whole
    went_on, epochs = resumed(tmp_path)
    assert went_on == places
    assert epochs == [str(epoch) for epoch in range(1, 43)]


def test_nohup_is_heeded(monkeypatch):
    handled, handle = [], signal.signal
    monkeypatch.setattr(signal, "signal", lambda s, h: (handled.append(s), handle(s, h))[1])
    for before, count in ((signal.SIG_DFL, 1), (signal.SIG_IGN, 0)):
        monkeypatch.setattr(signal, "getsignal", lambda _, before=before: before)
        handled.clear()
        assert jobs.run_all([], 1, [""]) == []
        assert handled.count(signal.SIGHUP) == 2 * count  # set, and taken back
