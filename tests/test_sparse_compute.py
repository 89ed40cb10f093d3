"""--sparse-compute in the scripts: what it computes, what it says, and how it goes on."""

import copy
import logging

import pandas as pd
import pytest
import torch
from engine_runs import batch, clock, network, optimizer_of, sparse_form, step
from script_runs import TIMES, Crash, crashing, same
from slt_runs import MLP, ticket
from torch import nn

from ER_DST.dynamic import remember, update
from ER_DST.topology import Change
from startsparse import checkpoint, trainer
from startsparse.engine import choice, compute
from startsparse.engine.compiler import NoKernelsError
from startsparse.engine.kernels import kernels_for
from startsparse.errors import OptionError
from startsparse.masks import attach_masks, keep_inside, masked_weights
from startsparse.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = ["--arch", "resnet20", "--width", "4", "--epochs", "2", "-b", "128", "--set", "digits"]
# float32, so only at a small learning rate do two orders of summation stay together
CALM = ["--arch", "mlp", "--width", "16", "--epochs", "2", "-b", "128", "--lr", "0.001"]
SOFT = [*CALM, "--conv-type", "STRConvER", "--sInit-value", "-3"]
ON = [*TINY, "--sparse-compute", "on"]
POPUP = [*MLP, "--epochs", "1", "--initBias", "kn-nonzero-bias"]


def weights(folder):
    return checkpoint.load(folder / "checkpoint.pt")["model"]


@pytest.mark.parametrize("argv", [CALM, SOFT, [*SOFT, "--er-sparse-init", "1"]])
def test_a_run_computes_sparsely_and_leaves_an_ordinary_checkpoint(run, argv):
    sparse, masked = (run(*argv, "--sparse-compute", mode, where=mode) for mode in ("on", "off"))
    table = pd.read_csv(sparse / "density.csv")
    assert set(table["computes"][:-1]) == {"sparse"}
    one, other = weights(sparse), weights(masked)
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape
        assert tensor.stride() == other[name].stride()
        if tensor.dtype.is_floating_point:
            assert (tensor - other[name]).abs().max() < 1e-4, name
        else:
            assert torch.equal(tensor, other[name]), name
    epochs = [pd.read_csv(folder / "epochs.csv") for folder in (sparse, masked)]
    assert epochs[0]["train_loss"].values == pytest.approx(epochs[1]["train_loss"].values, rel=1e-4)


@pytest.mark.parametrize(
    "more", [[], ["--optimizer", "adam", "--lr", "0.01"], [*SOFT, "--conv-type", "STRConv"]]
)
def test_resumed_equals_uninterrupted(run, monkeypatch, more):
    argv = [*ON, *more, "--save-every", "4"]
    whole = run(*argv, where="whole")
    for count in (1, 4):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Trainer, "save", crashing("after", count))
            run(*argv, where=f"parts{count}")
        assert same(whole, run(*argv, "--resume", "auto", where=f"parts{count}"))


@pytest.mark.parametrize(
    ("argv", "first", "then"), [(CALM, "on", "off"), (SOFT, "on", "off"), (SOFT, "off", "on")]
)
def test_a_checkpoint_of_one_continues_in_the_other(run, monkeypatch, argv, first, then):
    argv = [*argv, "--save-every", "4"]
    whole = run(*argv, "--sparse-compute", first, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing("after", 1))
        run(*argv, "--sparse-compute", first, where="parts")
    parts = run(*argv, "--sparse-compute", then, "--resume", "auto", where="parts")
    one, other = (pd.read_csv(folder / "epochs.csv") for folder in (whole, parts))
    assert one["train_loss"].values == pytest.approx(other["train_loss"].values, rel=1e-4)


def test_pruning_levels(run):
    folder = run(
        *("--arch", "mlp", "--width", "16", "--epochs", "1", "--final_prune_epoch", "1"),
        *("--threshold-list", "0.1", "0.05", "--sparse-compute", "on", "--rewind", "weights"),
        *("--set", "digits", "-b", "256"),
    )
    levels = pd.read_csv(folder / "levels.csv")
    assert levels["density"].tolist() == pytest.approx([0.2, 0.1, 0.05], abs=5e-3)
    weight, mask = (weights(folder)[f"hidden.0.{kind}"] for kind in ("weight", "weight_mask"))
    assert not weight[~mask].any()
    assert weight[mask].any()


