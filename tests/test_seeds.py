"""--seeds: each run is the one of its seed alone, and their table is the mean and interval."""

import os
import re
import signal
import statistics

import pandas as pd
import pytest
from script_runs import MLP, newest, same, steps
from torch.optim.optimizer import register_optimizer_step_post_hook

import ER_DST.main
import ER_SLT.main
import STR.main
from ER_DST.options import DSTOptions
from startsparse import seeds, trainer
from startsparse.commandline import parse, read_yaml
from startsparse.errors import Interrupted, OptionError, UserError
from STR.options import STROptions

SMALL = {
    "STR": (STR.main.main, [*MLP, "--threshold-list", "0.1", "--final-prune-epoch", "1"]),
    "ER_DST": (ER_DST.main.main, [*MLP, "--update-frequency", "2"]),
    "ER_SLT": (ER_SLT.main.main, [*MLP, "--levels", "2"]),
}

pytestmark = pytest.mark.usefixtures("no_pictures")


def start(script, where, *argv):
    main, small = SMALL[script]
    folders = ["--log-dir", f"{where}/runs", "--result-dir", str(where)]
    return main([*small, "--sparse-compute", "off", *folders, *argv])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of STR of seeds 1, 2 and 3, each started by itself."""
    where = tmp_path_factory.mktemp("alone")
    for seed in "123":
        start("STR", where, "--seed", seed)
    return where


def folder(where, seed):
    return next(where.glob(f"runs/digits/*/seed-{seed}"))


def test_each_run_is_that_of_its_seed(tmp_path, alone):
    assert start("STR", tmp_path, "--seeds", "3", "1", "2") == 0
    for seed in (1, 2, 3):
        assert same(folder(tmp_path, seed), folder(alone, seed))
        assert read_yaml(STROptions, folder(tmp_path, seed) / "options.yaml").seeds == ()
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["seed"]) == [3, 1, 2]
    assert "seeds" not in table


def test_the_table_is_mean_and_interval(tmp_path, capsys):
    assert start("STR", tmp_path, "--seeds", "1", "2", "3", "--name", "s-{seed}") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    values = list(pd.read_csv(tmp_path / "results.csv")["test_accuracy"])
    # Student's t for three runs: 4.30265 standard deviations / sqrt(3)
    half = 4.30265 * statistics.stdev(values) / 3**0.5
    assert line.startswith("| 3 | ")
    assert line.endswith(f" | {statistics.mean(values):.4f} ± {half:.4f} |")
    assert {path.parent.name for path in tmp_path.glob("runs/digits/*/seed-*")} == {
        f"s-{seed}" for seed in (1, 2, 3)
    }


@pytest.mark.parametrize("script", SMALL)
def test_every_script_takes_seeds(tmp_path, script, capsys):
    assert start(script, tmp_path, "--seeds", "1", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 2 | ")
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2


def test_a_signal_stops_all_and_resume_auto_continues(tmp_path, alone):
    more = ["--seeds", "1", "2", "3"]
    with steps() as taken:
        start("STR", tmp_path / "once", "--seed", "1")
    count = len(taken)

    def stop(*_):
        done.append(1)
        if len(done) == count + 2:  # in the second run
            os.kill(os.getpid(), signal.SIGTERM)

    done = []
    hook = register_optimizer_step_post_hook(stop)
    with pytest.raises(Interrupted, match="SIGTERM .*seed-2 continues; the same .* --resume auto"):
        start("STR", tmp_path, *more)
    hook.remove()
    assert len(list(tmp_path.glob("runs/digits/*/seed-*"))) == 2
    with steps() as taken:
        assert start("STR", tmp_path, *more, "--resume", "auto") == 0
    assert len(taken) == 3 * count - len(done)
    for seed in (1, 2, 3):
        assert same(folder(tmp_path, seed), folder(alone, seed))
    with steps() as taken:
        assert start("STR", tmp_path, *more, "--resume", "auto") == 0
    assert taken == []


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    test = trainer.Trainer.test

    def diverge(self):
        if self.options.seed == 2:
            raise UserError("the loss is nan")
        return test(self)

    monkeypatch.setattr(trainer.Trainer, "test", diverge)
    few = [*MLP, "--log-dir", f"{tmp_path}/runs", "--result-dir", str(tmp_path)]
    assert STR.main.main([*few, "--seeds", "1", "2", "3"]) == 1
    out, err = capsys.readouterr()
    assert err == "error: seed 2: the loss is nan\n"
    assert out.splitlines()[-1].startswith("| 2 | ")
    with pytest.raises(UserError, match="^the loss is nan$"):
        STR.main.main([*few, "--seed", "2"])


def test_seed_stands_for_the_seed_in_paths(tmp_path, alone):
    name = folder(alone, 1).parent
    other = ["--start-from", f"{name}/seed-{{seed}}", "--seeds", "1", "2"]
    few = [*MLP, "--log-dir", f"{tmp_path}/runs", "--result-dir", str(tmp_path)]
    assert STR.main.main([*few, *other]) == 0
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["start_from"]) == [f"{name}/seed-1", f"{name}/seed-2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "1", "2", "1"], "--seeds: 1 is named twice"),
        (["--seed", "1", "--seeds", "1", "2"], "--seed: has no effect with --seeds"),
        (["--seeds", "1", "2", "--resume", "some"], "--resume: a run has one seed; with --seeds"),
        (["--seeds", "1", "--name", "{sead}"], r"'\{sead\}': there is no \{sead\}; choose from"),
        (["--seeds", "1", "-2", "x"], "--seeds: 'x' is not a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_run(tmp_path, argv, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        start("STR", tmp_path, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_option_of_the_last_seed_stops_before_the_first(tmp_path, alone):
    name = folder(alone, 1).parent
    with pytest.raises(OptionError, match="^--start-from: .*seed-4 is no folder of a finished run"):
        STR.main.main([*MLP, "--start-from", f"{name}/seed-{{seed}}", "--seeds", "1", "4",
                       "--log-dir", f"{tmp_path}/runs"])  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_ticket_of_one_run_has_one_seed():
    with pytest.raises(OptionError, match="^--seeds: has no effect with --evaluate"):
        ER_SLT.main.main(["--evaluate", "ticket", "--seeds", "1", "2"])


def test_seeds_of_a_file(tmp_path):
    (tmp_path / "x.yaml").write_text("data: digits\nseeds: [4, 5]\n")
    argv = ["--config", str(tmp_path / "x.yaml")]
    every = seeds.parse_each(DSTOptions, tmp_path, argv)
    assert [options.seed for options in every] == [4, 5]
    assert every[1] == parse(DSTOptions, tmp_path, [*argv, "--seeds", "--seed", "5"])


def test_epochs_in_all_are_the_rows_of_epochs_csv(tmp_path):
    for script in SMALL:
        start(script, tmp_path / script)
        run = newest(tmp_path / script)
        kind = {"STR": STROptions, "ER_DST": DSTOptions, "ER_SLT": ER_SLT.main.SLTOptions}[script]
        rows = len(pd.read_csv(run / "epochs.csv"))
        assert read_yaml(kind, run / "options.yaml").total_epochs == rows
        assert re.fullmatch("[12]", str(rows))
