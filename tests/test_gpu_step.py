"""A training step on the pretended GPU: what it launches, what it draws, and how it diverges."""

import copy

import pytest
import torch
from torch import nn

from startsparse import seeding
from startsparse.optimizers import OPTIMIZERS, make_optimizer
from startsparse.totals import Totals
from startsparse.training import Learner, NonFiniteLoss, new_sums, train_epoch

STEPS = 6
BAD = 3  # step whose loss is not finite


class Batches:
    """``STEPS`` batches, one of which overflows in the first layer."""

    def __init__(self, device, bad=BAD):
        draws = torch.Generator().manual_seed(5)
        self.data = [torch.randn(8, 6, generator=draws) for _ in range(STEPS)]
        if bad is not None:
            self.data[bad].mul_(1e38)
        self.data = [x.to(device) for x in self.data]
        self.labels = (torch.arange(8) % 3).to(device)
        self.examples = 8 * STEPS

    def __len__(self):
        return STEPS

    def epoch(self, _epoch, start=0):
        yield from ((x, self.labels) for x in self.data[start:])


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e3)
    return model


def diverged(device):
    """Of each optimizer: the message, and the sums of the weights that are left."""
    found = {}
    for kind in OPTIMIZERS:
        model = network().to(device)
        stepper = make_optimizer(kind, model.parameters(), lr=0.1, momentum=0.9, nesterov=False)
        learner = Learner(model, stepper, seed=1)
        with pytest.raises(NonFiniteLoss) as error:
            train_epoch(learner, Batches(device), lambda _: 0.1, new_sums(device), epoch=0)
        found[kind] = [str(error.value), *(p.sum().item() for p in model.parameters())]
    return found


def on_gpu(_log):
    return diverged(torch.device("cuda", 0))


def test_a_loss_that_is_not_finite_is_named_as_on_the_cpu(gpu):
    """Nothing looks at it before the epoch ends, and the weights have waited."""
    expected = diverged(torch.device("cpu"))
    assert all(row[0].endswith(f"at step {BAD + 1}; output of 0") for row in expected.values())
    assert gpu.call(on_gpu) == expected


def launches(log):
    """Of an optimizer step in the loop and bare, and of the sums alone."""
    device, found = torch.device("cuda", 0), {}
    model, batches = network().to(device), Batches(device, None)
    bare = copy.deepcopy(model)
    steppers = [
        make_optimizer("sgd", m.parameters(), lr=0.1, momentum=0.9, nesterov=False)
        for m in (model, bare)
    ]
    learner, sums = Learner(model, steppers[0], seed=1), new_sums(device)
    train_epoch(learner, batches, lambda _: 0.1, sums, epoch=0)
    with log.counting() as loop:
        train_epoch(learner, batches, lambda _: 0.1, sums, epoch=0)
    for x in (batches.data[0], *batches.data):
        with log.counting() as step:
            loss = nn.functional.cross_entropy(bare(x), batches.labels)
            for parameter in bare.parameters():
                parameter.grad = None
            loss.backward()
            steppers[1].step()
    totals = Totals(sums)
    with log.counting() as adding, torch.no_grad():
        totals.add(loss.detach(), bare(x), batches.labels, 0)
    with log.counting() as forward, torch.no_grad():
        bare(x)
    found["more"] = loop["launches"] / STEPS - step["launches"]
    found["sums"] = adding["launches"] - forward["launches"]
    found["waits"] = loop["waits"]
    return found


def test_the_loop_adds_few_launches_to_a_step_and_waits_only_at_its_end(gpu):
    found = gpu.call(launches)
    assert found["sums"] <= 13
    assert found["more"] <= 15  # the sums; whether to hold the weights; the end of the epoch
    assert found["waits"] <= 1


def draws(_log):
    device = torch.device("cuda", 0)
    model, seen = network().to(device), []
    model.register_forward_pre_hook(
        lambda *_: seen.append([torch.rand(2, device=device).tolist(), torch.rand(2).tolist()])
    )
    learner = Learner(model, torch.optim.SGD(model.parameters(), 0.1), seed=5)
    train_epoch(learner, Batches(device, None), lambda _: 0.1, new_sums(device), epoch=7)
    return seen


def test_generators_of_the_gpu_are_seeded_in_each_step_too(gpu):
    for step, (there, here) in enumerate(gpu.call(draws)):
        torch.manual_seed(seeding.derive(5, "step", 7, step))
        assert here == torch.rand(2).tolist()
        torch.manual_seed(seeding.derive(5, "step", 7, step))
        assert there == torch.rand(2).tolist()  # a pretended GPU draws as the CPU does