@pytest.mark.parametrize("more", [["--global"], ["--er-init-density", "1"]])
def test_edge_popup_finds_the_same_tickets(run_slt, tmp_path, more):
    own = [word for word in POPUP if word not in ("--er-sampling", "exact")]
    one, other = (
        run_slt(*own, *more, "--sparse-compute", mode, "--save-file", mode)
        for mode in ("on", "off")
    )
    assert set(pd.read_csv(one / "density.csv")["computes"][:-1]) == {"sparse"}
    assert "computes" not in pd.read_csv(other / "density.csv")
    for name in ("epochs", "levels"):
        a, b = (pd.read_csv(f / f"{name}.csv").drop(columns=TIMES, errors="ignore")
                for f in (one, other))  # fmt: skip
        pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    for level in (1, 2):
        a, b = ticket(one, level), ticket(other, level)
        assert a.weights == b.weights  # to the bit
        for key, mask in a.found.items():
            assert torch.equal(mask, b.found[key]), key
    scores = [{n: t for n, t in weights(f).items() if n.endswith("score")} for f in (one, other)]
    assert len(scores[0]) == 8
    for key, tensor in scores[0].items():
        assert (tensor - scores[1][key]).abs().max() < 1e-4, key


@pytest.mark.parametrize("then", ["on", "off"])
def test_edge_popup_resumed_in_either_form(run_slt, monkeypatch, then):
    argv = [*POPUP, "--global", "--save-every", "3"]
    whole = run_slt(*argv, "--sparse-compute", "on", "--save-file", "whole")
    argv += ["--save-file", "parts"]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing("after", 1))
        run_slt(*argv, "--sparse-compute", "on")
    parts = run_slt(*argv, "--sparse-compute", then, "--resume", "auto")
    if then == "on":
        assert same(whole, parts)
    for key, mask in ticket(whole).found.items():
        assert torch.equal(mask, ticket(parts).found[key]), key


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_masks_that_move(run_dst, growth):
    folder = run_dst(
        *("--sparse", "--model", "mlp", "--width", "16", "--epochs", "2", "--batch-size", "128"),
        *("--update-frequency", "4", "--sparse-init", "ERK", "--init-density", "0.3"),
        *("--final-density", "0.1", "--growth", growth, "--sparse-compute", "on"),
    )
    topology = pd.read_csv(folder / "topology.csv")
    assert topology["step"].tolist() == [4, 8, 12, 15, 16, 20]
    assert (topology["grown"] > 0).all()
    for name, mask in weights(folder).items():
        if name.endswith("weight_mask"):
            assert not weights(folder)[name.removesuffix("_mask")][~mask].any()


def test_the_same_masks_for_fifty_updates_in_float64():
    masked = network("mlp", density=0.2, width=16)
    sparse = copy.deepcopy(masked)
    pairs = [(m, optimizer_of(m, "sgd")) for m in (masked, sparse)]
    for model, _ in pairs:
        remember(model, None)
    form = sparse_form(sparse)
    images, labels = batch(32)
    start = {name: mask.clone() for name, _, mask in masked_weights(masked)}
    for number in range(150):
        moves = number % 3 == 2
        (form.leave if moves else form.enter)(pairs[1][1])
        for model, optimizer in pairs:
            forward = form if model is sparse and not moves else model
            if not moves:
                step(forward, model, optimizer, images, labels)
                continue
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            update(model, Change("DST", fraction=0.3, seed=1, step=number))
            keep_inside(model, optimizer)
            for _, weight, mask in masked_weights(model):
                weight.grad.mul_(mask)
            optimizer.step()
        if moves:
            for (name, _, one), (_, _, other) in zip(*(masked_weights(m) for m, _ in pairs)):
                assert torch.equal(one, other), (number, name)
    moved = sum(int((start[n] & ~mask).sum()) for n, _, mask in masked_weights(masked))
    assert moved > 1000


def said(caplog):
    return [r.message for r in caplog.records if r.message.startswith("sparse compute")]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--amp", "bf16"], "--amp bf16 computes in a format"),
        (["--compile"], "--compile generates kernels of its own"),
    ],
)
def test_where_it_does_not_apply_it_is_said(run, caplog, monkeypatch, argv, reason):
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setattr(Trainer, "run_phases", lambda *_: None)
    monkeypatch.setattr(Trainer, "test", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run(*TINY, *argv)
    (line,) = said(caplog)
    assert reason in line
    with pytest.raises(OptionError, match=f"--sparse-compute: has no effect as on: {reason}"):
        run(*ON, *argv)


def test_what_has_no_sparse_form_is_said(caplog):
    caplog.set_level(logging.INFO, "startsparse")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())
    attach_masks(model, {"0": torch.ones(4, 3, 3, 3, dtype=torch.bool)})
    assert compute.Compute(model, model, mode="auto", shape=(3, 8, 8)).form is None
    assert said(caplog) == ["sparse compute: off, 1: GELU has no sparse form"]


