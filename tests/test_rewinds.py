"""Each rewind changes exactly what it names."""

import copy

import pytest
import torch
from torch import nn

from startsparse.masks import attach_masks, masked_weights
from STR.rewinds import REWINDS, flipped


@pytest.fixture
def networks():
    """(network after training, its state at first): every number differs, masks have shrunk."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    masks = {"0": torch.rand(8, 3, 3, 3) < 0.7, "3": torch.rand(5, 8) < 0.7}
    attach_masks(model, masks)
    first = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("_mask"):
                tensor.logical_and_(torch.rand(tensor.shape) < 0.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape))
            else:
                tensor.add_(7)
        for _, weight, mask in masked_weights(model):
            weight.mul_(mask)
    return model, first


def changes(model, before):
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


MASKED = {"0.weight", "3.weight"}
NORM = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("none", set()),
        ("weights", MASKED | NORM | {"0.bias", "3.bias"}),
        ("bn", NORM),
        ("amplitudes", MASKED),
        ("signs", MASKED),
    ],
)
def test_what_changes(networks, how, names):
    model, first = networks
    before = copy.deepcopy(model.state_dict())
    REWINDS[how](model, first)
    assert changes(model, before) == names
    for name, weight, mask in masked_weights(model):
        old, start = before[f"{name}.weight"], first[f"{name}.weight"]
        assert (weight[~mask] == 0).all()
        if how == "weights":
            assert torch.equal(weight, start * mask)
        if how == "amplitudes":
            assert torch.equal(weight.abs(), start.abs() * mask)
            assert torch.equal(weight.sign(), old.sign())
        if how == "signs":
            assert torch.equal(weight.abs(), old.abs())
            assert torch.equal(weight.sign(), start.sign() * mask)
    if how in ("weights", "bn"):
        assert all(torch.equal(model.state_dict()[name], first[name]) for name in NORM)


def test_flipped_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    attach_masks(model, {"0": torch.tensor([[True, True], [True, False]]),
                         "1": torch.tensor([[True, True]])})  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
    first = {"0.weight": torch.tensor([[-1.0, -1.0], [1.0, -5.0]]),
             "1.weight": torch.tensor([[2.0, -1.0]])}  # fmt: skip
    shares = flipped(model, first)
    assert shares == pytest.approx({"0": 1 / 3, "1": 1 / 2, "total": 2 / 5})
