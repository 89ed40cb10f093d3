"""STR/main.py from end to end: every kind of layer, what a run leaves behind, the commands."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from data_files import write_cifar10
from engine_runs import clock
from script_runs import MLP, ROOT, SOFT, TINY, few_digits, newest, original_commands, same, weights
from torch.optim.optimizer import register_optimizer_step_post_hook

from startsparse import checkpoint, er, masks
from startsparse.commandline import parse
from startsparse.errors import OptionError, UserError
from startsparse.trainer import Trainer
from startsparse.training import NonFiniteLoss
from STR import main as script
from STR.options import CONV_TYPES

FEW = pytest.mark.usefixtures("few_images")


@FEW
@pytest.mark.parametrize("conv_type", CONV_TYPES)
def test_every_conv_type_trains_and_stays_inside_its_mask(run, conv_type):
    stepped = []

    def look(optimizer, *_):
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in models:
            for _, weight, mask in masks.masked_weights(model):
                assert id(weight) in owned
                assert (weight[~mask] == 0).all()
                assert (optimizer.state[weight]["momentum_buffer"][~mask] == 0).all()
            stepped.append(sum(1 for _ in masks.masked_weights(model)))

    models, build = [], script.network
    hook = register_optimizer_step_post_hook(look)
    try:
        with pytest.MonkeyPatch.context() as patch:

            def network(*args):
                model, requested = build(*args)
                models.append(model)
                return model, requested

            patch.setattr(script, "network", network)
            soft = SOFT if conv_type.startswith("STR") else []
            folder = run("--conv-type", conv_type, *TINY, *soft)
    finally:
        hook.remove()
    assert len(stepped) == 2 * 6
    assert set(stepped) == {22 if conv_type in ("ConvMask", "STRConvER") else 0}
    result = json.loads((folder / "summary.json").read_text())
    dense = conv_type == "DenseConv"
    assert (result["density"] == 1) == dense
    assert result["requested"] == pytest.approx(
        0.2 if "Mask" in conv_type or "ER" in conv_type else 1
    )
    for name in (
        "options.yaml",
        "environment.json",
        "log.txt",
        "epochs.csv",
        "density.csv",
        "layers.json",
        "curves.png",
        "best.pt",
        "checkpoint.pt",
    ):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "dense_weights.pt").exists() == conv_type.startswith("STR")
    results = pd.read_csv(folder.parents[3] / "results.csv")
    assert len(results) == 1
    assert results.loc[0, "test_accuracy"] == result["test_accuracy"]
    assert results.loc[0, "conv_type"] == conv_type


@FEW
def test_one_seed_is_one_run_and_another_seed_another(run):
    one, again = (run(*TINY, where=where) for where in "ab")
    other = run(*TINY, "--seed", "2", where="c")
    assert same(one, again)
    assert not torch.equal(weights(one)["fc.weight"], weights(other)["fc.weight"])


def test_options_yaml_repeats_the_run(run):
    first = run(*MLP, "--lr", "0.03", "--threshold-list", "0.1", "--final_prune_epoch", "1")
    again = run("--config", str(first / "options.yaml"), where="b")
    assert same(first, again)


def test_runs_never_overwrite_each_other(run, tmp_path):
    first = run(*MLP)
    second = run(*MLP)
    assert (first.name, second.name) == ("seed-1", "seed-1-2")
    assert len(pd.read_csv(tmp_path / "a/results.csv")) == 2


@FEW
def test_evaluate_reproduces_the_accuracies(run, capsys):
    folder = run(*TINY)
    result = json.loads((folder / "summary.json").read_text())
    run("--evaluate", "--resume", str(folder))
    said = capsys.readouterr().out.splitlines()
    assert f"valid accuracy {100 * result['valid_accuracy']:.2f} %" in said
    assert f"test accuracy {100 * result['test_accuracy']:.2f} %" in said


def test_nothing_to_evaluate(run, tmp_path):
    with pytest.raises(OptionError, match="--evaluate: there is no run in .*seed-1 yet"):
        run(*MLP, "--evaluate", "--resume", "auto")
    assert not (tmp_path / "a").exists()


def test_the_test_set_is_used_once_and_at_the_best_epoch(run, monkeypatch):
    seen = []
    evaluate = Trainer.evaluate

    def watch(trainer, batches):
        seen.append("test" if batches is trainer.data.test else "valid")
        return evaluate(trainer, batches)

    monkeypatch.setattr(Trainer, "evaluate", watch)
    folder = run(*MLP, "--epochs", "4")
    assert seen == ["valid"] * 4 + ["test"]
    epochs = pd.read_csv(folder / "epochs.csv")
    result = json.loads((folder / "summary.json").read_text())
    assert result["valid_accuracy"] == epochs["valid_accuracy"].max()
    last = run(*MLP, "--epochs", "4", "--select", "last", where="b")
    assert json.loads((last / "summary.json").read_text())["epoch"] == 4


def test_tensorboard_shows_scalars_densities_and_thresholds(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(*MLP, *SOFT, "--epochs", "2", "--conv-type", "STRConv")
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    layers = json.loads((folder / "layers.json").read_text())
    assert {"lr", "train_loss", "valid_accuracy", "density"} <= tags
    assert {f"{what}/{n}" for n in layers for what in ("density", "threshold")} <= tags
    shown = [event.value for event in board.Scalars("density")]
    assert shown == pytest.approx(pd.read_csv(folder / "epochs.csv")["density"].tolist(), rel=1e-6)


def test_soft_thresholds_that_pruned_nothing_are_said_to(run, caplog):
    soft = [*MLP, "--conv-type", "STRConvER"]
    run(*soft, "--st-decay", "0.002")
    (line,) = [said for said in caplog.messages if "soft thresholds use" in said]
    assert line.startswith("warning: --sInit-value: ")
    assert "(0.002; --st-decay" in line
    caplog.clear()
    run(*soft, *SOFT)
    assert "soft thresholds use" not in caplog.text


def test_a_small_cifar_in_the_true_format(run, tmp_path, monkeypatch):
    small = write_cifar10(tmp_path / "data")
    monkeypatch.setitem(script.data.SETS, "cifar10", small.loader)
    where = ["--data", str(tmp_path / "data"), "--config", str(ROOT / "STR/configs/cifar10.yaml")]
    folder = run(*MLP, *where, "-b", "8", "--valid-split", "0.2")
    assert json.loads((folder / "summary.json").read_text())["weights"] == 49_824


@FEW
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    # 6 steps an epoch: the ninth batch, in the second epoch, holds an infinite pixel.
    steps, step = [], torch.nn.functional.cross_entropy

    def poisoned(logits, *args, **kwargs):
        if kwargs:
            steps.append(1)
        return step(logits, *args, **kwargs) * (torch.inf if len(steps) == 9 else 1)

    monkeypatch.setattr("startsparse.training.F.cross_entropy", poisoned)
    with pytest.raises(NonFiniteLoss, match="not finite at step 3"):
        run(*TINY)
    monkeypatch.undo()
    folder = newest(tmp_path / "a")
    state = checkpoint.load(folder / "checkpoint.pt")
    assert state["position"] == {"phase": 0, "epoch": 1, "step": 0}
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert same(run(*TINY, where="b"), run(*TINY, "--resume", "auto"))


@FEW
def test_the_layer_that_went_first_is_named(run):
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 2; (weights|output) of "):
        run(*TINY, "--lr", "1e30")


@FEW
def test_str_induced_er_reads_a_runs_layers_back(run, tmp_path):
    soft = run(*TINY, "--conv-type", "STRConv", *SOFT, where="soft")
    layers = json.loads((soft / "layers.json").read_text())
    assert all("threshold" in row for row in layers.values())
    again = ["--er-sparse-method", "str-induced-er", "--er-sparse-init", "0.1"]
    for source in (soft, soft / "layers.json", soft / "dense_weights.pt"):
        densities = er.read_densities(source)
        assert densities == pytest.approx({k: v["density"] for k, v in layers.items()})
    folder = run(*TINY, *again, "--er-sparsity-file", str(soft), where="again")
    table = pd.read_csv(folder / "density.csv").set_index("layer")
    assert table.loc["total", "requested"] == pytest.approx(0.1)
    ratios = [table.loc[name, "requested"] / layers[name]["density"] for name in layers]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    # a run with a mask: its checkpoint and its folder say the same
    assert er.read_densities(folder) == pytest.approx(er.read_densities(folder / "best.pt"))
    with pytest.raises(OptionError, match="'conv1' computes with another weight than"):
        er.read_densities(soft / "best.pt")
    (tmp_path / "other.json").write_text('{"conv1": 0.5}')
    with pytest.raises(OptionError, match=r"the density of '.*' is missing"):
        run(*TINY, *again, "--er-sparsity-file", str(tmp_path / "other.json"))


def test_a_missing_data_set_leaves_no_run_behind(run, tmp_path, monkeypatch):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="--set digits"):
        run("--set", "imagenet", "--data", str(tmp_path / "nothing"))
    assert not (tmp_path / "a").exists()


def test_the_demo_reaches_98_percent(tmp_path):
    assert "\tcd STR && $(BIN)/python main.py\n" in (ROOT / "Makefile").read_text()
    done = subprocess.run(
        [sys.executable, ROOT / "STR/main.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder = newest(tmp_path)
    result = json.loads((folder / "summary.json").read_text())
    assert result["test_accuracy"] >= 0.98
    assert result["density"] == pytest.approx(0.2, abs=0.003)
    for words in (
        "requested density    0.2000",
        "test accuracy  ",
        "of 270,896",
        "curves.png",
    ):
        assert words in done.stdout
    assert "stages.2.2.conv2" in done.stdout


@pytest.mark.parametrize("command", original_commands())
def test_the_original_commands_finish_on_digits(tmp_path, monkeypatch, command):
    monkeypatch.chdir(ROOT / "STR")
    argv = original_commands()[command].split()
    options = parse(script.STROptions, script.CONFIGS, argv)
    assert (options.set, options.batch_size, options.epochs) == {
        "random pruning": ("cifar10", 256, 160),
        "soft thresholds": ("cifar10", 256, 100),
    }[command]
    monkeypatch.setitem(script.data.SETS, "digits", few_digits(120, 20))
    clock(monkeypatch, dense=2.0, sparse=1.0)  # each thing is tried once
    short = ["--set", "digits", "--epochs", "1"]
    folders = ["--log-dir", str(tmp_path / "runs"), "--result-dir", str(tmp_path)]
    script.main([*argv, *short, *folders])
    result = json.loads((newest(tmp_path) / "summary.json").read_text())
    assert result["weights"] > 11_000_000
    asked = 0.2 if command == "random pruning" else 0.3
    assert result["density"] == pytest.approx(asked, abs=0.001)
