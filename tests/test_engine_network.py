"""Whole networks in their sparse form against the masked ones, and what has no sparse form."""

import copy
import os
import re
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from engine_runs import (
    SHAPE,
    WIDTHS,
    batch,
    clock,
    equal_states,
    network,
    optimizer_of,
    sparse_form,
    step,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from startsparse.engine import build, choice
from startsparse.engine.choice import choose
from startsparse.engine.compiler import NoKernelsError
from startsparse.engine.kernels import kernels_for
from startsparse.engine.lowering import UnsupportedError, lower
from startsparse.engine.network import SparseForm
from startsparse.masks import (
    attach_masks,
    draw_masks,
    keep_inside,
    masked_weights,
    sparse_layers,
)


@pytest.mark.parametrize("arch", WIDTHS)
@pytest.mark.parametrize("dense", ["none", "some"])
def test_ten_steps_are_those_of_the_masked_network(arch, dense):
    # VGG halves its maps four times; of ResNet-50 smaller ones magnify rounding too much.
    shape = (3, 16, 16) if arch in ("resnet18", "resnet20") else SHAPE
    for kind in ("sgd", "adam"):
        masked, sparse = network(arch), network(arch)
        one, other = optimizer_of(masked, kind), optimizer_of(sparse, kind)
        names = list(sparse_layers(sparse))
        form = sparse_form(sparse, names[::2] if dense == "some" else (), shape)
        images, labels = batch(shape=shape)
        for i in range(10):
            form.enter(other)
            losses = [
                step(forward, model, optimizer, images, labels)
                for forward, model, optimizer in ((masked, masked, one), (form, sparse, other))
            ]
            assert losses[0] == pytest.approx(losses[1], rel=1e-8)
            if i % 4 == 3:  # and go on in the sparse form
                form.leave(other)
        form.leave(other)
        equal_states(masked, sparse, 1e-6)
        states = one.state_dict()["state"], other.state_dict()["state"]
        assert states[0].keys() == states[1].keys()
        for number, state in states[0].items():
            for key, tensor in state.items():
                assert (tensor - states[1][number][key]).abs().max() <= 1e-6
        for _, weight, mask in masked_weights(sparse):
            assert not weight[~mask].any()
        masked.eval(), sparse.eval()
        with form.within(), torch.inference_mode():
            assert (form(images) - masked(images)).abs().max() < 1e-6


def test_in_float32_it_is_as_exact_as_pytorch():
    exact, masked, sparse = network("vgg11"), *(network("vgg11").float() for _ in range(2))
    images, labels = batch(32)
    form = sparse_form(sparse)
    F.cross_entropy(exact(images), labels).backward()
    F.cross_entropy(masked(images.float()), labels).backward()
    with form.within():
        F.cross_entropy(form(images.float()), labels).backward()
        for name, layer in form.layers.items():
            expected, theirs = (
                model.get_submodule(name).weight.grad.reshape(-1)[layer.flat]
                for model in (exact, masked)
            )
            mine = (layer.values.grad - expected).norm()
            assert mine < max(3 * (theirs - expected).norm(), 1e-5 * expected.norm()), name


def test_entering_and_leaving_changes_nothing():
    model = network("resnet20")
    optimizer = optimizer_of(model, "sgd")
    step(model, model, optimizer, *batch())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    form = sparse_form(model)
    form.enter(optimizer)
    assert sum(p.numel() for p in model.parameters()) < 1000  # the weights are in the form
    form.leave(optimizer)
    after = model.state_dict(), optimizer.state_dict()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name])
        assert tensor.stride() == after[0][name].stride()
    for number, state in before[1]["state"].items():
        assert torch.equal(state["momentum_buffer"], after[1]["state"][number]["momentum_buffer"])
    assert before[1]["param_groups"] == after[1]["param_groups"]


