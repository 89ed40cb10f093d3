"""What training cannot survive ends it with one line: NaN, infinity, and masks without a weight."""

import json
import math
import re

import pytest
import torch
from script_runs import MLP as STR_MLP
from script_runs import newest
from slt_runs import MLP as SLT_MLP
from torch import nn

from startsparse import checkpoint
from startsparse.errors import OptionError, UserError
from startsparse.tabular.program import main as tabular_main
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


# --- no weights -----------------------------------------------------------------------------------


def emptied(caplog):
    """(when, layers) of each warning of layers that became empty."""
    found = [
        re.search(r"warning: (.*) there is no weight left in (.*);", t) for t in caplog.messages
    ]
    return [(match[1], match[2].split(", ")) for match in found if match]


MLP = ["--arch", "mlp", "--width", "8", "--sparse-compute", "off", "--batch-size", "64"]
DST = [*MLP, "--set", "digits", "--sparse", "--epochs", "2", "--method", "GMP"]


@few
def test_pruning_in_training_warns_of_each_layer_that_it_empties_once(run_dst, caplog):
    folder = run_dst(*DST, "--final-density", "0.0005", "--update-frequency", "1")
    empty = set(read_densities(folder / "layers.json", 0.0))
    found = emptied(caplog)
    assert empty
    assert sorted(name for _, names in found for name in names) == sorted(empty)
    assert all(re.fullmatch(r"after step \d+", when) for when, _ in found)


@few
@pytest.mark.parametrize("method", ["GraNet", "GMP_uniform"])
def test_growing_methods_say_the_same(run_dst, caplog, method):
    folder = run_dst(*DST, "--method", method, "--final-density", "0.0005")
    empty = set(read_densities(folder / "layers.json", 0.0))
    assert {name for _, names in emptied(caplog) for name in names} == empty


@few
def test_a_level_that_empties_layers_is_named(run, caplog):
    levels = ["--threshold-list", "0.1", "0.0005", "0.0004", "--final_prune_epoch", "1"]
    run(*MLP, "--epochs", "1", "--warmup-length", "0", *levels)
    found = emptied(caplog)
    assert found[0][0] == "after level 1"
    names = [name for _, layers in found for name in layers]
    assert len(set(names)) == len(names)


@few
def test_levels_of_edge_popup_are_watched_too(run_slt, caplog):
    run_slt(*SLT_MLP, "--batch-size", "64", "--sparsity", "0.0007", "--epochs", "1")
    assert emptied(caplog) == [("after level 1", ["hidden.3", "hidden.6", "classifier"])]


@few
def test_a_layer_that_is_empty_from_the_start_is_named_once(run, caplog):
    soft = ["--conv-type", "STRConv", "--sparse-function", "exp", "--sInit-value", "-2"]
    run(*MLP, "--epochs", "2", "--warmup-length", "0", *soft, "--st-decay", "10")
    assert any(
        t.startswith("warning: hidden.0: 2.5e+04 weights expected, 0 kept") for t in caplog.messages
    )
    assert not emptied(caplog)


@few
@pytest.mark.parametrize("when", ["at the start", "after epoch 1"])
def test_no_weight_at_all_is_an_error(run, monkeypatch, when):
    soft = ["--conv-type", "STRConv", "--sparse-function", "exp", "--sInit-value"]
    soft += ["2" if when == "at the start" else "-9"]
    if when != "at the start":
        monkeypatch.setattr("startsparse.trainer.require_finite", lambda model, *_: raise_to(model))
    expected = f"--sInit-value or --st-decay: no weight is left {when}, all layers are empty"
    with pytest.raises(UserError, match=expected):
        run(*MLP, "--epochs", "1", "--warmup-length", "0", *soft)


@torch.no_grad()
def raise_to(model):
    """Thresholds above all weights."""
    for name, parameter in model.named_parameters():
        if name.endswith("threshold_logit"):
            parameter.fill_(9)


@pytest.mark.parametrize(("fixture", "argv", "message"), [
    ("run", ["--er-sparse-init", "1e-9"], "--er-sparse-init: 1e-09 of"),
    ("run", ["--threshold-list", "0.1", "1e-9"], "--threshold-list: 1e-09 of"),
    ("run_dst", ["--sparse", "--final-density", "1e-9"], "--final-density: 1e-09 of"),
    ("run_dst", ["--sparse", "--method", "DST", "--init-density", "1e-9"], "--init-density: 1e-09"),
    ("run_slt", ["--sparsity", "1e-9"], "--sparsity: 1e-09 of"),
])  # fmt: skip
def test_a_density_below_one_weight_is_refused_before_data_is_read(
    request, monkeypatch, fixture, argv, message
):
    monkeypatch.setattr("startsparse.recipe.load_data", pytest.fail)
    with pytest.raises(OptionError, match=f"{message}.* weights is none; .* is one"):
        request.getfixturevalue(fixture)("--arch", "mlp", *argv)


def test_a_table_pruned_to_nothing_is_an_error(tmp_path):
    argv = ["--densities", "1e-9", "--starts", "0.5", "--reset", "no", "--seeds", "1"]
    argv += ["--width", "4", "--epochs", "1", "--final-epochs", "1"]
    with pytest.raises(UserError, match="--densities: 1e-09 leaves no weight of"):
        tabular_main([*argv, "--result-dir", str(tmp_path)])


def read_densities(path, density):
    """The layers of layers.json that have this density."""
    return [name for name, row in json.loads(path.read_text()).items() if row["density"] == density]
