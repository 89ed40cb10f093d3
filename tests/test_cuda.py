"""Every script on a real GPU: what the pretended one of other tests cannot tell."""

import json
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from script_runs import Crash, crashing, same, weights
from torch import nn

from benchmarks.gpu import measure, networks
from startsparse import checkpoint, parallel
from startsparse.trainer import Trainer

pytestmark = pytest.mark.gpu

FEW = "--width 4 --batch-size 32 --epochs 2"
DST = f"--model resnet20 {FEW} --sparse --update-frequency 3 --init-density 0.5"
SLT = f"--model resnet20 {FEW} --epochs 1 --levels 2 --er-init-density 0.6 --sparsity 0.2"
RUNS = {
    "dense": ("run", f"--arch resnet20 {FEW} --conv-type DenseConv"),
    "masked": ("run", f"--arch resnet20 {FEW}"),
    "soft": ("run", f"--arch resnet20 {FEW} --conv-type STRConvER --sInit-value -3"),
    "levels": ("run", f"--arch resnet20 {FEW} --er-sparse-init 0.5 --final-prune-epoch 1 "
                      "--threshold-list 0.3 --rewind weights --warmup-epochs 1"),
    "snip": ("run", f"--arch resnet20 {FEW} --er-sparse-init 0.5 --final-prune-epoch 1 "
                    "--threshold-list 0.3 --pruner snip"),
    "graph": ("run", "--set karate --arch gcn --epochs 4 --optimizer adam --er-sparse-init 0.5"),
    "granet": ("run_dst", f"{DST} --final-density 0.2 --flow-preservation always"),
    "momentum": ("run_dst", f"{DST} --method DST --growth momentum"),
    "random": ("run_dst", f"{DST} --method DST --growth random"),
    "popup": ("run_slt", SLT),
    "popup global": ("run_slt", f"{SLT} --global"),
}  # fmt: skip
STEPS = [name for name in RUNS if name != "graph"]  # each epoch of a graph is one step


@pytest.fixture
def script(request, tmp_path, few_images, no_pictures):
    """Run one of `RUNS` in the folder ``where``; returns the run folder."""

    def run(name, *more, where="a"):
        fixture, line = RUNS[name]
        argv = [*line.split(), *more]
        if fixture == "run_slt":
            from slt_runs import slt

            return slt(tmp_path / where, *argv)
        return request.getfixturevalue(fixture)(*argv, where=where)

    return run


@contextmanager
def ordinary_steps(enter, leave):
    """Call ``enter`` and ``leave`` around what a step does that moves no masks."""
    before, after = Trainer.before_step, Trainer.after_step

    def before_step(trainer, method, step):
        before(trainer, method, step)
        # The first steps of a process load kernels, and may take long enough for the progress bar.
        if step > 2 and not method.moves_masks(step):
            enter()

    def after_step(trainer, method, step):
        leave()
        after(trainer, method, step)

    with (
        patch.object(Trainer, "before_step", before_step),
        patch.object(Trainer, "after_step", after_step),
    ):
        try:
            yield
        finally:
            leave()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_repeats_and_resumes_to_the_bit(name, script):
    first, again = script(name, where="a"), script(name, where="b")
    assert weights(first)
    assert same(first, again)
    with patch.object(Trainer, "save", crashing("after", 2)), pytest.raises(Crash):
        script(name, "--save-every", "2", where="c")
    assert same(first, script(name, "--save-every", "2", "--resume", "auto", where="c"))


@pytest.mark.parametrize("name", STEPS)
def test_ordinary_steps_wait_for_nothing(name, script):
    entered = []

    def enter():
        entered.append(1)
        torch.cuda.set_sync_debug_mode("error")

    with ordinary_steps(enter, lambda: torch.cuda.set_sync_debug_mode("default")):
        script(name)
    assert len(entered) >= 4


@pytest.mark.parametrize("name", STEPS)
def test_products_are_in_bf16(name, script):
    seen = set()

    def note(_module, _inputs, output):
        seen.add(output.dtype)

    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *rest: note(module, *rest) if isinstance(module, nn.Conv2d) else None
    )
    try:
        script(name)
    finally:
        hook.remove()
    if torch.cuda.is_bf16_supported():  # the FLOPs are counted in float32, too
        assert torch.bfloat16 in seen
    assert torch.float16 not in seen


@pytest.mark.parametrize("name", ["masked", "levels", "granet", "momentum", "random"])
def test_weights_stay_inside_masks_of_the_density_asked_for(name, script):
    folder = script(name, "--er-sampling", "exact")
    state = checkpoint.load(folder / "checkpoint.pt")["model"]
    masks = {key: mask for key, mask in state.items() if key.endswith("weight_mask")}
    assert masks
    for key, mask in masks.items():
        assert not state[key.removesuffix("_mask")][~mask.bool()].any()
    summary = json.loads((folder / "summary.json").read_text())
    if name != "granet":  # whose flow preservation may add some
        assert summary["kept"] == round(summary["requested"] * summary["weights"])


@pytest.mark.parametrize("name", ["masked", "soft", "granet", "popup global"])
def test_in_float32_a_gpu_learns_what_a_cpu_learns(name, script, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flags = ["--amp", "off", "--epochs", "1", "--lr", "0.01", "--sparse-compute", "off"]
    gpu = checkpoint.load(script(name, *flags, where="gpu") / "checkpoint.pt")
    monkeypatch.setattr(parallel, "choose_devices", lambda _: [torch.device("cpu")])
    cpu = checkpoint.load(script(name, *flags, where="cpu") / "checkpoint.pt")
    one, other = gpu["history"][-1], cpu["history"][-1]
    assert one["density"] == pytest.approx(other["density"], abs=1e-4)
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)


@pytest.mark.parametrize("growth", ["gradient", "momentum", "random"])
def test_an_update_launches_and_waits_little(growth):
    sizes = networks.Sizes(torch.device("cuda", 0), arch="resnet20", batches=(32,), examples=640)
    whole = networks.batches(sizes, 32)
    never, always = (
        networks.Program(networks.DROP_AND_GROW, whole, sizes, every=every, growth=growth)
        for every in (networks.NEVER, 1)
    )
    launches = [measure.per_step(side.epoch, sizes)[0]["launches"] for side in (never, always)]
    assert launches[1] - launches[0] <= 150
    assert sum(measure.waits(always, 4).values()) <= 2


@pytest.mark.parametrize(
    ("kind", "most"),
    [("ConvMask", 1.2), ("STRConvER", 2.5), *((kind, 2.5) for kind in networks.POPUP)],
)
def test_a_step_launches_little_more_than_a_dense_one(kind, most):
    sizes = networks.Sizes(torch.device("cuda", 0), arch="resnet20", batches=(32,), examples=640)
    whole = networks.batches(sizes, 32)
    mine, dense = (
        measure.per_step(networks.Program(k, whole, sizes).epoch, sizes)[0]["launches"]
        for k in (kind, networks.DENSE)
    )
    assert mine / dense <= most


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", ["masked", "soft", "granet", "popup global"])
def test_two_gpus_learn_what_one_learns_in_the_same_format(name, script):
    seen = {}
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: (
            seen.setdefault(str(output.device), set()).add(output.dtype)
            if isinstance(module, nn.Conv2d)
            else None
        )
    )
    try:
        both = script(name, "--multigpu", "0,1", where="both")
    finally:
        hook.remove()
    assert len(seen) >= 2
    assert not any(torch.float16 in dtypes for dtypes in seen.values())
    one = script(name, where="one")
    losses = [checkpoint.load(f / "checkpoint.pt")["history"][-1] for f in (both, one)]
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=0.2)
