"""FLOPs by hand: of layers, of passes, and of a training whose density changes."""

import json

import pytest
import script_runs
import slt_runs
import torch
from dst_runs import CPU, STEPS, begin, options, some_data, train
from torch import nn

from ER_DST.main import network as network_of
from startsparse import flops, scores
from startsparse.effective import replace_layers
from startsparse.masks import attach_masks, masked_weights
from startsparse.models import build
from STR.thresholds import SoftThresholded


def network():
    """Convolutions and linear layers of known cost, one after a pooling, and one of them strided.

    9 x 9 pixels; the first keeps them, the second makes them 4 x 4, the pooling 2 x 2.
    """
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2, bias=False),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.Linear(7, 3),
    )


# A weight is used once per output pixel; a multiply-add is two.
FORWARD = {
    "0": 2 * (5 * 2 * 9) * 81,
    "3": 2 * (6 * 5 * 9) * 16,
    "6": 2 * 24 * 7,
    "7": 2 * 7 * 3,
}
TOTAL = sum(FORWARD.values())
IMAGE = torch.zeros(1, 2, 9, 9)


def test_forward_flops_of_layers_by_hand():
    assert flops.forward_flops(network(), IMAGE) == FORWARD


def test_counting_leaves_the_network_as_it_was():
    model = network().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flops.forward_flops(model, IMAGE + 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, *[True] * 6]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_is_used_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x))

    assert flops.forward_flops(Twice(), torch.zeros(1, 4)) == {"inner": 2 * 2 * 16}


def test_forward_flops_are_those_of_the_literature():
    """ResNet20 has 40.8 million multiply-adds on 32 x 32 images (He et al. 2016), VGG16 313."""
    image = torch.zeros(1, 3, 32, 32)
    for name, low, high in (("resnet20", 40.5e6, 41.5e6), ("vgg16", 313e6, 314e6)):
        counted = flops.forward_flops(build(name, classes=10), image)
        assert low < sum(counted.values()) / 2 < high


def test_masks_do_not_change_what_dense_costs_and_soft_thresholds_count():
    model = network()
    attach_masks(model, {"0": torch.zeros(5, 2, 3, 3, dtype=torch.bool)})
    assert flops.forward_flops(model, IMAGE) == FORWARD
    replace_layers(model, SoftThresholded, -1.0, "sigmoid", dense=["7"])
    assert flops.forward_flops(model, IMAGE) == FORWARD


def test_densities_are_shares_of_kept_weights():
    model = network()
    mask = torch.zeros(6, 5, 3, 3, dtype=torch.bool)
    mask[:2] = True
    attach_masks(model, {"3": mask})
    assert flops.densities(model) == {"0": 1.0, "3": pytest.approx(1 / 3), "6": 1.0, "7": 1.0}


DENSITY = {"0": 0.5, "3": 0.25, "6": 1.0, "7": 0.0}


def test_inference_and_training_by_hand():
    sparse = 0.5 * FORWARD["0"] + 0.25 * FORWARD["3"] + FORWARD["6"]
    assert flops.inference(FORWARD, DENSITY) == sparse
    # outputs, weight gradients, input gradients; the image needs none
    assert flops.training(FORWARD, DENSITY) == 3 * sparse - 0.5 * FORWARD["0"]
    outside = 0.5 * FORWARD["0"] + 0.75 * FORWARD["3"] + FORWARD["7"]
    assert flops.dense_gradients(FORWARD, DENSITY) == outside
    dense = dict.fromkeys(FORWARD, 1.0)
    assert flops.inference(FORWARD, dense) == TOTAL
    assert flops.training(FORWARD, dense) == 3 * TOTAL - FORWARD["0"]
    assert flops.dense_gradients(FORWARD, dense) == 0


def test_training_costs_what_autograd_computes():
    """The counter of PyTorch, over forward and backward of a dense network."""
    from torch.utils.flop_counter import FlopCounterMode

    model, counter = network(), FlopCounterMode(display=False)
    with counter:
        model(IMAGE.repeat(2, 1, 1, 1)).sum().backward()
    assert counter.get_total_flops() == 2 * flops.training(FORWARD, dict.fromkeys(FORWARD, 1.0))


# --- of a run -------------------------------------------------------------------------------------

# 16 -> 8 -> 8 -> 8 -> 4, a multiply-add of each weight and example
SIZES = {"hidden.0": 128, "hidden.3": 64, "hidden.6": 64, "classifier": 32}
DENSE = 2 * (3 * 288 - 128)


def step_flops(kept):
    """Of forward and backward, for one example."""
    return 2 * (3 * sum(kept.values()) - kept["hidden.0"])


def weights_left(model):
    return {name: int(mask.sum()) for name, _, mask in masked_weights(model)}


