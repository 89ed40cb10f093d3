"""FLOPs by hand: of layers, of passes, and of a training whose density changes."""

import pytest
import torch
from dst_runs import STEPS, begin, options, train
from torch import nn

from startsparse import flops
from startsparse.masks import attach_masks, masked_weights
from startsparse.models import build
from STR.thresholds import soften


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
    soften(model, -1.0, "sigmoid", ["7"])
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
