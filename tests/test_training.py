"""One epoch against a plain loop, and what is said of a loss that is not finite."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from startsparse import parallel
from startsparse.errors import UserError
from startsparse.masks import attach_masks, masked_weights
from startsparse.training import (
    Learner,
    NonFiniteLoss,
    evaluate,
    first_bad_layer,
    means,
    new_sums,
    train_epoch,
)

CPU = torch.device("cpu")
OFF = parallel.autocast(CPU, "off")


class Fixed:
    """Three batches, the last one smaller."""

    def __init__(self):
        draws = torch.Generator().manual_seed(5)
        self.data = [
            (torch.randn(n, 6, generator=draws), torch.randint(3, (n,), generator=draws))
            for n in (8, 8, 3)
        ]
        self.examples = 19

    def __len__(self):
        return 3

    def epoch(self, epoch, start=0):
        yield from self.data[start:]


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    attach_masks(model, {"0": torch.rand(16, 6) < 0.5})
    return model


def optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def train(model, batches, **kwargs):
    sums = new_sums(CPU)
    learner = Learner(model, optimizer(model), **kwargs)
    train_epoch(learner, batches, lambda step: 0.1 / (step + 1), sums, epoch=0)
    return means(sums)


def test_an_epoch_is_the_plain_loop():
    model, batches = network(), Fixed()
    plain, loss_sum, hits = copy.deepcopy(model), 0.0, 0
    stepper = optimizer(plain)
    _, weight, mask = next(masked_weights(plain))
    for step, (x, y) in enumerate(batches.data):
        stepper.param_groups[0]["lr"] = 0.1 / (step + 1)
        logits = plain(x)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        stepper.zero_grad()
        loss.backward()
        weight.grad *= mask
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        stepper.step()
        loss_sum += loss.item() * len(y)
        hits += int((logits.argmax(1) == y).sum())
    result = train(model, batches, label_smoothing=0.1, clip_norm=0.5)
    assert result["loss"] == pytest.approx(loss_sum / 19)
    assert result["accuracy"] == pytest.approx(hits / 19)
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(mine, theirs)


def test_evaluation_counts_every_example_once_and_changes_nothing():
    model, batches = network(), Fixed()
    before = copy.deepcopy(model.state_dict())
    result = evaluate(model, model, batches, OFF, CPU)
    x, y = (torch.cat(part) for part in zip(*batches.data))
    logits = model.eval()(x)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, y).item())
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_that_are_not_finite_are_named_and_nothing_is_updated():
    model, batches = network(), Fixed()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"at step 1; weights of 3\.weight"):
        train(model, batches)
    assert torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_an_output_that_overflows_is_named():
    model, batches = network(), Fixed()
    batches.data[1][0].mul_(1e38)
    with torch.no_grad():
        model[0].weight.mul_(1e3)
    with pytest.raises(NonFiniteLoss, match="at step 2; output of 0"):
        train(model, batches)


def test_when_every_weight_is_bad_the_layer_cannot_be_told():
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert first_bad_layer(model, torch.ones(2, 6), OFF) == ""


def test_devices_without_cuda(monkeypatch, capsys):
    import startsparse.runs  # noqa: F401 - says what is logged on standard output

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.choose_devices("") == [CPU]
    assert capsys.readouterr().out == ""
    assert parallel.choose_devices("0") == [CPU]
    said = "--multigpu 0: there is no CUDA here, the CPU is used\n"
    assert capsys.readouterr().out == said


def test_devices_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.choose_devices("") == [torch.device("cuda", 0)]
    assert parallel.choose_devices("1,0,1") == [torch.device("cuda", 1), torch.device("cuda", 0)]
    with pytest.raises(UserError, match="--multigpu: there is no GPU 2 here; name some of 0 to 1"):
        parallel.choose_devices("0,2")


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_named_at_the_end_of_the_epoch():
    device = torch.device("cuda", 0)
    model, batches = network().to(device), Fixed()
    batches.data[1][0].fill_(torch.inf)
    batches.data = [(x.to(device), y.to(device)) for x, y in batches.data]
    sums = new_sums(device)
    with pytest.raises(NonFiniteLoss, match="at step 2"):
        train_epoch(Learner(model, optimizer(model)), batches, lambda _: 0.1, sums, epoch=0)
