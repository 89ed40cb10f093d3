"""Pruning to the best k weights, against a full sort."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from startsparse import scores
from startsparse.masks import attach_masks, draw_masks, keep_inside, masked_weights
from startsparse.scores import _by_topk, _lowest_of_top, keep_top, magnitude, shrink


def network(seed, values=None):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    for layer in model:
        weight = torch.randn(layer.weight.shape, generator=generator)
        if values:  # few different values: many ties
            weight = torch.randint(-values, values + 1, weight.shape, generator=generator).float()
        layer.weight.data = weight
    shapes = {str(i): layer.weight.shape for i, layer in enumerate(model)}
    attach_masks(model, draw_masks(shapes, [0.7, 0.5, 0.9], seed, "exact"))
    return model


def reference(model, count):
    """Positions that stay: the best by score, of equal ones the first; only inside the masks."""
    entries = []
    for layer, (_, weight, mask) in enumerate(masked_weights(model)):
        for position, (w, m) in enumerate(zip(weight.flatten().tolist(), mask.flatten().tolist())):
            if m:
                entries.append((-abs(w), layer, position))
    return {(layer, position) for _, layer, position in sorted(entries)[:count]}


@given(st.integers(0, 10_000), st.sampled_from([None, 1, 2]), st.floats(0, 1))
def test_keep_top_is_the_full_sort(seed, values, share):
    model = network(seed, values)
    before = [mask.clone() for _, _, mask in masked_weights(model)]
    count = round(share * sum(int(mask.sum()) for mask in before))
    expected = reference(model, count)
    keep_top(model, magnitude(model), count)
    masks = [mask for _, _, mask in masked_weights(model)]
    assert sum(int(mask.sum()) for mask in masks) == count
    assert all((mask & ~old).sum() == 0 for mask, old in zip(masks, before))  # nothing comes back
    kept = {(i, p) for i, m in enumerate(masks) for p in m.flatten().nonzero().flatten().tolist()}
    assert kept == expected


@pytest.mark.parametrize("kind", ["normal", "few values", "sorted", "infinite"])
@pytest.mark.parametrize("layout", ["plain", "channels_last", "mixed"])
def test_few_of_many_are_found_by_a_sample(kind, layout):
    """Scores that fit the sample's guess, and such that mislead it."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (64, 40, 3, 3), "b": (100, 80)}
    scores, masks = {}, {}
    for name, shape in shapes.items():
        score = torch.randn(shape, generator=generator)
        if kind == "few values":
            score = score.round()
        elif kind == "sorted":
            score = score.flatten().sort().values.view(shape)
        elif kind == "infinite":
            score[0] = torch.inf
        mask = torch.rand(shape, generator=generator) < 0.8
        if len(shape) == 4 and layout != "plain":
            score = score.contiguous(memory_format=torch.channels_last)
            if layout != "mixed":
                mask = mask.contiguous(memory_format=torch.channels_last)
        scores[name], masks[name] = score, mask
    for count in (0, 1, 300, 5000):
        mine = {name: mask.clone() for name, mask in masks.items()}
        shrink(mine, scores, count)
        inside = torch.cat([mask.flatten() for mask in masks.values()])
        values = torch.cat([score.flatten() for score in scores.values()]).where(inside, -torch.inf)
        best = values.sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros_like(inside).index_fill(0, best, True)
        assert torch.equal(torch.cat([mask.flatten() for mask in mine.values()]), expected)


def test_a_nan_among_many_is_found():
    mask = torch.ones(300, 300, dtype=torch.bool)
    score = torch.rand(300, 300)
    score[7, 9] = torch.nan
    with pytest.raises(ValueError, match="a: a score is NaN"):
        shrink({"a": mask}, {"a": score}, 10)
    mask[7, 9] = False  # outside it does not matter
    shrink({"a": mask}, {"a": score}, 10)
    assert mask.sum() == 10


def test_masks_are_changed_in_place():
    model = network(1)
    held = [mask for _, _, mask in masked_weights(model)]
    keep_top(model, magnitude(model), 10)
    keep_inside(model)
    assert sum(int(mask.sum()) for mask in held) == 10
    for _, weight, mask in masked_weights(model):
        assert (weight[~mask] == 0).all()


def test_more_than_is_left_is_an_error():
    model = network(1)
    left = sum(int(mask.sum()) for _, _, mask in masked_weights(model))
    with pytest.raises(ValueError, match=f"{left} are left"):
        keep_top(model, magnitude(model), left + 1)


