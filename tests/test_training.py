"""One epoch against a plain loop, and what is said of a loss that is not finite."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from startsparse import parallel, seeding, totals
from startsparse.errors import UserError
from startsparse.masks import attach_masks, masked_weights
from startsparse.optimizers import OPTIMIZERS, make_optimizer
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


# --- sums, and losses that are seen late ----------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    """Sums on the CPU are looked at as rarely as those on a GPU."""
    monkeypatch.setattr(totals, "is_late", lambda _: True)


def added(batches):
    sums = new_sums(CPU)
    adding = totals.Totals(sums)
    for step, batch in enumerate(batches):
        adding.add(*batch, step)
    adding.fold()
    return sums.tolist()


def drawn(count, size, classes):
    draws = torch.Generator().manual_seed(1)
    for _ in range(count):
        labels = torch.randint(-1, classes, (size,), generator=draws)
        yield torch.rand((), generator=draws), torch.rand(size, classes, generator=draws), labels


@pytest.mark.parametrize(("count", "size"), [(1, 3), (700, 8), (3, 9000)])
def test_sums_are_those_of_single_steps_to_the_bit(count, size, monkeypatch):
    batches, expected = list(drawn(count, size, 5)), [0.0, 0, 0, torch.inf]
    for loss, logits, labels in batches:
        known = int((labels >= 0).sum())
        expected[0] += loss.double().item() * known
        expected[1] += int((logits.argmax(1) == labels).sum())
        expected[2] += known
    assert added(batches) == expected
    monkeypatch.setattr(totals, "is_late", lambda _: True)
    assert added(batches) == expected


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.usefixtures("late")
def test_a_loss_that_is_seen_late_is_named_as_one_that_is_seen_at_once(kind, bad, monkeypatch):
    """The optimizer keeps the weights of the bad step, until the end of the epoch."""

    def message():
        model, batches = network(), Fixed()
        model.insert(3, nn.Dropout(0.5))
        batches.data[bad][0].mul_(1e38)
        with torch.no_grad():
            model[0].weight.mul_(1e3)
        stepper = make_optimizer(kind, model.parameters(), lr=0.1, momentum=0.9, nesterov=False)
        learner = Learner(model, stepper, seed=1)
        with pytest.raises(NonFiniteLoss) as error:
            train_epoch(learner, batches, lambda _: 0.1, new_sums(CPU), epoch=0)
        assert not hasattr(stepper, "found_inf")
        return str(error.value), list(model.parameters())

    late, weights = message()
    monkeypatch.setattr(totals, "is_late", lambda _: False)
    at_once, expected = message()
    assert late == at_once == f"the loss is not finite at step {bad + 1}; output of 0"
    assert all(map(torch.equal, weights, expected))


@pytest.mark.usefixtures("late")
def test_an_optimizer_that_cannot_wait_has_lost_the_layer():
    model, batches = network(), Fixed()
    batches.data[1][0].fill_(torch.inf)
    learner = Learner(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(NonFiniteLoss, match="at step 2; too late to tell which layer went first"):
        train_epoch(learner, batches, lambda _: 0.1, new_sums(CPU), epoch=0)


def test_each_step_is_seeded_as_by_manual_seed():
    """Without its loop over all devices there are, which takes 0.1 to 0.3 ms."""
    drawn, model = [], network()
    model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(3)))
    train_epoch(
        Learner(model, optimizer(model), seed=5), Fixed(), lambda _: 0.1, new_sums(CPU), epoch=7
    )
    for step, mine in enumerate(drawn):
        torch.manual_seed(seeding.derive(5, "step", 7, step))
        assert torch.equal(mine, torch.rand(3))


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_named_at_the_end_of_the_epoch():
    device = torch.device("cuda", 0)
    model, batches = network().to(device), Fixed()
    batches.data[1][0].fill_(torch.inf)
    batches.data = [(x.to(device), y.to(device)) for x, y in batches.data]
    sums = new_sums(device)
    with pytest.raises(NonFiniteLoss, match="at step 2"):
        train_epoch(Learner(model, optimizer(model)), batches, lambda _: 0.1, sums, epoch=0)