def test_without_a_compiler_runs_are_masked_and_say_so_once(run, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("STARTSPARSE_CACHE", str(tmp_path / "cache"))
    kernels_for.cache_clear()
    folder = run(*ON, "--epochs", "1")
    (line,) = said(caplog)
    assert "there is no C++ compiler no-such-compiler" in line
    assert "computes" not in pd.read_csv(folder / "density.csv")
    kernels_for.cache_clear()


def test_it_is_said_before_the_kernels_are_built(caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO, "startsparse")
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such thing: error >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("STARTSPARSE_CACHE", str(tmp_path / "cache"))
    kernels_for.cache_clear()
    with pytest.raises(NoKernelsError, match="cannot build the kernels: no such"):
        kernels_for(torch.float32)
    assert caplog.messages == ["building the sparse kernels, about 15 s, once"]
    kernels_for.cache_clear()


def test_momentum_growth_stays_dense(run_dst, caplog):
    caplog.set_level(logging.INFO, "startsparse")
    argv = ["--sparse", "--model", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "256"]
    argv += ["--growth", "momentum"]
    run_dst(*argv)
    (line,) = said(caplog)
    why = "--growth momentum needs the gradients outside"
    assert why in line
    with pytest.raises(OptionError, match=f"--sparse-compute: has no effect as on: {why}"):
        run_dst(*argv, "--sparse-compute", "on")


@pytest.mark.parametrize("agree", [True, False])
def test_auto_decides_at_the_start_and_when_the_density_has_changed(
    run, caplog, monkeypatch, agree
):
    """At 0.2 all layers but the third gain, and the network; at 0.02 that one is tried.

    ``agree``: whether the times of the network do, and of the third layer when it is tried again.
    """
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setattr(compute, "_SMALL", 0.0)
    seconds = [
        *(1.8, 2.0, 1.0),  # of a layer: masked, dense between maps, sparse
        *(0.9, 2.0, 1.0),
        *(1.5, 1.0, 2.0),
        *(2.5, 2.0, 1.0),
        *(4.0, (2.0, agree)),  # of the network: masked, sparse
        *(5.0, 4.0, (1.0, agree)),
    ]
    left = (choice.Seconds(*(s if isinstance(s, tuple) else (s,))) for s in seconds)
    monkeypatch.setattr(choice, "cpu_seconds", lambda run, *_: (run(), next(left))[1])
    asked = []
    original = compute.choose

    def choose(form, images, classes, gain):
        asked.append((images.shape, classes, len(gain)))
        return original(form, images, classes, gain)

    monkeypatch.setattr(compute, "choose", choose)
    folder = run(
        *("--arch", "mlp", "--width", "64", "--epochs", "2", "--final_prune_epoch", "2"),
        *("--threshold-list", "0.19", "0.02", "--set", "digits", "-b", "128"),
    )
    assert asked == [(torch.Size([128, 3, 32, 32]), 10, known) for known in (0, 3)]
    assert [line.partition(": ")[2] for line in said(caplog)] == [
        "3 of 4 layers" + (", a step takes 0.50 of the masked network's CPU time" if agree else ""),
        "4 of 4 layers",
    ]
    assert list(left) == []
    table = pd.read_csv(folder / "density.csv")
    third = [5.0] if agree else []
    assert table["times_faster"].dropna().tolist() == pytest.approx([1.8, 0.9, *third, 2.5])
    state = checkpoint.load(folder / "checkpoint.pt")["compute"]
    assert len(state["computes"]) == 4
    assert state["density"] == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_decision_is_kept_from_the_moment_it_is_made(run, monkeypatch, epoch):
    """Gone before the first step after it, at the start and after a pruning."""
    monkeypatch.setattr(compute, "_SMALL", 0.0)
    clock(monkeypatch, 2.0, 1.0)
    argv = ["--arch", "mlp", "--width", "16", "--epochs", "1", "--final_prune_epoch", "1",
            "--threshold-list", "0.02", "--set", "digits", "-b", "256"]  # fmt: skip
    whole = run(*argv, where="whole")
    densities, epochs, train = [], [], trainer.train_epoch
    choose = compute.choose

    def counted(form, images, classes, _gain):
        densities.append(round(compute_density(form.model), 2))
        return choose(form, images, classes)  # everything is tried anew

    def gone(*args, **kwargs):
        epochs.append(1)
        if len(epochs) == epoch:
            raise Crash
        train(*args, **kwargs)

    monkeypatch.setattr(compute, "choose", counted)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(trainer, "train_epoch", gone)
        run(*argv, where="parts")
    assert same(whole, run(*argv, "--resume", "auto", where="parts"))
    assert densities == [0.2, 0.02]


def compute_density(model):
    masks = [mask for _, _, mask in masked_weights(model)]
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_auto_does_not_try_what_takes_no_time(run, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setattr(compute, "choose", lambda *_: pytest.fail("tried"))
    run("--arch", "mlp", "--width", "16", "--epochs", "1", "--set", "digits", "-b", "256")
    assert not said(caplog)
