"""Layer-wise ratios against closed forms, brute force and random networks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from startsparse.ratios import BUDGETS, METHODS, PROFILES, balanced, er, erk, layer_densities


def resnet18():
    shapes, inputs = [(64, 3, 3, 3)], 64
    for outputs in (64, 64, 128, 128, 256, 256, 512, 512):
        shapes += [(outputs, inputs, 3, 3), (outputs, outputs, 3, 3)]
        if outputs != inputs:
            shapes.append((outputs, inputs, 1, 1))
        inputs = outputs
    return [*shapes, (10, 512)]


def realised(densities, shapes):
    sizes = np.array([math.prod(s) for s in shapes])
    return densities @ sizes / sizes.sum()


conv = st.tuples(st.integers(1, 96), st.integers(1, 96), st.sampled_from((1, 3, 5)))
shape = conv.map(lambda s: (s[0], s[1], s[2], s[2])) | st.tuples(
    st.integers(1, 300), st.integers(1, 300)
)
shapes = st.lists(shape, min_size=1, max_size=20)
density = st.floats(0.001, 0.9)


@given(shapes, density, st.sampled_from([m for m in METHODS if m != "network"]))
def test_exact_budget_meets_the_target_and_never_exceeds_one(shapes, p, method):
    densities = layer_densities(method, shapes, p)
    assert realised(densities, shapes) == pytest.approx(p, rel=1e-9)
    assert densities.max() <= 1
    assert densities.min() > 0


def brute_force(profile, sizes, target):
    """min(1, c profile): c by bisection over a very wide range."""
    low, high = 0.0, 1e12
    for _ in range(300):
        c = (low + high) / 2
        if sum(min(1, c * a) * n for a, n in zip(profile, sizes)) < target:
            low = c
        else:
            high = c
    return [min(1, c * a) for a in profile]


@given(shapes, density, st.sampled_from(sorted(PROFILES)))
def test_exact_agrees_with_brute_force(shapes, p, method):
    sizes = [math.prod(s) for s in shapes]
    expected = brute_force(PROFILES[method](shapes), sizes, p * sum(sizes))
    assert layer_densities(method, shapes, p) == pytest.approx(expected, rel=1e-7)


@given(shapes, density)
def test_pyramidal_is_geometric(shapes, p):
    densities = layer_densities("pyramidal", shapes, p)
    ratio = densities[0]
    assert 0 < ratio < 1
    assert densities == pytest.approx([ratio ** (i + 1) for i in range(len(shapes))], rel=1e-9)


@given(shapes, density)
def test_balanced_has_equal_counts_below_saturation(shapes, p):
    densities = layer_densities("balanced", shapes, p)
    counts = [d * math.prod(s) for d, s in zip(densities, shapes)]
    open_counts = [c for c, d in zip(counts, densities) if d < 1 - 1e-9]
    if open_counts:
        assert open_counts == pytest.approx([open_counts[0]] * len(open_counts), rel=1e-9)
        full = [c for c, d in zip(counts, densities) if d >= 1 - 1e-9]
        assert all(c <= open_counts[0] * (1 + 1e-9) for c in full)


def test_uniform_is_the_target():
    assert layer_densities("uniform", resnet18(), 0.2) == pytest.approx([0.2] * 21)


def test_profiles_on_a_layer_by_hand():
    assert erk([(4, 2, 3, 3)]) == pytest.approx([(4 + 2 + 3 + 3) / 72])
    assert er([(4, 2, 3, 3)]) == pytest.approx([6 / 8])
    assert balanced([(4, 2, 3, 3), (5, 2)]) == pytest.approx([1 / 72, 1 / 10])


@pytest.mark.parametrize(
    ("method", "asked", "clipped"),
    [
        ("balanced", 0.5, 0.266),
        ("balanced", 0.2, 0.138),
        ("balanced", 0.05, 0.044),
        ("ERK", 0.5, 0.389),
        ("ERK", 0.2, 0.174),
        ("ERK", 0.05, 0.047),
    ],
)
def test_clip_gives_the_published_codes_densities(method, asked, clipped):
    shapes = resnet18()
    assert realised(layer_densities(method, shapes, asked), shapes) == pytest.approx(asked)
    short = layer_densities(method, shapes, asked, budget="clip")
    assert realised(short, shapes) == pytest.approx(clipped, abs=5e-4)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "network"])
def test_one_layer_has_the_density_asked_for(method, budget):
    assert layer_densities(method, [(7, 5, 3, 3)], 0.3, budget=budget) == pytest.approx([0.3])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "network"])
def test_density_one_is_dense(method):
    assert layer_densities(method, resnet18(), 1.0) == pytest.approx([1.0] * 21)


def test_network_keeps_its_profile_and_rescales():
    shapes = [(10, 10), (10, 10), (10, 10)]
    densities = layer_densities("network", shapes, 0.3, profile=[0.4, 0.2, 0.0])
    assert densities == pytest.approx([0.6, 0.3, 0.0])
    capped = layer_densities("network", shapes, 0.5, profile=[0.9, 0.3, 0.0])
    assert capped == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="not empty"):
        layer_densities("network", shapes, 0.7, profile=[0.9, 0.3, 0.0])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "network"])
def test_dense_layers_count_towards_the_target(method):
    shapes = resnet18()
    densities = layer_densities(method, shapes, 0.1, dense=[0, 20])
    assert densities[0] == densities[20] == 1
    assert realised(densities, shapes) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="dense layers' share"):
        layer_densities(method, shapes, 0.0005, dense=[0, 20])


@pytest.mark.parametrize("p", [0, -0.1, 1.1, math.nan])
def test_density_out_of_range(p):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        layer_densities("uniform", resnet18(), p)


@pytest.mark.parametrize("tiny", [1e-300, 1e-307, 5e-324])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_tiny_profile_is_scaled_like_any_other(tiny, budget):
    shapes = [(10, 10), (20, 10)]
    found = layer_densities("network", shapes, 0.2, budget=budget, profile=[tiny, tiny])
    assert found == pytest.approx([0.2, 0.2])


def test_what_is_left_when_layers_saturate_may_be_tiny():
    found = layer_densities("network", [(10, 10)] * 2, 0.75, profile=[0.5, 1e-310])
    assert found == pytest.approx([1, 0.5])
