"""--compile compiles a network twice, for training and evaluation, whatever happens to it."""

import pytest
import torch
from torch import nn

from startsparse import parallel
from startsparse.compiled import Compiled

pytestmark = pytest.mark.usefixtures("few_images", "no_pictures")

MLP = [
    *("--arch", "mlp", "--width", "8", "--batch-size", "16", "--epochs", "2"),
    *("--compile", "--sparse-compute", "off"),
]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled: whether they are for training, the rows of the input, calls."""
    found, compile = [], torch.compile

    def backend(module, inputs):
        graph = {"trains": torch.is_grad_enabled(), "calls": 0}
        found.append(graph)

        def call(*args):
            graph["calls"] += 1
            return module.forward(*args)

        return call

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend=backend, **how))
    monkeypatch.setattr(parallel, "check_compile", lambda _: None)
    yield found
    torch._dynamo.reset()


def check(graphs, *calls):
    """11 of 12 training batches have 16 images, 1 of 2 validation batches."""
    assert [graph["trains"] for graph in graphs] == [True, False]
    assert [graph["calls"] for graph in graphs] == list(calls)


def test_levels_and_rewinds(run, graphs):
    levels = ["--threshold-list", "0.1", "--rewind", "weights", "--final_prune_epoch", "1"]
    run(*MLP, "--config", "", *levels, "--warmup-epochs", "1")
    # 4 epochs; 4 validations and another after pruning; 2 tests of 2 whole batches.
    check(graphs, 4 * 11, 5 + 2 * 2)


def test_masks_that_move(run_dst, graphs):
    run_dst(*MLP, "--sparse", "--update-frequency", "4")
    check(graphs, 2 * 11, 2 + 2)


def test_levels_of_tickets(run_slt, graphs):
    run_slt("--dataset", "DIGITS", *MLP, "--levels", "2", "--epochs", "1")
    check(graphs, 2 * 11, 2 + 2 * 2)


def test_small_batches_are_computed_by_the_network_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _, **__: lambda x: x * 0)
    network = nn.Linear(3, 2)
    compiled, x = Compiled(network, 4), torch.ones(5, 3)
    assert torch.equal(compiled(x[:3]), network(x[:3]))
    assert torch.equal(compiled(x[:4]), x[:4] * 0)
    assert torch.equal(compiled(x), x * 0)
