"""What the loop asks a method, and what follows from its answers; optimizers; the stop signal."""

import signal

import pytest
import torch
from dst_runs import CPU, STEPS, begin, options, train
from torch import nn

from ER_DST import topology
from ER_DST.topology import Growth
from startsparse import checkpoint, flops, optimizers
from startsparse.errors import UserError
from startsparse.masks import attach_masks, masked_weights
from startsparse.method import Method
from startsparse.optimizers import OPTIMIZERS
from startsparse.phases import Phase
from startsparse.stopping import StopSignal
from startsparse.training import Learner, new_sums, train_epoch


class Noted(Method):
    """Writes down what the loop asks of it, and in which state of the network."""

    def __init__(self):
        self.calls = []

    def _note(self, what, step, model, optimizer):
        (weight,) = (w for _, w, _ in masked_weights(model))
        group = optimizer.param_groups[0]["params"][0] is weight
        gradient = None if weight.grad is None else weight.grad.clone()
        self.calls.append((what, step, weight.detach().clone(), gradient, group))

    def before_step(self, step, model, optimizer):
        self._note("before", step, model, optimizer)

    def after_backward(self, step, model, optimizer):
        self._note("backward", step, model, optimizer)

    def after_step(self, step, model, optimizer):
        self._note("after", step, model, optimizer)


def test_a_method_is_asked_in_order_and_sees_dense_gradients():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    attach_masks(model, {"0": torch.arange(24).view(4, 6) % 2 == 0})
    inputs = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1))
    method, labels = Noted(), torch.arange(8) % 4

    class Batches:
        def __len__(self):
            return 3

        def epoch(self, _epoch, start):
            yield from ((x, labels) for x in inputs[start:])

    learner = Learner(model, torch.optim.SGD(model.parameters(), 0.1))
    train_epoch(
        learner, Batches(), lambda _: 0.1, new_sums(CPU), epoch=0, start=1, method=method, first=10
    )
    asked = [(what, step) for what, step, *_ in method.calls]
    assert asked == [(w, s) for s in (11, 12) for w in ("before", "backward", "after")]
    assert all(same for *_, same in method.calls)
    mask = model[0].weight_mask
    before, backward, after = method.calls[:3]
    assert (backward[3][~mask] != 0).all()  # dense
    assert (after[3][~mask] == 0).all() and torch.equal(after[3][mask], backward[3][mask])
    assert torch.equal(before[2], backward[2]) and not torch.equal(before[2], after[2])


def test_a_method_that_moves_masks_finds_the_network_whole(tmp_path):
    """Layers that compute inside their masks have no weight of the model's shape."""
    asked = options(is_prune=False, epochs=1, sparse_compute="on")

    class Looks(Noted):
        dense_gradients = "at updates"

        def moves_masks(self, step):
            return step == 2

        def after_backward(self, step, model, optimizer):
            shapes = [w.shape for _, w, _ in masked_weights(model)]
            dense = all(w.grad is not None and (w.grad[~m] != 0).any()
                        for _, w, m in masked_weights(model))  # fmt: skip
            self.calls.append((step, all(len(shape) == 2 for shape in shapes), dense))

        before_step = after_step = Method.before_step

    trainer, _ = begin(tmp_path, asked)
    method = Looks()
    trainer.run_phases([Phase("train", 1, "constant", method=method)])
    assert method.calls == [(s, s == 2, s == 2) for s in range(STEPS)]
    outside = flops.dense_gradients(trainer.ledger.forward, flops.densities(trainer.model))
    step = flops.training(trainer.ledger.forward, flops.densities(trainer.model))
    assert trainer.ledger.training == pytest.approx(STEPS * step + outside)


@pytest.mark.parametrize(("needs", "times"), [("never", 0), ("at updates", 2), ("always", 7)])
def test_flops_follow_from_what_a_growth_rule_says_it_needs(tmp_path, monkeypatch, needs, times):
    """A rule of the user's own, of one line, at constant density: 7 of 8 steps grow, 2 update."""
    rule = Growth(lambda layers, _: [layer.weight.abs() for layer in layers], needs)
    monkeypatch.setitem(topology.GROWTH, "weight", rule)
    asked = options(method="DST", growth="weight", update_frequency=3, stop_updates=7 / 8)
    trainer = train(tmp_path, asked)
    assert [row["step"] for row in trainer.tables["topology"]] == [3, 6]
    density = flops.densities(trainer.model)
    steps = 8 * flops.training(trainer.ledger.forward, density)
    outside = flops.dense_gradients(trainer.ledger.forward, density)
    assert trainer.ledger.training == pytest.approx(steps + times * outside, rel=1e-12)
    assert bool(asked.no_sparse_compute(CPU)) == (needs == "always")


