"""Pruning to the best k weights, against a full sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from startsparse.masks import attach_masks, draw_masks, keep_inside, masked_weights
from startsparse.scores import keep_top, magnitude


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