def test_what_is_stored_is_as_large_as_the_masks():
    model = network("mlp", density=0.05, width=200)
    optimizer = optimizer_of(model, "adam")
    form = sparse_form(model)
    form.enter(optimizer)
    step(form, model, optimizer, *batch())
    kept = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    others = sum(p.numel() for p in model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == kept + others
    assert sum(p.grad.numel() for p in held if p.grad is not None) == kept + others
    moments = [s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values()]
    assert sum(moments) == 2 * (kept + others)
    form.leave(optimizer)


def test_masks_that_change_are_listed_anew():
    model = network("vgg11")
    form = sparse_form(model)
    images, _ = batch()
    with form.within():
        form(images)
    for name, _, mask in masked_weights(model):
        draw = torch.Generator().manual_seed(len(name))
        mask.copy_(torch.rand(mask.shape, generator=draw) < 0.2)
    keep_inside(model)
    other = copy.deepcopy(model)
    with form.within():
        assert (form(images) - other(images)).abs().max() < 1e-8


class Odd(nn.Module):
    def __init__(self, *layers, call=None):
        super().__init__()
        self.layers, self.call = nn.Sequential(*layers), call

    def forward(self, x):
        x = self.layers(x)
        return x if self.call is None else self.call(x)


def conv(**options):
    return nn.Conv2d(3, 6, 3, **options)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Odd(conv(), nn.GELU()), "layers.1: GELU has no sparse form"),
        (Odd(conv(groups=3)), "layers.0: groups, dilation or padding mode"),
        (Odd(conv(dilation=2)), "layers.0: groups, dilation or padding mode"),
        (Odd(conv(padding="same")), "layers.0: padding 'same'"),
        (Odd(conv(), nn.MaxPool2d(2, ceil_mode=True)), "layers.1: MaxPool2d"),
        (Odd(conv(), nn.AdaptiveAvgPool2d(2)), "layers.1: only a global average"),
        (Odd(conv(), call=lambda x: x.flatten(1)), "a flatten of pixels"),
        (Odd(conv(), call=lambda x: x + 1), "an addition of something else"),
        (
            Odd(conv(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 3, padding=1)),
            "a padded convolution after a global average",
        ),
        (Odd(conv(), call=lambda x: x.mean(1)), "a mean over something else"),
        (Odd(conv(), call=lambda x: x[:, :2]), "a slice of something else"),
        (Odd(conv(), call=torch.sin), "sin has no sparse form"),
        (Odd(conv(), call=lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
        (Odd(nn.Linear(32, 4)), "a linear layer on pixels"),
        (Odd(nn.ReLU()), "a ReLU without a product"),
    ],
)
def test_what_has_no_sparse_form_is_named(model, reason):
    with pytest.raises(UnsupportedError) as error:
        lower(model, SHAPE)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_other_networks():
    """Biases, a ReLU after an addition of two branches, BatchNorm after ReLU, odd strides."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = conv(stride=2, padding=1), conv(stride=2, padding=1)
            self.norm, self.pool = nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)
            self.three = nn.Conv2d(6, 5, (3, 1), stride=(1, 3), padding=(0, 1))
            self.last, self.end = nn.BatchNorm2d(5), nn.Linear(5, 4)

        def forward(self, x):
            x = torch.relu(self.norm(self.one(x)) + self.two(x))
            x = self.last(self.three(self.pool(x)).relu())
            return self.end(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Branches().double()
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.5] * len(shapes), 1, "bernoulli"))
    other, (images, labels) = copy.deepcopy(model), batch()
    form = sparse_form(model)
    expected = torch.autograd.grad(
        F.cross_entropy(other(images), labels % 4), list(other.parameters())
    )
    with form.within():
        loss = F.cross_entropy(form(images), labels % 4)
        loss.backward()
        for name, gradient in zip(dict(other.named_parameters()), expected):
            owner, _, kind = name.rpartition(".")
            mine = model.get_submodule(owner)
            if kind == "weight" and owner in form.layers:
                product = form.layers[owner]
                gradient = gradient.reshape(-1)[product.flat]
                assert (product.values.grad - gradient).abs().max() < 1e-10, name
            else:
                assert (getattr(mine, kind).grad - gradient).abs().max() < 1e-10, name


@pytest.mark.parametrize(("sparse", "ratio"), [(0.5, 0.5), (0.97, 0.97), (2.0, None)])
def test_the_choice_takes_the_faster_and_leaves_everything_as_it_was(monkeypatch, sparse, ratio):
    clock(monkeypatch, 1.0, sparse)
    model = network("vgg11", density=0.1, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    form = SparseForm(model, SHAPE)
    found = choose(form, batch(32, torch.float32)[0], classes=10)
    assert found.layers == pytest.approx(dict.fromkeys(form.layers, 1 / sparse))
    assert found.ratio == ratio
    assert form.computes == found.computes == (set(form.layers) if sparse < 0.95 else set())
    assert not form.entered
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("seconds", "fastest", "agree", "runs"),
    [
        ([1.0, 1.05], 1.0, True, 2),
        ([1.0, 1.5, 1.0], 1.0, False, 2),  # long enough
        ([0.013, 0.01, 0.016, 0.0105, 1], 0.01, True, 4),
        ([0.01, 0.02, 0.03, 0.04, 0.05, 0.01], 0.01, False, 5),
    ],
)
def test_tries_until_two_agree(monkeypatch, seconds, fastest, agree, runs):
    now, left = [0.0], iter([99.0, *seconds])  # the first run is not timed
    monkeypatch.setattr(choice.time, "process_time", lambda: now[0])

    def run():
        now[0] += next(left)

    found = choice.cpu_seconds(run, 10)
    assert (10 * found.fastest, found.agree) == (pytest.approx(fastest), agree)
    assert len(list(left)) == len(seconds) - runs


def test_what_is_short_is_repeated(monkeypatch):
    """The clock ticks every millisecond, and a run takes a tenth of that."""
    runs = []
    monkeypatch.setattr(choice.time, "process_time", lambda: (len(runs) + 9) // 10 / 1000)
    found = choice.cpu_seconds(lambda: runs.append(1))
    assert found.fastest == pytest.approx(1e-4, rel=0.6)
    assert len(runs) > 40


def test_the_time_of_the_processor_counts_that_of_all_threads():
    assert choice.cpu_seconds(lambda: time.sleep(0.001)).fastest < 0.0005

    def works():
        started = time.thread_time()
        while time.thread_time() < started + 0.02:
            pass

    def works_elsewhere():
        thread = threading.Thread(target=works)
        thread.start()
        thread.join()

    assert 0.02 <= choice.cpu_seconds(works_elsewhere).fastest < 0.04


def test_a_ratio_of_times_that_disagree_is_none():
    steady, other = choice.Seconds(2.0), choice.Seconds(4.0, agree=False)
    assert steady.over(choice.Seconds(4.0)) == 0.5
    assert steady.over(choice.Seconds(0.0)) is None  # a coarse clock
    assert steady.over(other) is other.over(steady) is None


@pytest.mark.parametrize("name", ["vgg11", "mlp", "resnet20"])
def test_layers_are_timed_as_the_masked_network_computes_them(monkeypatch, name):
    """On the batch, the same products and gradients: FLOPs."""
    model = network(name, density=0.1, width=8, dtype=torch.float32)
    form, counted = SparseForm(model, SHAPE), {}

    def timed(both, images, needs_input):
        def count(run, of):
            with FlopCounterMode(display=False) as counter:
                run()
            counted[both.name] = counter.get_total_flops() / of
            return choice.Seconds(1.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "cpu_seconds", count)
            return original(both, images, needs_input)

    original = choice._masked
    clock(monkeypatch, 1.0, 2.0)
    monkeypatch.setattr(choice, "_masked", timed)
    choose(form, batch(32, torch.float32)[0], classes=10)
    assert counted.keys() == form.layers.keys()

    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(
            model(batch(32, torch.float32)[0]), batch(32)[1]
        ).backward()
    assert sum(counted.values()) == pytest.approx(counter.get_total_flops() / 32)


def test_dense_layers_are_not_tried():
    model = network("vgg11", density=0.9, width=4)
    found = choose(SparseForm(model, SHAPE), batch(16)[0], classes=10)
    assert (found.layers, found.computes) == ({}, frozenset())


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C++ compiler no-such-compiler"), ("false", "exit code 1")],
)
def test_without_a_compiler_it_is_said(compiler, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("STARTSPARSE_CACHE", str(tmp_path / "cache"))
    kernels_for.cache_clear()
    with pytest.raises(NoKernelsError, match=re.escape(reason)):
        SparseForm(network("mlp"), SHAPE)
    assert not list(tmp_path.rglob("*.so*"))
    monkeypatch.undo()
    kernels_for.cache_clear()
    SparseForm(network("mlp"), SHAPE)


def test_kernels_are_built_once(monkeypatch, tmp_path):
    compiler = tmp_path / "quick-g++"  # of two -O the last counts
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("STARTSPARSE_CACHE", str(tmp_path / "cache"))
    kernels_for.cache_clear()
    kernels_for(torch.float32)
    (built,) = (tmp_path / "cache").iterdir()
    at = built.stat().st_mtime_ns
    kernels_for.cache_clear()
    monkeypatch.setattr(build, "compiled", lambda *_: pytest.fail("built again"))
    kernels_for(torch.float32)
    assert built.stat().st_mtime_ns == at
    kernels_for.cache_clear()


@pytest.mark.parametrize("arch", WIDTHS)
@pytest.mark.parametrize("dense", ["none", "some"])
def test_single_images(arch, dense):
    model = network(arch)
    model(batch()[0])  # running statistics that are not 0 and 1
    model.eval()
    form = sparse_form(model, without=list(sparse_layers(model))[::2] if dense == "some" else ())
    images = batch(3)[0]
    with torch.inference_mode(), form.within():
        one_by_one = form(images)
        together = form.program(images)
    assert (one_by_one - together).abs().max() < 1e-10
    with torch.no_grad(), form.within():  # after a change of the weights
        for parameter in [*model.parameters(), *(x.values for x in form.layers.values())]:
            parameter.mul_(1.1)
        assert (form(images) - form.program(images)).abs().max() < 1e-10