def test_what_is_masked_in_an_update_is_counted_at_the_densities_before_it(tmp_path):
    """GraNet: gradients are dense where the mask is still that of before."""
    asked = options(method="GraNet", final_density=0.1, update_frequency=3, epochs=1,
                    init_prune_epoch=0, final_prune_epoch=1)  # fmt: skip
    trainer, whole = begin(tmp_path, asked)
    start = flops.densities(trainer.model)
    trainer.run_phases([whole])
    forward, end = trainer.ledger.forward, flops.densities(trainer.model)
    (row,) = trainer.tables["topology"]
    assert row["step"] == 3
    expected = 3 * flops.training(forward, start) + flops.dense_gradients(forward, start)
    expected += flops.training(forward, end)
    assert trainer.ledger.training == pytest.approx(expected, rel=1e-12)


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("compute", ["off", "on"])
def test_every_optimizer_keeps_weights_and_state_inside_the_masks(tmp_path, name, compute):
    asked = options(method="DST", growth="random", optimizer=name, lr=0.01, sparse_compute=compute)
    trainer = train(tmp_path, asked)
    assert type(trainer.optimizer).__name__.lower() == name
    moved = 0
    for _, weight, mask in masked_weights(trainer.model):
        assert (weight[~mask] == 0).all()
        held = [v for v in trainer.optimizer.state[weight].values() if v.shape == weight.shape]
        assert held and all((value[~mask] == 0).all() for value in held)
        moved += int((weight[mask] != 0).sum())
    assert moved


def test_weight_decay_of_adamw_is_decoupled():
    """w <- (1 - lr decay) w, whatever the gradient (Loshchilov & Hutter 2019); Adam's is not."""
    for name, expected in (("adamw", 1 - 0.1 * 0.5), ("adam", 1 - 0.1)):
        weight = nn.Parameter(torch.ones(3))
        groups = [{"params": [weight], "weight_decay": 0.5}]
        optimizer = optimizers.make_optimizer(name, groups, lr=0.1, momentum=0.9, nesterov=True)
        weight.grad = torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((3,), expected))


def test_an_unknown_optimizer_does_not_fall_through():
    with pytest.raises(ValueError, match=r"'lion'; choose from sgd, adam, adamw"):
        optimizers.make_optimizer("lion", [], lr=0.1, momentum=0.9, nesterov=False)


def test_a_new_optimizer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "nadam", optimizers.Kind(torch.optim.NAdam, ()))
    asked = options(method="DST", optimizer="nadam", growth="random", lr=0.01)
    assert not asked.uses_momentum
    trainer = train(tmp_path, asked)
    assert isinstance(trainer.optimizer, torch.optim.NAdam)
    assert all((weight[~mask] == 0).all() for _, weight, mask in masked_weights(trainer.model))


# --- stopping -------------------------------------------------------------------------------------


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.agreed
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == stop.agreed == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_stops_with_the_others_by_its_own_signal():
    stop = StopSignal()
    stop.agree(False)
    assert not stop.agreed
    stop.agree(True)  # another one was asked
    assert stop.agreed == signal.SIGTERM
    stop = StopSignal()
    stop.received = signal.SIGINT
    stop.agree(True)
    assert stop.agreed == signal.SIGINT


def test_a_checkpoint_of_an_older_version_is_one_line(tmp_path):
    trainer, _ = begin(tmp_path, options(method="DST"))
    trainer.save()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    del state["ledger"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(
        UserError, match=r"checkpoint\.pt: an older version wrote it; start the run"
    ):
        trainer.load()


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [
    ("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW),
])  # fmt: skip
def test_optimizers_are_those_of_pytorch_to_the_bit(name, kind):
    steppers, models = [], []
    for make in ("ours", "theirs"):
        torch.manual_seed(1)
        models.append(model := nn.Linear(3, 2))
        if make == "ours":
            steppers.append(
                optimizers.make_optimizer(
                    name, model.parameters(), lr=0.1, momentum=0.9, nesterov=False
                )
            )
        else:
            more = {"momentum": 0.9} if name == "sgd" else {}
            steppers.append(kind(model.parameters(), lr=0.1, fused=True, **more))
    for _ in range(3):
        for model, stepper in zip(models, steppers):
            stepper.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            stepper.step()
        steppers[0].load_state_dict(steppers[0].state_dict())
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert torch.is_grad_enabled()


def test_hooks_and_profilers_see_each_step_of_an_optimizer():
    model, seen = nn.Linear(3, 2), []
    stepper = optimizers.make_optimizer(
        "sgd", model.parameters(), lr=0.1, momentum=0.9, nesterov=False
    )
    model(torch.ones(4, 3)).sum().backward()
    handle = stepper.register_step_post_hook(lambda *_: seen.append("after"))
    stepper.step()
    handle.remove()
    stepper.step()
    assert seen == ["after"]
    with torch.profiler.profile() as profile:
        stepper.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}
