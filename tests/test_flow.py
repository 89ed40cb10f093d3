"""Flow preservation: no dead unit, the same density, the right edges, in place."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from startsparse.flow import needed, preserve_flow, repair
from startsparse.masks import attach_masks, draw_masks, keep_inside, masked_weights

shapes = st.builds(
    lambda outputs, inputs, kernel: (outputs, inputs, *kernel),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([(), (1, 1), (2, 3)]),
)
densities = st.floats(0, 1)
seeds = st.integers(0, 9999)


def random_mask(shape, density, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def source(seed):
    return torch.Generator().manual_seed(seed)


def degrees(mask):
    """Edges of each output and of each input."""
    edges = mask.reshape(*mask.shape[:2], -1).sum(2)
    return edges.sum(1), edges.sum(0)


def dead(mask):
    """How many outputs and how many inputs have no edge."""
    return tuple(int((degree == 0).sum()) for degree in degrees(mask))


def slow_removal(mask, priority, most):
    """Remove the edge of lowest priority that both units can spare, start over, ``most`` times."""
    mask = mask.clone()
    for _ in range(most):
        outputs, inputs = degrees(mask)
        spare = [e for e in mask.nonzero().tolist() if outputs[e[0]] > 1 and inputs[e[1]] > 1]
        if not spare:
            break
        mask[tuple(min(spare, key=lambda e: float(priority[tuple(e)])))] = False
    return mask


@given(shapes, densities, seeds, st.booleans())
def test_nothing_is_dead_and_the_density_is_kept(shape, density, seed, by_priority):
    mask = random_mask(shape, density, seed)
    before = mask.clone()
    priority = torch.rand(shape, generator=source(seed + 1)) if by_priority else None
    grown = preserve_flow(mask, source(seed), priority)
    assert dead(mask) == (0, 0)
    assert mask.sum() == before.sum() + grown
    assert 0 <= grown <= max(dead(before))
    if by_priority:
        assert mask.sum() >= needed(shape)
        # The larger side says how many edges there are to add: the other is repaired by the same.
        assert (mask & ~before).sum() == max(dead(before))
    else:
        assert grown == max(0, needed(shape) - before.sum())
        assert (mask & ~before).sum() >= max(dead(before))
    if before.sum() >= shape[0] + shape[1] - 1:
        assert grown == 0
    if dead(before) == (0, 0):
        assert torch.equal(mask, before)


@given(shapes, densities, seeds)
def test_the_lowest_priority_that_can_be_spared_goes_first(shape, density, seed):
    mask = random_mask(shape, density, seed)
    before = mask.clone()
    priority = torch.randperm(mask.numel(), generator=source(seed + 1)).view(shape)
    preserve_flow(mask, source(seed), priority)
    # New edges are candidates here, even the first ones, and stay all the same.
    added = mask & ~before
    priority[added] -= mask.numel()
    assert torch.equal(mask, slow_removal(before | added, priority, int(added.sum())))


@given(shapes, densities, seeds)
def test_equal_priorities_go_by_position(shape, density, seed):
    mask = random_mask(shape, density, seed)
    before = mask.clone()
    preserve_flow(mask, source(seed), torch.zeros(shape))
    added = mask & ~before
    assert torch.equal(mask, slow_removal(before | added, torch.zeros(shape), int(added.sum())))


@given(shapes)
def test_an_empty_mask_gets_the_fewest_edges(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    assert preserve_flow(mask, source(1), torch.rand(shape)) == needed(shape)
    assert mask.sum() == needed(shape) == max(shape[:2])
    assert dead(mask) == (0, 0)


def test_a_dead_output_and_a_dead_input_are_joined():
    mask = torch.ones(4, 5, 3, 3, dtype=torch.bool)
    mask[2] = False
    mask[:, 3] = False
    before = int(mask.sum())
    assert preserve_flow(mask, source(1)) == 0
    assert mask.sum() == before
    assert mask[2].sum() == mask[:, 3].sum() == mask[2, 3].sum() == 1


def test_a_minimal_cover_becomes_a_minimum_one():
    # Edges 0-0, 0-1, 1-2, 2-2, and output 3 and input 3 are dead: none of these and 3-3 can be
    # spared, but for 0-0 and 1-2, say, there is 1-0. Trained edges, which have a priority, stay.
    first = torch.zeros(4, 4, dtype=torch.bool)
    first[[0, 0, 1, 2], [0, 1, 2, 2]] = True
    assert first.sum() == needed(first.shape)
    found = torch.zeros(4, 4)
    for seed in range(400):
        mask = first.clone()
        assert preserve_flow(mask, source(seed)) == 0
        assert mask.sum() == 4 and dead(mask) == (0, 0) and mask[3, 3]
        found += mask & ~first
    found[3, 3] = 0
    # One of two outputs with one of two inputs, all alike
    assert (found > 0).nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert (found[1:3, :2] - 100).abs().max() < 5 * (400 * 1 / 4 * 3 / 4) ** 0.5

    mask = first.clone()
    assert preserve_flow(mask, source(1), torch.rand(4, 4)) == 1
    assert mask[first].all()


def test_pairs_ends_and_kernel_positions_are_random():
    drawn = torch.zeros(3, 2, 2, 2)
    for seed in range(2000):
        mask = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
        preserve_flow(mask, source(seed))
        drawn += mask
    # 3 edges over 24 positions, all alike: each is there with probability 1/8
    assert (drawn - 250).abs().max() < 5 * (2000 * 1 / 8 * 7 / 8) ** 0.5


def test_random_removal_takes_each_edge_alike():
    gone = torch.zeros(4, 4)
    for seed in range(1000):
        mask = torch.ones(4, 4, dtype=torch.bool)
        mask[0] = False
        preserve_flow(mask, source(seed))
        gone += ~mask
    assert (gone[1:] - 1000 / 12).abs().max() < 5 * (1000 / 12) ** 0.5


@given(shapes, densities, seeds)
def test_a_seed_repeats(shape, density, seed):
    one, other = (random_mask(shape, density, seed) for _ in range(2))
    assert preserve_flow(one, source(seed)) == preserve_flow(other, source(seed))
    assert torch.equal(one, other)


def test_another_seed_is_another_repair():
    masks = [torch.zeros(20, 20, dtype=torch.bool) for _ in range(2)]
    for seed, mask in enumerate(masks):
        preserve_flow(mask, source(seed))
    assert not torch.equal(*masks)


@given(shapes, densities, seeds)
def test_the_memory_format_does_not_matter_and_the_change_is_in_place(shape, density, seed):
    plain = random_mask(shape, density, seed)
    # same values, other strides
    turned = plain.permute(*reversed(range(plain.dim()))).contiguous()
    turned = turned.permute(*reversed(range(plain.dim())))
    priority = torch.rand(shape, generator=source(seed))
    where = plain.data_ptr(), turned.data_ptr()
    preserve_flow(plain, source(seed), priority)
    preserve_flow(turned, source(seed), priority)
    assert torch.equal(plain, turned)
    assert (plain.data_ptr(), turned.data_ptr()) == where
    assert dead(turned) == (0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3, 3)])
def test_a_gpu_gives_the_same(shape):
    mask = random_mask(shape, 0.01, 1)
    there = mask.cuda()
    priority = torch.rand(shape)
    assert preserve_flow(mask, source(2), priority) == preserve_flow(
        there, source(2), priority.cuda()
    )
    assert torch.equal(mask, there.cpu())


def test_a_large_layer_is_fast():
    seconds = []
    for seed in range(3):
        mask = random_mask((512, 512, 3, 3), 0.01, seed)
        mask[:5] = False
        priority = torch.rand(mask.shape)
        start = time.perf_counter()
        assert preserve_flow(mask, source(1), priority) == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # 0.03 s on an idle core


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 2)
    )
    layers = {"0": 0.1, "1": 0.02, "3": 0.06}
    sizes = {name: model[int(name)].weight.shape for name in layers}
    attach_masks(model, draw_masks(sizes, list(layers.values()), 3, "exact"))
    return model


@pytest.mark.parametrize("by_magnitude", [False, True])
def test_repair_of_a_model(by_magnitude):
    model, again, later = network(), network(), network()
    before = {name: mask.clone() for name, _, mask in masked_weights(model)}
    weights = {name: weight.detach().clone() for name, weight, _ in masked_weights(model)}
    held = [mask for _, _, mask in masked_weights(model)]
    assert max(sum(dead(mask)) for mask in held) > 0

    grown = repair(model, 7, 5, by_magnitude)
    assert set(grown) == {"3"}  # 10 edges for 16 inputs
    for name, weight, mask in masked_weights(model):
        assert dead(mask) == (0, 0)
        assert mask.sum() == before[name].sum() + grown.get(name, 0)
        assert torch.equal(weight, weights[name])
    assert all(a is b for a, (_, _, b) in zip(held, masked_weights(model)))
    assert not hasattr(model[4], "weight_mask")
    keep_inside(model)
    assert repair(model, 7, 6, by_magnitude) == {}

    assert repair(again, 7, 5, by_magnitude) == grown
    repair(later, 7, 6, by_magnitude)
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(held, masked_weights(again)))
    assert not all(torch.equal(a, b) for a, (_, _, b) in zip(held, masked_weights(later)))


def test_repair_by_magnitude_spares_large_weights():
    model = nn.Sequential(nn.Linear(30, 30))
    mask = torch.ones(30, 30, dtype=torch.bool)
    mask[:3] = False
    attach_masks(model, {"0": mask.clone()})
    repair(model, 1, 0, by_magnitude=True)
    removed = mask & ~model[0].weight_mask
    smallest = model[0].weight.abs()[mask].kthvalue(3).values
    assert removed.sum() == 3
    assert (model[0].weight.abs()[removed] <= smallest).all()