def test_nan_names_the_layer_and_changes_nothing():
    model = network(1)
    before = [mask.clone() for _, _, mask in masked_weights(model)]
    scores = magnitude(model)
    scores["1"][~before[1]] = torch.nan  # outside the mask nobody looks
    keep_top(model, scores, 20)
    before = [mask.clone() for _, _, mask in masked_weights(model)]
    scores["1"][tuple(before[1].nonzero()[0])] = torch.nan
    with pytest.raises(ValueError, match="1: a score is NaN"):
        keep_top(model, scores, 10)
    assert all(torch.equal(m, old) for (_, _, m), old in zip(masked_weights(model), before))


def test_the_lowest_possible_scores_do_not_bring_pruned_weights_back():
    model = network(1)
    before = [mask.clone() for _, _, mask in masked_weights(model)]
    left = sum(int(mask.sum()) for mask in before)
    scores = {name: torch.full_like(w, -torch.inf) for name, w, _ in masked_weights(model)}
    keep_top(model, scores, left - 3)
    after = [mask for _, _, mask in masked_weights(model)]
    assert not any((mask & ~old).any() for mask, old in zip(after, before))
    assert torch.equal(after[0], before[0])  # of equals the last ones go
    assert torch.equal(after[1], before[1])
    gone = (before[2] & ~after[2]).flatten().nonzero().flatten()
    assert gone.tolist() == before[2].flatten().nonzero().flatten()[-3:].tolist()


def test_scores_of_several_precisions():
    """float64 scores that float32 cannot tell apart still count as different."""
    model = network(1)
    scores = {name: torch.ones(w.shape) for name, w, _ in masked_weights(model)}
    scores["2"] = 1 + 1e-12 * torch.arange(1, 13, dtype=torch.float64).view(3, 4)
    inside = [mask for _, _, mask in masked_weights(model)][2].flatten().nonzero().flatten()
    keep_top(model, scores, 4)
    masks = [mask for _, _, mask in masked_weights(model)]
    assert [int(mask.sum()) for mask in masks] == [0, 0, 4]
    assert masks[2].flatten().nonzero().flatten().tolist() == inside[-4:].tolist()


@given(st.integers(0, 10_000), st.sampled_from([None, 3]), st.integers(1, 60))
def test_the_way_of_gpus_finds_the_same_threshold(seed, values, size):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator)
    if values:
        scores = torch.randint(values, (size,), generator=generator).float()
    ordered = scores.sort(descending=True).values
    for count in range(1, size + 1):
        assert _by_topk(scores, count) == ordered[count - 1] == _lowest_of_top(scores, count)


@pytest.mark.gpu
def test_keep_top_on_a_gpu():
    for values in (None, 1, 2):
        model = network(3, values)
        expected = reference(model, 17)
        model.cuda()
        keep_top(model, magnitude(model), 17)
        masks = [mask.flatten() for _, _, mask in masked_weights(model)]
        assert {(i, p) for i, m in enumerate(masks) for p in m.nonzero().flatten().tolist()} == (
            expected
        )


# --- full precision -------------------------------------------------------------------------------


def precisions():
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    return [kind.fp32_precision for kind in kinds]


class Product(torch.autograd.Function):
    """Notes in which precision it computes, forward, backward and twice backward."""

    seen: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x):
        Product.seen.append(precisions())
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Product.apply(gradient)


@pytest.mark.parametrize("score", [scores.snip, scores.grasp])
def test_gradients_for_scores_are_computed_in_full_precision(score, monkeypatch):
    """Also where PyTorch may round to TF32, as by default in the convolutions of GPUs."""
    model = nn.Sequential(nn.Linear(4, 3))
    attach_masks(model, {"0": torch.ones(3, 4, dtype=torch.bool)})
    model[0].register_forward_hook(lambda _module, _inputs, output: Product.apply(output))
    Product.seen = []
    torch.set_float32_matmul_precision("high")
    try:
        before = precisions()
        assert "tf32" in before
        score(model, torch.ones(2, 4), torch.tensor([0, 1]))
        with pytest.raises(RuntimeError):
            score(model, torch.ones(2, 5), torch.tensor([0, 1]))
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(Product.seen) >= 2
    assert all(seen == ["ieee"] * 3 for seen in Product.seen)
