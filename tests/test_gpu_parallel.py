"""DataParallel on two pretended GPUs: what its threads must be told, and all kinds of runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from startsparse import parallel, training

DEVICES = [torch.device("cuda", index) for index in range(2)]

STR_MLP = "--arch", "mlp", "--width", "16"
MLP = "--model", "mlp", "--width", "16"
RUNS = {
    "mlp": (),
    "masked": ("--lr", "0.01"),  # with layers that BatchNorm does not hold back
    "soft": STR_MLP,
    "levels": STR_MLP,
    "algorithmic": (),
    "granet": MLP,
    "rigl": (),
    "set": (),
    "popup-layer": MLP,
    "popup-global": MLP,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_gpus_is_that_on_one_within_rounding(gpu, name):
    run = gpu(name, *RUNS[name], gpus=2)
    assert "error" not in run, run["error"]
    assert run["products"] == {"cuda:0": ["float32"], "cuda:1": ["float32"]}
    assert "step" not in run["waits"]  # none in an ordinary step
    assert run["distance"] < 1e-5


@pytest.mark.parametrize("name", ["mlp", "granet", "popup-global"])
def test_a_run_on_two_gpus_is_resumed(gpu, name):
    run = gpu.resumed(name, *RUNS[name], gpus=2)
    assert "error" not in run, run["error"]
    assert run["differs"] == ""


@pytest.mark.parametrize("name", ["mlp", "rigl", "popup-layer"])
def test_both_gpus_compute_in_bf16_by_default(gpu, name):
    run = gpu(name, *RUNS[name], "--amp", "auto", gpus=2)
    assert "error" not in run, run["error"]
    for device in map(str, DEVICES):
        assert "bfloat16" in run["products"][device]
        assert "float16" not in run["products"][device]


class Watched(nn.Linear):
    """Notes in which state it was called."""

    seen: set

    def forward(self, inputs):
        outputs = super().forward(inputs)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.seen.add((outputs.device.index, str(outputs.dtype), *modes))
        return outputs


def states(_log):
    """States of the replicas in training and evaluation, and how far the logits are from one's."""
    torch.manual_seed(1)
    network = nn.Sequential(Watched(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(DEVICES[0])
    network[0].seen = set()
    both = parallel.parallel(network, DEVICES)
    inputs = torch.randn(10, 4).to(DEVICES[0])
    labels = (torch.arange(10) % 3).to(DEVICES[0])
    with parallel.autocast(DEVICES[0], "auto"):
        logits = both(inputs)
    F.cross_entropy(logits, labels).backward()
    trained, network[0].seen = network[0].seen, set()
    batches = type("Batches", (), {"epoch": lambda *_: iter([(inputs, labels)])})
    training.evaluate(network, both, batches(), parallel.autocast(DEVICES[0], "auto"), DEVICES[0])
    evaluated, network[0].seen = network[0].seen, set()
    with parallel.autocast(DEVICES[0], "auto"):
        difference = (network(inputs) - logits).abs().max().item()
    return [sorted(trained), sorted(evaluated), difference, network[0].weight.grad is not None]


def test_replicas_compute_as_the_thread_that_asks_them(gpu):
    trained, evaluated, difference, learns = gpu.call(states, gpus=2)
    assert trained == [[index, "torch.bfloat16", True, False] for index in range(2)]
    assert evaluated == [[index, "torch.bfloat16", False, True] for index in range(2)]
    assert difference == 0
    assert learns
