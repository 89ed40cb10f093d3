"""Small networks trained in their sparse forms: what they become, and when it is done."""

import copy
import logging

import pytest
import torch
from batched_runs import RECIPES, compare, networks, part
from engine_runs import clock

from startsparse.engine.choice import Seconds
from startsparse.engine.kernels import kernels_for
from startsparse.tabular import compute
from startsparse.tabular.batched import train_loop
from startsparse.tabular.compute import sparse_forms

RECIPE = RECIPES["sgd"]


def some(dtype=torch.float32):
    """Networks of density 0.1 and 0.03, and their parts."""
    return networks(dtype)[3:], [part(seed, dtype) for seed in (3, 4)]


def said(caplog):
    return [r.message for r in caplog.records if r.message.startswith("sparse compute")]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_equals_the_masked_networks(name):
    """24 steps in float64, of which the first network has all its weights."""
    parts = [part(seed, torch.float64) for seed in (1, 1, 2, 3, 4)]
    one, other = networks(torch.float64), networks(torch.float64)
    forms = sparse_forms(one, parts, RECIPES[name], mode="on", loop="batched")
    assert all(len(form.computes) == 4 for form in forms)
    losses = train_loop(one, parts, RECIPES[name], 4, 3, forms)
    expected = train_loop(other, parts, RECIPES[name], 4, 3)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    compare(one, other, name, torch.float64, rtol=1e-9, atol=1e-11)
    assert not any(form.entered for form in forms)


@pytest.mark.parametrize(
    ("alone", "share", "agree"), [(0.3, 0.6, True), (0.3, 0.6, False), (0.6, 1.2, True)]
)
@pytest.mark.parametrize("loop", ["batched", "loop"])
def test_auto_takes_the_faster_and_leaves_the_networks_as_they_were(
    monkeypatch, caplog, alone, share, agree, loop
):
    """Two networks take one second together; one in its sparse form takes ``alone``."""
    caplog.set_level(logging.INFO, "startsparse")
    models, parts = some()
    before, original, asked = copy.deepcopy(models), compute._seconds, []

    def seconds(models, parts, recipe, train, **how):
        asked.append((train, len(models)))
        original(models, parts, recipe, train, **how)
        return Seconds(alone if how else 1.0, agree)

    monkeypatch.setattr(compute, "_seconds", seconds)
    clock(monkeypatch, 2.0, 1.0)  # of the layers, and of one network
    forms = sparse_forms(models, parts, RECIPE, mode="auto", loop=loop)
    assert asked == [(compute.LOOPS[loop], 2), (train_loop, 1)]
    (line,) = said(caplog)
    if share < 1:
        assert line.endswith(
            "4 of 4 layers at density 0.0884"
            + (f", training takes {share:.2f} of the masked CPU time" if agree else "")
        )
        assert all(len(form.computes) == 4 for form in forms)
    else:
        assert line.endswith("not at density 0.0884, it would be slower")
        assert forms == []
    for model, old in zip(models, before):
        for name, tensor in old.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_auto_does_not_try_dense_networks(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setattr(compute, "_seconds", lambda *_: pytest.fail("tried"))
    assert sparse_forms(networks()[:1], [part(1)], RECIPE, mode="auto", loop="loop") == []
    assert said(caplog) == ["sparse compute: not at density 1, it would be slower"]


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_without_a_compiler_it_is_masked_and_said_once(monkeypatch, caplog, tmp_path, mode):
    caplog.set_level(logging.INFO, "startsparse")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("STARTSPARSE_CACHE", str(tmp_path))
    caches = kernels_for, compute._has_kernels
    for cache in caches:
        cache.cache_clear()
    for _ in range(2):
        assert sparse_forms(*some(), RECIPE, mode=mode, loop="batched") == []
    lines = said(caplog)
    assert len(lines) == (mode != "off")
    assert all("there is no C++ compiler no-such-compiler" in line for line in lines)
    for cache in caches:
        cache.cache_clear()
