"""What training cannot survive ends it with one line: NaN, infinity, and masks without a weight."""

import math

import pytest
import torch
from script_runs import MLP as STR_MLP
from script_runs import newest
from slt_runs import MLP as SLT_MLP
from torch import nn

from startsparse import checkpoint
from startsparse.trainer import Trainer
from startsparse.training import NonFiniteLoss, NonFiniteNetwork, require_finite

few = pytest.mark.usefixtures("few_images", "no_pictures")


# --- not finite -----------------------------------------------------------------------------------


@few
@pytest.mark.parametrize(
    "argv",
    [["--lr", "1e30"], ["--weight-decay", "1e30"], ["--lr", "1e30", "--global"]],
    ids=" ".join,
)
def test_scores_that_are_not_finite_leave_no_ticket(run_slt, tmp_path, argv):
    with pytest.raises(NonFiniteNetwork, match=r"diverged: hidden\.0\.weight_score is not finite"):
        run_slt(*SLT_MLP, *argv)
    folder = newest(tmp_path)
    assert not list(folder.rglob("*.safetensors"))
    assert not (folder / "summary.json").exists()


@few
def test_a_checkpoint_within_an_epoch_is_finite_too(run_slt, tmp_path):
    with pytest.raises(NonFiniteNetwork, match="is not finite after step [1-6]"):
        run_slt(*SLT_MLP, "--batch-size", "32", "--lr", "1e30", "--save-every", "1")
    state = checkpoint.load(newest(tmp_path) / "checkpoint.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def trained():
    """A network and Adam after a step."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "2.bias", "1.running_mean", "1.running_var"])
def test_the_tensor_that_is_not_finite_is_named(name, value):
    model, optimizer = trained()
    require_finite(model, optimizer)
    model.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(NonFiniteNetwork, match=f"diverged: {name} is not finite here; try"):
        require_finite(model, optimizer, " here")


def test_infinite_moments_freeze_a_weight_and_are_named():
    model, optimizer = trained()
    optimizer.state[model[2].weight]["exp_avg_sq"][0, 0] = math.inf
    before = model[2].weight[0, 0].item()
    optimizer.step()
    assert model[2].weight[0, 0].item() == before
    with pytest.raises(
        NonFiniteNetwork, match=r"exp_avg_sq of 2\.weight, in the optimizer, is not"
    ):
        require_finite(model, optimizer)


@few
def test_the_loss_of_an_evaluation_counts_too(run, monkeypatch):
    before = Trainer.evaluate

    def poisoned(trainer, batches):
        with torch.no_grad():
            trainer.model.get_submodule("classifier").weight.fill_(3e38)
        return before(trainer, batches)

    monkeypatch.setattr(Trainer, "evaluate", poisoned)
    with pytest.raises(NonFiniteLoss, match="evaluation is not finite; output of classifier"):
        run(*STR_MLP)
