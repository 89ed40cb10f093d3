"""The batched trainer: to every network it does what the loop does."""

import copy
import warnings

import pytest
import torch
from batched_runs import CPU, RECIPES, compare, network, networks, part
from torch import nn

from startsparse.data.rows import Rows, SideBySide
from startsparse.masks import masked_weights
from startsparse.tabular.batched import Recipe, train_batched, train_loop
from startsparse.training import NonFiniteLoss


def both(recipe, dtype, epochs):
    parts = [part(seed, dtype) for seed in (1, 1, 2, 3, 4)]
    one, other = networks(dtype), networks(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it falls back to a loop
        losses = train_batched(one, parts, recipe, epochs, first_epoch=3)
    return one, other, losses, train_loop(other, parts, recipe, epochs, first_epoch=3)


@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_loop(name):
    """24 steps in float64: weights, biases, BatchNorm and its statistics, masks, losses."""
    one, other, losses, expected = both(RECIPES[name], torch.float64, epochs=4)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    compare(one, other, name, torch.float64, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_equals_the_loop_in_float32(name):
    """24 steps."""
    one, other, losses, expected = both(RECIPES[name], torch.float32, epochs=4)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    compare(one, other, name, torch.float32, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [train_batched, train_loop])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_masks_stay_and_weights_stay_inside(train, recipe):
    models = networks()
    before = [[mask.clone() for _, _, mask in masked_weights(model)] for model in models]
    held = [mask for model in models for _, _, mask in masked_weights(model)]
    for model in models:  # what lies outside at the start goes too
        next(masked_weights(model))[1].data.add_(1)
    train(models, [part(seed) for seed in range(5)], recipe, 2)
    assert all(
        mask is same
        for mask, same in zip(held, (m for n in models for _, _, m in masked_weights(n)))
    )
    for model, masks in zip(models, before):
        for (_, weight, mask), old in zip(masked_weights(model), masks):
            assert torch.equal(mask, old)
            assert (weight[~mask] == 0).all() and (weight[mask] != 0).any()


def test_a_network_does_not_depend_on_its_company():
    together, alone = networks(torch.float64), networks(torch.float64)[2:3]
    parts = [part(seed, torch.float64) for seed in range(5)]
    train_batched(together, parts, RECIPES["adam"], 2)
    train_batched(alone, parts[2:3], RECIPES["adam"], 2)
    for name, value in alone[0].state_dict().items():
        torch.testing.assert_close(together[2].state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_two_calls_with_a_later_first_epoch_are_one():
    """With plain SGD, which has no state that starts anew."""
    one, other = networks(torch.float64), networks(torch.float64)
    parts = [part(seed, torch.float64) for seed in range(5)]
    train_batched(one, parts, RECIPES["plain-sgd"], 4)
    train_batched(other, parts, RECIPES["plain-sgd"], 2)
    train_batched(other, parts, RECIPES["plain-sgd"], 2, first_epoch=2)
    for mine, theirs in zip(one, other):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-12, atol=1e-14)


def test_the_order_is_each_networks_own():
    """The same network on the same rows: with one seed the same, with another not."""
    model = network(1, 0.5)
    rows = part(1)
    other = Rows(rows.features, rows.labels, batch_size=16, device=CPU, seed=2)
    models = [copy.deepcopy(model) for _ in range(3)]
    train_batched(models, [rows, rows, other], RECIPES["adam"], 2)
    first, second, third = (nn.utils.parameters_to_vector(m.parameters()) for m in models)
    assert (first - second).abs().max() < 1e-5
    assert (first - third).abs().max() > 1e-3


def test_it_learns():
    models, parts = networks(), [part(seed) for seed in range(5)]
    losses = train_batched(models, parts, RECIPES["adam"], 20)
    assert losses.shape == (20, 5)
    assert (losses[-1, :3] < 0.3 * losses[0, :3]).all()


@pytest.mark.parametrize("train", [train_batched, train_loop])
def test_networks_and_their_data_on_two_devices(train):
    models, parts = networks(), [part(seed) for seed in range(5)]
    for number in (0, 4):
        rows = list(parts)
        rows[number] = Rows(
            parts[0].features, parts[0].labels, batch_size=16, device=torch.device("meta"), seed=1
        )
        with pytest.raises(ValueError, match="are on cpu and meta: should be on one device"):
            train(models, rows, RECIPES["sgd"], 1)


@pytest.mark.parametrize("examples", [90, 81, 96, 7])
def test_batches_side_by_side_are_those_of_each(examples):
    """With a last batch that is small, of one row and so dropped, full, and the only one."""
    parts = [part(seed, examples=examples) for seed in (1, 1, 2)]
    together = list(SideBySide(parts).epoch(3))
    for number, rows in enumerate(parts):
        alone = list(rows.epoch(3))
        assert len(together) == len(alone) == len(rows)
        for (features, labels), (expected, their_labels) in zip(together, alone):
            assert torch.equal(features[number], expected)
            assert torch.equal(labels[number], their_labels)


@pytest.mark.parametrize("train", [train_batched, train_loop])
def test_a_loss_that_is_not_finite(train):
    models, parts = networks(), [part(seed) for seed in range(5)]
    models[3].classifier.bias.data[1] = torch.nan
    with pytest.raises(NonFiniteLoss, match="the loss .*is not finite"):
        train(models, parts, RECIPES["sgd"], 1)


def test_it_says_which_network_has_gone():
    models, parts = networks(), [part(seed) for seed in range(5)]
    models[3].classifier.bias.data[1] = torch.nan
    with pytest.raises(NonFiniteLoss, match="network 4 of 5 is not finite in epoch 1"):
        train_batched(models, parts, RECIPES["sgd"], 1)


def test_what_must_be_shared():
    recipe, rows = RECIPES["sgd"], part(1)
    with pytest.raises(ValueError, match="differ in their parameters or masked layers"):
        train_batched([network(1, 0.5), network(1, 0.5, width=8)], [rows, rows], recipe, 1)
    bare = network(1, 0.5)
    del bare.classifier.weight_mask
    with pytest.raises(ValueError, match="differ in their parameters or masked layers"):
        train_batched([network(1, 0.5), bare], [rows, rows], recipe, 1)
    for other in (part(2, examples=89), part(2, batch_size=8)):
        with pytest.raises(ValueError, match="differ in their number of rows"):
            train_batched([network(1, 0.5), network(2, 0.5)], [rows, other], recipe, 1)
    for models in ([], [network(1, 0.5)]):
        with pytest.raises(ValueError, match="should be equal and not 0"):
            train_batched(models, [rows, rows][: 2 * len(models)], recipe, 1)
    with pytest.raises(ValueError, match=r"'lion'; choose from sgd, adam, adamw"):
        train_batched([network(1, 0.5)], [rows], Recipe("lion"), 1)
