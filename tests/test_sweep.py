"""Sweeps of any script: which runs a grid means, and the table of what came of them."""

import statistics
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest
from script_runs import MLP, ROOT

import ER_DST.main
import ER_SLT.cifar_main
import STR.main
from startsparse import jobs, runs, sweep
from startsparse.commandline import parse
from startsparse.errors import OptionError

SCRIPTS = {"STR.main": STR.main, "ER_DST.main": ER_DST.main, "ER_SLT.cifar_main": ER_SLT.cifar_main}
SMALL = ["--", *MLP, "--update-frequency", "2"]


def plan(*argv, flags=()):
    options = sweep.SweepOptions(**dict(zip(argv[::2], argv[1::2])))
    return sweep.plan(options, list(flags))


def test_a_grid_is_all_combinations():
    grid = ["lr=0.1,0.01", "init-density:final-density=0.5:0.05,0.2:0.01"]
    assert sweep.points(grid) == [
        {"lr": lr, "init-density": first, "final-density": last}
        for lr in ("0.1", "0.01")
        for first, last in (("0.5", "0.05"), ("0.2", "0.01"))
    ]
    assert sweep.points([]) == [{}]


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("ER_DST/main.py", "ER_DST.main"),
        ("ER_DST", "ER_DST.main"),
        (f"{ROOT}/STR/main.py", "STR.main"),
        ("STR.main", "STR.main"),
        ("ER_SLT/cifar_main.py", "ER_SLT.cifar_main"),
    ],
)
def test_a_script_is_found(script, module, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sweep.load(script) is SCRIPTS[module]


def test_a_script_in_the_working_folder_is_found(monkeypatch):
    monkeypatch.chdir(ROOT / "ER_DST")
    assert sweep.load("main.py") is ER_DST.main
    assert sweep.load("ER_DST") is ER_DST.main


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "SCRIPT: name a script, as ER_DST/main.py"),
        ("nosuch.py", "SCRIPT: nosuch.py does not exist"),
        ("no such", "SCRIPT: 'no such' is no script such as ER_DST/main.py or ER_DST.main"),
        ("..", "SCRIPT: '..' is no script"),
        ("nosuch", r"SCRIPT: nosuch.main cannot be imported \(No module named 'nosuch'\)"),
        ("json", "SCRIPT: json.main cannot be imported"),
        ("json.tool", "SCRIPT: json.tool has no OPTIONS, so it is no script for a sweep"),
        ("STR/run_imp.py", "SCRIPT: STR.run_imp has no OPTIONS"),
        ("{tmp}/STR/main.py", "SCRIPT: .*STR/main.py: Python finds .*STR/main.py as STR.main inst"),
    ],
)
def test_what_is_no_script(script, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "STR").mkdir()
    (tmp_path / "STR/main.py").touch()
    with pytest.raises(OptionError, match=f"^{message}"):
        sweep.main([script.format(tmp=tmp_path), "--dry-run"] if script else ["--dry-run"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_runs_are_those_of_the_flags(script):
    """Each has the options that one command line would give it, and a name and folders."""
    flags = ["--epochs", "3", "--width", "8"]
    every = plan("script", script, "grid", ("lr=0.1,0.2",), "seeds", (1, 5), flags=flags)
    assert [(job.options.lr, job.options.seed) for job in every] == [
        (0.1, 1), (0.1, 5), (0.2, 1), (0.2, 5)
    ]  # fmt: skip
    module = SCRIPTS[script]
    for job in every:
        lr, seed = str(job.options.lr), str(job.options.seed)
        argv = [*flags, "--lr", lr, "--seed", seed]
        alone = parse(module.OPTIONS, module.CONFIGS, argv)
        assert runs.computed(job.options) | {"name": ""} == runs.computed(alone)
        assert job.options.name == f"lr-{lr}"
        assert (job.options.log_dir, job.options.result_dir) == ("runs/sweep", "results/sweep")
        assert (job.module, job.options.resume) == (script, "auto")


def test_values_with_spaces_and_placeholders():
    every = plan(
        *("script", "STR", "seeds", (1, 2)),
        *("grid", ("threshold-list=0.1,0.1 0.05", "er-sparse-init=0.5")),
        flags=["--name", "a/{seed}-{er_sparse_init}", "--no-augment"],
    )
    assert [job.options.threshold_list for job in every] == [(0.1,)] * 2 + [(0.1, 0.05)] * 2
    names = [job.options.name for job in every]
    assert names[0] == "a/1-0.5-threshold-list-0.1-er-sparse-init-0.5"
    assert names[3] == "a/2-0.5-threshold-list-0.1_0.05-er-sparse-init-0.5"
    assert not any(job.options.augment for job in every)


def test_long_values_make_short_names():
    one, other = plan("script", "STR", "grid", (f"expt-setup={'x' * 150}a,{'x' * 150}b",))
    assert len(one.options.name) < 60
    assert one.options.name != other.options.name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grid", "lr"], "--grid: 'lr' is not NAME=VALUE,VALUE,..."),
        (["--grid", "=1"], "--grid: '=1' is not NAME=VALUE"),
        (["--grid", "lr:wd=1"], "--grid: '1' should be 2 values, for lr:wd"),
        (["--grid", "lr=1", "LR=2"], "--grid: lr is named twice"),
        (["--grid", "nosuch=1"], "--nosuch: unknown option"),
        (["--grid", "lr=x"], "--lr: 'x' is not a number"),
        (["--grid", "threshold-list='"], "--grid: ''': No closing quotation"),
        (["--grid", "lr=0.1,0.10"], "the sweep has one run twice: lr-0.1, seed 1, and lr-0.10"),
        (["--grid", "seed=1,2"], "--grid: seed is set by the sweep"),
        (["--grid", "name=a,b"], "--grid: name is set by the sweep"),
        (["--grid", "lr=1", "--", "--lr", "2"], "--grid: lr is named after -- too"),
        (["--", "--seed", "2"], "'--seed' after --: the sweep sets it"),
        (["--", "--seeds", "2"], "'--seeds' after --: --seeds belongs before --"),
        (["--", "--log-dir", "x"], "'--log-dir' after --: --log-dir belongs before --"),
        (["--", "--name", "{sead}"], r"'\{sead\}': there is no \{sead\}; choose from \{seed\}"),
        (["--grid", "expt-setup=a b,a/b"], "--grid: two runs are called expt-setup-a_b, seed 1"),
        (["--seeds"], "--seeds: needs at least one value"),
        (["--seeds", "1", "1"], "--seeds: 1 is named twice"),
        (["--jobs", "0"], "--jobs: 0 should be at least 1"),
        (["--lrr", "1"], "--lrr: unknown option"),
    ],
)
def test_what_makes_no_sense_stops_before_anything_runs(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(OptionError, match=f"^{message}"):
        sweep.main(["STR", *argv])
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["ER_SLT", "--dry-run", "--grid", "sparsity=0.1,0.2", "--seeds", "1", "2"]
    assert sweep.main([*argv, "--", "--levels", "3", "--epochs", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(
        "python -m ER_SLT.main --levels 3 --epochs 7 --sparsity=0.1 --seed=1"
    )
    assert lines[-1] == f"4 runs, {4 * 3 * 7} epochs"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Runs of a sweep in this process; returns those that were started."""
    started = []

    def launch(job, *_):
        started.append(job.title)
        ER_DST.main.main(job.argv)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_launch", launch)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    monkeypatch.setattr("startsparse.plots.plot_run_by_rank_0", lambda *_: None)
    return started


def test_the_table_has_mean_and_interval_of_each_setting(in_this_process, capsys):
    argv = ["ER_DST", "--grid", "init-density=0.5,0.2", "--seeds", "1", "2"]
    assert sweep.main([*argv, *SMALL]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()[-4:]
    assert head == "| init-density | runs | density | valid_accuracy | test_accuracy |"
    table = pd.read_csv("results/sweep/results.csv")
    for line, density in zip(lines, (0.5, 0.2), strict=True):
        own = table[table["er_sparse_init"] == density]["test_accuracy"]
        half = 12.7062 * statistics.stdev(own) / 2**0.5  # Student's t for two runs
        assert line.startswith(f"| {density} | 2 | ")
        assert line.endswith(f"| {own.mean():.4f} ± {half:.4f} |")

    # Another run in the same table is not of this sweep; and nothing is run again.
    assert sweep.main(["ER_DST", "--grid", "init-density=0.3", *SMALL]) == 0
    assert "| init-density |" not in capsys.readouterr().out  # it does not vary
    assert sweep.main([*argv, *SMALL]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == lines
    assert len(in_this_process) == 5
    assert sweep.main([*argv, "--status", *SMALL]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "state     epochs  run",
        *(f"finished     1/1  init-density-{d}, seed {s}" for d in (0.5, 0.2) for s in (1, 2)),
        "4 finished",
    ]


def test_the_status_of_runs_here(in_this_process, capsys, tmp_path):
    argv = ["ER_DST", "--seeds", "1", "2", "3", "4", "--log-dir", "runs"]
    every = plan("script", "ER_DST", "seeds", (1, 2, 3, 4), "log_dir", "runs", flags=SMALL[1:])
    assert sweep.main([*argv[:3], *argv[6:], *SMALL]) == 0  # the first is finished
    capsys.readouterr()
    every[1].log.write_text("epoch 1\nerror: the loss is nan\n")
    every[2].log.write_text("error: stopped by SIGINT before epoch 2, step 1\n")
    folder = every[0].folder.with_name("seed-3")
    folder.mkdir()
    text = (every[0].folder / "options.yaml").read_text()
    (folder / "options.yaml").write_text(text.replace("seed: 1\n", "seed: 3\n"))
    with jobs.locks.locked(every[3].lock, "run this sweep", 0):
        assert sweep.main([*argv, "--status", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["finished", "failed", "stopped", "running"]
    assert lines[5] == "1 finished, 1 failed, 1 stopped, 1 running"
    assert every[3].lock.exists()


def test_a_run_that_fails_is_named(in_this_process, capsys, monkeypatch):
    launch = jobs._launch

    def fail(job, *rest):
        if job.options.seed == 1:
            return SimpleNamespace(poll=lambda: 1, returncode=1)
        return launch(job, *rest)

    monkeypatch.setattr(jobs, "_launch", fail)
    assert sweep.main(["ER_DST", "--seeds", "1", "2", *SMALL]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(
        "error: mlp-GraNet-balanced-0.2-0.05, seed 1 failed; see"
    )
    assert out.splitlines()[-1].startswith("| 1 | ")


def test_one_run_as_a_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    few = ["--", "--dataset", "karate", "--epochs", "1", "--levels", "1", "--passes", "1"]
    assert sweep.main(["ER_SLT", *few]) == 0
    assert "| 1 | " in capsys.readouterr().out
    assert len(pd.read_csv("results/sweep/results.csv")) == 1
