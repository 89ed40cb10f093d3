"""STR/main.py from end to end: every kind of layer, resume to the bit, options that take effect."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from data_files import write_cifar10
from torch.optim.optimizer import register_optimizer_step_post_hook

from startsparse import checkpoint, er, masks
from startsparse.errors import OptionError, UserError
from startsparse.pruning import PRUNERS
from startsparse.trainer import Trainer
from startsparse.training import NonFiniteLoss
from STR import main as script
from STR.options import CONV_TYPES

ROOT = Path(__file__).parents[1]
TINY = ["--arch", "resnet20", "--width", "4", "--epochs", "2", "--batch-size", "256"]
MLP = [
    *("--arch", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "256"),
    *("--warmup-length", "0"),
]
# s that gives a threshold among the weights, so that STR prunes from the first step on
SOFT = ["--sInit-value", "-3"]


@pytest.fixture
def run(tmp_path):
    """Run STR/main.py in this process; returns the run folder."""

    def run(*argv, where="a"):
        folders = ["--log-dir", f"{tmp_path / where}/runs", "--result-dir", f"{tmp_path / where}"]
        script.main([*argv, *folders])
        return newest(tmp_path / where)

    return run


def newest(where: Path) -> Path:
    return max((where / "runs").glob("*/*/seed-*"), key=lambda path: path.stat().st_mtime)


def weights(folder: Path, name="checkpoint.pt") -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / name)["model"]


def same(one: Path, other: Path) -> bool:
    """Whether two runs are the same to the bit: weights, optimizer, history, best, result."""
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (one, other))
    flat = [
        torch.utils._pytree.tree_leaves((s["model"], s["optimizer"], s["best"])) for s in (a, b)
    ]
    if len(flat[0]) != len(flat[1]):
        return False
    equal = all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*flat, strict=True)
    )
    best = [weights(folder, "best.pt") for folder in (one, other)]
    equal &= all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    if (one / "levels.csv").exists():
        equal &= (one / "levels.csv").read_bytes() == (other / "levels.csv").read_bytes()
    epochs = [pd.read_csv(f / "epochs.csv").drop(columns="seconds") for f in (one, other)]
    results = [json.loads((f / "summary.json").read_text()) for f in (one, other)]
    for result in results:
        result.pop("seconds")
    return equal and epochs[0].equals(epochs[1]) and results[0] == results[1]


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
            folder = run("--conv-type", conv_type, *TINY, *SOFT)
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


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("conv_type", CONV_TYPES)
@pytest.mark.parametrize(("when", "count"), [("after", 1), ("before", 2), ("after", 3)])
def test_resumed_equals_uninterrupted(run, monkeypatch, conv_type, when, count):
    """Gone within the first epoch; at its end, with best.pt newer than checkpoint.pt; later."""
    argv = ["--conv-type", conv_type, *TINY, *SOFT, "--save-every", "4"]
    whole = run(*argv, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing(when, count))
        run(*argv, where="parts")
    parts = run(*argv, "--resume", "auto", where="parts")
    assert len(list(parts.parent.iterdir())) == 1
    assert same(whole, parts)


def crashing(when, count, save=Trainer.save):
    """A `Trainer.save` whose ``count``-th call ends the process before or after it saved."""
    calls = []

    def crash(trainer):
        calls.append(1)
        if when == "after" or len(calls) < count:
            save(trainer)
        if len(calls) == count:
            raise Crash

    return crash


def test_resume_over_pruning_levels(run, monkeypatch):
    argv = [*MLP, "--threshold-list", "0.1", "0.05", "--final_prune_epoch", "1"]
    whole = run(*argv, where="whole")
    for count in (2, 3):  # the checkpoint of a pruning, and of an epoch after it
        for when in ("before", "after"):
            where = f"{when}{count}"
            with monkeypatch.context() as patch, pytest.raises(Crash):
                patch.setattr(Trainer, "save", crashing(when, count))
                run(*argv, where=where)
            assert same(whole, run(*argv, "--resume", "auto", where=where))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(run, tmp_path, signum):
    argv = [*TINY, "--epochs", "3", "--save-every", "1"]
    whole = run(*argv, where="whole")
    folders = ["--log-dir", str(tmp_path / "b/runs"), "--result-dir", str(tmp_path / "b")]
    process = subprocess.Popen(
        [sys.executable, ROOT / "STR/main.py", *argv, *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "b").rglob("checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert errors.count("\n") == 1
    assert "continues" in errors
    folder = newest(tmp_path / "b")
    assert len(pd.read_csv(folder / "epochs.csv")) < 3 if (folder / "epochs.csv").exists() else True
    script.main(["--resume", str(folder), "--result-dir", str(tmp_path / "b")])
    assert same(whole, folder)


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


def test_a_finished_run_is_not_trained_again(run, monkeypatch, tmp_path):
    folder = run(*MLP)
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(script.data, "load", lambda *_, **__: pytest.fail("trained again"))
    run(*MLP, "--resume", "auto")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert len(pd.read_csv(tmp_path / "a/results.csv")) == 1


def test_resume_with_other_options_is_refused(run):
    folder = run(*MLP)
    with pytest.raises(OptionError, match=r"--lr: 0.3, but the run in .* was started with 0.1"):
        run(*MLP, "--lr", "0.3", "--resume", str(folder))


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
    folder = run(*TINY, "--epochs", "4")
    assert seen == ["valid"] * 4 + ["test"]
    epochs = pd.read_csv(folder / "epochs.csv")
    result = json.loads((folder / "summary.json").read_text())
    assert result["valid_accuracy"] == epochs["valid_accuracy"].max()
    last = run(*TINY, "--epochs", "4", "--select", "last", where="b")
    assert json.loads((last / "summary.json").read_text())["epoch"] == 4


def test_levels_prune_to_exactly_what_was_asked(run):
    folder = run(
        *MLP,
        "--er-sparse-init",
        "0.5",
        "--threshold-list",
        "0.3",
        "0.1",
        "0.01",
        "--final_prune_epoch",
        "2",
        "--warmup-epochs",
        "1",
    )
    epochs = pd.read_csv(folder / "epochs.csv")
    assert epochs["phase"].tolist() == [
        "warm-up",
        *["level 0"] * 2,
        *["level 1"] * 2,
        *["level 2"] * 2,
        "final",
    ]
    total = json.loads((folder / "summary.json").read_text())["weights"]
    kept = (epochs["density"] * total).round().astype(int)
    assert kept[3:].tolist() == [round(p * total) for p in (0.3, 0.3, 0.1, 0.1, 0.01)]
    assert kept[0] == pytest.approx(0.5 * total, rel=0.05)
    result = json.loads((folder / "summary.json").read_text())
    assert result["requested"] == 0.01
    levels = pd.read_csv(folder / "levels.csv")
    assert levels["level"].tolist() == [0, 1, 2, 3]
    assert levels["kept"].tolist()[1:] == [round(p * total) for p in (0.3, 0.1, 0.01)]
    assert levels["test_accuracy"].iloc[-1] == result["test_accuracy"]
    assert levels["valid_accuracy_pruned"].notna().tolist() == [True] * 3 + [False]
    assert levels["flipped"].between(0, 0.5).all()
    assert levels["dead_units"].iloc[-1] > 0
    kept = [weights(folder, f"levels/level-{k}.pt") for k in range(4)]
    for denser, sparser in itertools.pairwise(kept):
        for name in denser:
            if name.endswith("_mask"):
                assert (sparser[name] <= denser[name]).all()  # nothing comes back
    table = pd.read_csv(folder / "levels/level-3.csv").set_index("layer")
    assert table.loc["total", "flipped"] == pytest.approx(levels["flipped"].iloc[-1])


def test_a_level_that_asks_for_more_than_there_is_stops_before_training(run, tmp_path):
    # The ER mask of this seed has fewer weights than its density expects.
    with pytest.raises(OptionError, match="--threshold-list: 0.2 asks for 9965 weights, the fir"):
        run(*MLP, "--threshold-list", "0.2")
    with pytest.raises(OptionError, match="--threshold-list: 0.001 is below the share"):
        run(*MLP, "--last-layer-dense", "--threshold-list", "0.001")
    assert not (tmp_path / "a").exists()
    folder = run(
        *MLP, "--threshold-list", "0.2", "--final_prune_epoch", "1", "--er-sampling", "exact"
    )
    assert json.loads((folder / "summary.json").read_text())["kept"] == 9965


def test_no_validation_split(run):
    folder = run(*MLP, "--valid-split", "0", "--select", "last")
    assert pd.read_csv(folder / "epochs.csv")["valid_accuracy"].isna().all()
    assert 0 < json.loads((folder / "summary.json").read_text())["test_accuracy"] <= 1


def test_auto_takes_the_newest_run_that_began(run, tmp_path):
    first, second = run(*MLP), run(*MLP)
    third = second.with_name("seed-1-3")
    third.mkdir()  # gone before its options were written
    second.joinpath("summary.json").unlink()
    first.joinpath("checkpoint.pt").unlink()
    assert script.runs.find_run(
        script.parse(script.STROptions, script.CONFIGS,
                     [*MLP, "--resume", "auto", "--log-dir", f"{tmp_path}/a/runs"])
    ) == second  # fmt: skip


# One option a line: flags with it, against the same flags without. Weights must differ.
EFFECTS = {
    "lr": (["--lr", "0.03"], []),
    "lr-min": (["--lr-min", "0.09"], []),
    "lr-policy": (["--lr-policy", "multistep"], []),
    "lr-policy constant": (["--lr-policy", "constant_lr"], []),
    "warmup-length": (["--warmup-length", "1"], []),
    "weight-decay": (["--weight-decay", "0.01"], []),
    "no-bn-decay": (["--no-bn-decay"], []),
    "momentum": (["--momentum", "0.5"], []),
    "nesterov": (["--no-nesterov"], []),
    "optimizer": (["--optimizer", "adam"], []),
    "label-smoothing": (["--label-smoothing", "0.1"], []),
    "clip-norm": (["--clip-norm", "0.1"], []),
    "batch-size": (["-b", "100"], []),
    "valid-split": (["--valid-split", "0.3"], []),
    "init": (["--init", "orthogonal"], []),
    "er-sparse-method": (["--er-sparse-method", "ERK"], []),
    "er-sparse-init": (["--er-sparse-init", "0.5"], []),
    "er-budget": (["--er-budget", "clip"], []),
    "er-sampling": (["--er-sampling", "exact"], []),
    "first-layer-dense": (
        ["--first-layer-dense", "--er-sparse-init", "0.995"], ["--er-sparse-init", "0.995"]
    ),
    "last-layer-dense": (
        ["--last-layer-dense", "--er-sparse-method", "uniform"], ["--er-sparse-method", "uniform"]
    ),
    "amp": (["--amp", "bf16"], []),
    "sparse-function": (
        ["--conv-type", "STRConv", *SOFT, "--sparse-function", "exp"],
        ["--conv-type", "STRConv", *SOFT],
    ),
    "sInit-value": (["--conv-type", "STRConv", "--sInit-value", "-4"],
                    ["--conv-type", "STRConv", *SOFT]),
    "st-decay": (["--conv-type", "STRConv", *SOFT, "--st-decay", "0.1"],
                 ["--conv-type", "STRConv", *SOFT]),
    **{
        f"rewind {how}": (
            ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--rewind", how],
            ["--threshold-list", "0.1", "--final_prune_epoch", "1"],
        )
        for how in ("weights", "bn", "amplitudes", "signs")
    },
    **{
        f"pruner {pruner}": (
            ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--pruner", pruner],
            ["--threshold-list", "0.1", "--final_prune_epoch", "1"],
        )
        for pruner in PRUNERS
        if pruner != "mag"
    },
    "prune-scheduler": (
        ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--prune-scheduler", "step"],
        ["--threshold-list", "0.1", "--final_prune_epoch", "1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_an_accepted_option_has_an_effect(run, option):
    with_it, without = EFFECTS[option]
    one, other = (
        weights(run(*MLP, *flags, where=where)) for where, flags in (("a", with_it), ("b", without))
    )
    # Keys differ where a layer has a mask in one network only.
    assert one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one)


def test_compile_compiles_the_network(run, monkeypatch):
    compiled = []

    def compile(module):
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    run(*MLP)
    assert compiled == []
    run(*MLP, "--compile")
    assert [type(module).__name__ for module in compiled] == ["MLP"]


def test_mask_ref_takes_the_masks_of_another_run(run):
    levels = [*MLP, "--threshold-list", "0.1", "0.03", "--final_prune_epoch", "1"]
    source = run(*levels, "--pruner", "snip", where="source")
    other = [*levels, "--lr", "0.03", "--pruner", "mask-ref", "--target-expt-name", str(source)]
    folder = run(*other, where="other")
    for level in (1, 2):
        mine, theirs = (weights(f, f"levels/level-{level}.pt") for f in (folder, source))
        assert all(torch.equal(mine[n], theirs[n]) for n in mine if n.endswith("_mask"))
    assert not torch.equal(mine["hidden.0.weight"], theirs["hidden.0.weight"])
    with pytest.raises(OptionError, match="--target-expt-name: the mask of 'hidden.0'"):
        run(*other, "--seed", "2", where="x")
    with pytest.raises(OptionError, match="--target-expt-name: level 1 of .* keeps 4982 weights"):
        run(*other, "--threshold-list", "0.12", where="x")
    with pytest.raises(OptionError, match="--target-expt-name: .*level-3.pt: no such checkpoint"):
        run(*other, "--threshold-list", "0.1", "0.03", "0.02", where="x")


def test_start_from_begins_with_weights_and_masks_of_another_run(run, monkeypatch):
    first = run(*MLP, "--er-sparse-method", "ERK", where="first")
    begun = []
    monkeypatch.setattr(Trainer, "run_phases", lambda trainer, _: begun.append(
        {k: v.clone() for k, v in trainer.model.state_dict().items()}) or 1 / 0)  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        run(*MLP, "--start-from", str(first))
    best = weights(first, "best.pt")
    assert all(torch.equal(begun[0][name], best[name]) for name in best)
    with pytest.raises(OptionError, match="--start-from: .*no such checkpoint"):
        run(*MLP, "--start-from", "nowhere")
    with pytest.raises(OptionError, match="--start-from: .*does not fit the network"):
        run(*TINY, "--start-from", str(first))


def test_reset_weights_means_rewind_weights(run):
    levels = [*MLP, "--threshold-list", "0.1", "--final_prune_epoch", "1"]
    assert same(run(*levels, "--reset-weights"), run(*levels, "--rewind", "weights", where="b"))


def test_names_and_labels_are_kept(run):
    folder = run(
        *MLP,
        "--name",
        "mine",
        "--expt-setup",
        "rml",
        "--config",
        str(ROOT / "STR/configs/digits.yaml"),
    )
    assert folder.parts[-3:] == ("digits", "mine", "seed-1")
    row = pd.read_csv(folder.parents[3] / "results.csv").iloc[0]
    assert (row["name"], row["expt_setup"], row["run"]) == ("mine", "rml", str(folder))


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


def test_a_small_cifar_in_the_true_format(run, tmp_path, monkeypatch):
    small = write_cifar10(tmp_path / "data")
    monkeypatch.setitem(script.data.SETS, "cifar10", small.loader)
    where = ["--data", str(tmp_path / "data"), "--config", str(ROOT / "STR/configs/cifar10.yaml")]
    folder = run(*MLP, *where, "-b", "8", "--valid-split", "0.2")
    assert json.loads((folder / "summary.json").read_text())["weights"] == 49_824


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (["--resnet-type", "large"], (512, 512, 3, 3)),
        (["--resnet-type", "small-dense", "--width", "8"], (8, 8, 3, 3)),
        (["--resnet-type", "small-dense-inc", "--width", "4"], (32, 32, 3, 3)),
        (["--resnet-type", "res50"], (2048, 1024, 1, 1)),
        (["--arch", "VGG11"], (512, 512, 3, 3)),
        (["--arch", "ResNet20", "--width", "8"], (32, 32, 3, 3)),
    ],
)
def test_networks_by_name(flags, shape):
    options = script.parse(script.STROptions, script.CONFIGS, flags)
    model, requested = script.network(options, script.data.SHAPES["digits"])
    layers = list(masks.sparse_layers(model).items())
    assert list(requested) == [name for name, _ in layers]
    assert max(tuple(layer.weight.shape) for _, layer in layers if layer.weight.dim() == 4) == shape


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
    assert state["place"] == {"phase": 0, "epoch": 1, "step": 0}
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert same(run(*TINY, where="b"), run(*TINY, "--resume", "auto"))


def test_the_layer_that_went_first_is_named(run):
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 2; (weights|output) of "):
        run(*TINY, "--lr", "1e30")


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
    with pytest.raises(OptionError, match="before their soft thresholds"):
        er.read_densities(soft / "best.pt")
    (tmp_path / "other.json").write_text('{"conv1": 0.5}')
    with pytest.raises(OptionError, match=r"the density of '.*' is missing"):
        run(*TINY, *again, "--er-sparsity-file", str(tmp_path / "other.json"))


BAD = {
    "--lr: 'abc' is not a number": ["--lr", "abc"],
    "--lr: 0.0 should be above 0": ["--lr", "0"],
    "--lrr: unknown option; did you mean --lr": ["--lrr", "3"],
    "--st-decay: 'abc' is not a number": ["--st-decay", "abc"],
    "--st-decay: -1.0 should be at least 0": ["--st-decay", "-1"],
    "--epochs: '1.5' is not a whole number": ["--epochs", "1.5"],
    "--conv-type: 'Conv' is none of DenseConv, ConvMask": ["--conv-type", "Conv"],
    "--er-sparse-init: 1.5 should be above 0 and at most 1": ["--er-sparse-init", "1.5"],
    "--threshold-list: 0.3 should be above 0 and at most 0.2": ["--threshold-list", "0.3"],
    "--threshold-list: prunes masks": ["--threshold-list", "0.1", "--conv-type", "STRConv"],
    "--er-sparsity-file: goes with": ["--er-sparse-method", "network"],
    "--er-sparsity-file: goes with --er": ["--er-sparsity-file", "x.json"],
    "--reset-weights: means weights, --rewind says bn": ["--reset-weights", "--rewind", "bn"],
    "--width: --resnet-type small-dense needs it": ["--resnet-type", "small-dense"],
    "--width: the ImageNet ResNets": ["--set", "imagenet", "--width", "8"],
    "--arch: .*ImageNet": ["--set", "imagenet", "--arch", "vgg16"],
    "--er-sparse-init: density 0.0005 is below": [
        "--first-layer-dense",
        *TINY,
        "--er-sparse-init",
        "0.0005",
    ],
    "--er-sparsity-file: none.json does not exist": [
        "--er-sparse-method",
        "network",
        "--er-sparsity-file",
        "none.json",
    ],
    "--evaluate: name the run": ["--evaluate"],
    "--nesterov: needs": ["--nesterov", "--momentum", "0"],
    "--multigpu: 'a' is no list": ["--multigpu", "a"],
    "--compile: works on one device": ["--compile", "--multigpu", "0,1"],
    "--valid-split: 0.0 leaves nothing|--valid-split: 0": ["--valid-split", "0"],
    "--resume: nowhere does not exist": ["--resume", "nowhere"],
    "--config: cannot read nowhere.yaml": ["--config", "nowhere.yaml"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_one_line_before_data_or_devices(message, monkeypatch):
    for module, name in ((script.data, "load"), (script.parallel, "choose_devices")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("touched"))
    with pytest.raises(OptionError, match=f"^({message})") as error:
        script.main(BAD[message])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 3", "unknown option 'learning_rate'"),
        ("epoch: 3", "unknown option 'epoch'; did you mean epochs"),
        ("lr: abc", "--lr: 'abc' is not a number"),
        ("nesterov: 3", "nesterov: '3' should be true or false"),
        ("lr: [1, 2]", "lr: should be one value"),
        ("lr: {a: 2}", "lr: should be one value"),
        ("- 1", "should hold one 'option: value' per line"),
        ("a: : b", "is not YAML"),
        ("arch: resnet19", "--arch: 'resnet19' is none of"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(OptionError) as error:
        script.main(["--config", str(path)])
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_the_process_ends_with_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "main.py", "--batch_size", "many"],
        cwd=ROOT / "STR",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --batch-size: 'many' is not a whole number\n"


def test_a_missing_data_set_leaves_no_run_behind(run, tmp_path, monkeypatch):
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
        "test accuracy        9",
        "of 270,896",
        "curves.png",
    ):
        assert words in done.stdout
    assert "stages.2.2.conv2" in done.stdout


def original_commands():
    """The commands of the original README, word by word."""
    return {
        "random pruning": (
            "--seed 1 --resnet-type large --config configs/largescale/resnet18-cifar-str-1.yaml "
            "--threshold-list  --multigpu 0 --er-sparse-method uniform --er-sparse-init 0.2 --name "
            "cifar-imp-er-uniform-0.2 --final_prune_epoch 150 --result-dir results "
            "--warmup-epochs 0 --prune-scheduler cosine --expt-setup rml --lr 0.1"
        ),
        "soft thresholds": "--config configs/largescale/resnet18-cifar-str-3.yaml",
    }


@pytest.mark.parametrize("command", original_commands())
def test_the_original_commands_finish_on_digits(tmp_path, monkeypatch, command):
    monkeypatch.chdir(ROOT / "STR")
    argv = original_commands()[command].split()
    options = script.parse(script.STROptions, script.CONFIGS, argv)
    assert (options.set, options.batch_size, options.epochs) == {
        "random pruning": ("cifar10", 256, 160),
        "soft thresholds": ("cifar10", 256, 100),
    }[command]
    short = ["--set", "digits", "--epochs", "1", "--final_prune_epoch", "1"]
    folders = ["--log-dir", str(tmp_path / "runs"), "--result-dir", str(tmp_path)]
    script.main([*argv, *short, *folders])
    result = json.loads((newest(tmp_path) / "summary.json").read_text())
    assert result["weights"] > 11_000_000
    asked = 0.2 if command == "random pruning" else 0.3
    assert result["density"] == pytest.approx(asked, abs=0.001)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "STR/configs").rglob("*.yaml")), ids=lambda p: p.name
)
def test_every_config_is_complete_and_goes_around(path, tmp_path):
    options = script.parse(script.STROptions, script.CONFIGS, ["--config", str(path)])
    assert options.set in path.name or path.parent.name == "largescale"
    copy = tmp_path / "copy.yaml"
    copy.write_text(script.runs.write_yaml(options))
    again = script.parse(script.STROptions, script.CONFIGS, ["--config", str(copy)])
    again.config = options.config
    assert again == options
    assert yaml.safe_load(copy.read_text())["set"] == options.set