@pytest.mark.parametrize("method", ["GMP", "GraNet"])
def test_a_run_of_two_densities_by_hand(tmp_path, method):
    """8 steps: 6 before the one update, at the end of the pruning, and 2 after it."""
    asked = options(method=method, final_density=0.2, update_frequency=100)
    first = weights_left(begin(tmp_path, asked)[0].model)
    trainer = train(tmp_path, asked)
    last = weights_left(trainer.model)
    assert [row["step"] for row in trainer.tables["topology"]] == [6]
    assert sum(last.values()) < sum(first.values())
    spent = 6 * step_flops(first) + 2 * step_flops(last)
    if method == "GraNet":  # the update looked at all gradients, those outside the first mask too
        spent += 2 * (288 - sum(first.values()))
    costs = trainer.costs()
    assert costs["training_flops_share"] == pytest.approx(spent / (2 * STEPS * DENSE))
    assert costs["training_flops"] == pytest.approx(16 * spent)  # examples a step
    assert costs["inference_flops"] == pytest.approx(2 * sum(last.values()))
    assert costs["inference_flops_share"] == pytest.approx(sum(last.values()) / 288)


def test_momentum_needs_all_gradients_in_every_step(tmp_path):
    asked = options(method="DST", growth="momentum")
    kept = weights_left(begin(tmp_path, asked)[0].model)  # of each layer, always
    costs = train(tmp_path, asked).costs()
    spent = step_flops(kept) + 2 * (288 - sum(kept.values()))
    assert costs["training_flops_share"] == pytest.approx(spent / DENSE)


def test_dense_training_costs_all(tmp_path):
    costs = train(tmp_path, options(sparse=False)).costs()
    assert (costs["inference_flops_share"], costs["training_flops_share"]) == (1.0, 1.0)
    assert costs["inference_flops"] == 2 * 288
    assert costs["training_flops"] == pytest.approx(2 * STEPS * 16 * DENSE)


# --- of the other scripts -------------------------------------------------------------------------

# digits: 3072 -> 16 -> 16 -> 16 -> 10, and 1293 images to train with
WIDE = {"hidden.0": 49_152, "hidden.3": 256, "hidden.6": 256, "classifier": 160}


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.usefixtures("no_pictures")
def test_a_fixed_mask_of_str_by_hand(run):
    folder = run(*script_runs.MLP, "--conv-type", "ConvMask", "--er-sparse-init", "0.3")
    saved = script_runs.weights(folder)
    kept = {name: int(saved[f"{name}.weight_mask"].sum()) for name in WIDE}
    found, spent, dense = summary_of(folder), step_flops(kept), step_flops(WIDE)
    assert found["training_flops"] == pytest.approx(1293 * spent, rel=1e-12)
    assert found["training_flops_share"] == pytest.approx(spent / dense, rel=1e-12)
    assert found["inference_flops"] == pytest.approx(2 * sum(kept.values()), rel=1e-12)
    assert sum(kept.values()) < 0.31 * sum(WIDE.values())


@pytest.mark.usefixtures("no_pictures")
def test_edge_popup_by_hand(tmp_path):
    """Scores have gradients in all of the random mask, and inputs through what is in use."""
    folder = slt_runs.slt(tmp_path, *slt_runs.MLP, "--er-init-density", "0.5", "--sparsity", "0.1")
    spent, used = 0, []
    for level in (1, 2):
        found = slt_runs.ticket(folder, level)
        used.append({name: int(found.found[f"{name}.weight"].sum()) for name in WIDE})
        inside = sum(int(mask.sum()) for mask in found.er_masks.values())
        spent += 2 * 1293 * 2 * (2 * sum(used[-1].values()) - used[-1]["hidden.0"] + inside)
    assert sum(used[0].values()) > 1.5 * sum(used[1].values())
    found = summary_of(folder)
    assert found["training_flops"] == pytest.approx(spent, rel=1e-12)
    assert found["training_flops_share"] == pytest.approx(
        spent / (4 * 1293 * step_flops(WIDE)), rel=1e-12
    )
    assert found["inference_flops"] == pytest.approx(2 * sum(used[1].values()), rel=1e-12)


# --- of the search for a mask ---------------------------------------------------------------------


@pytest.mark.parametrize("sparse_init", ["snip", "ER_snip"])
def test_snip_costs_a_dense_step(sparse_init):
    *_, spent = network_of(options(er_sparse_method=sparse_init), some_data(), CPU)
    assert spent == 16 * DENSE


def test_synflow_costs_a_pass_of_one_example_at_each_density(monkeypatch):
    passes, synflow = [], scores.synflow

    def watch(model, shape):
        passes.append(weights_left(model))
        return synflow(model, shape)

    monkeypatch.setattr(scores, "synflow", watch)
    *_, spent = network_of(options(er_sparse_method="ER_synflow"), some_data(), CPU)
    assert len(passes) > 50
    assert sum(passes[0].values()) == 288
    assert sum(passes[-1].values()) < 150
    assert spent == pytest.approx(sum(map(step_flops, passes)), rel=1e-12)


def test_a_random_mask_costs_nothing():
    *_, spent = network_of(options(), some_data(), CPU)
    assert spent == 0
