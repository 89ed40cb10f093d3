"""Schedules against values worked out by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from startsparse.schedules import ALIASES, LEARNING_RATES, geometric, learning_rate


def rates(policy, steps=8, *, per=1, **kwargs):
    return [
        learning_rate(policy, step, steps, steps_per_epoch=per, **kwargs) for step in range(steps)
    ]


def test_cosine_from_start_towards_end():
    expected = [0.01 + 0.09 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert rates("cosine", start=0.1, end=0.01) == pytest.approx(expected)
    last = learning_rate("cosine", 8, 8, steps_per_epoch=1, start=0.1, end=0.01)
    assert last == pytest.approx(0.01)


def test_multistep_divides_by_ten_at_a_half_and_three_quarters():
    expected = [0.1] * 4 + [0.01] * 2 + [0.001] * 2
    assert rates("multistep", start=0.1) == pytest.approx(expected)
    assert rates("multistep", start=0.1, end=0.005)[6:] == pytest.approx([0.005] * 2)


@pytest.mark.parametrize(("policy", "span"), [("every30", 30), ("every60", 60)])
@pytest.mark.parametrize("epochs", [10, 100, 150, 160])
@pytest.mark.parametrize("per", [1, 7, 391])
def test_division_by_ten_at_epochs_not_at_shares(policy, span, epochs, per):
    """By hand: the n-th epoch, counted from 0, has been divided n // span times, warm or not."""
    expected = [0.1 / 10 ** (epoch // span) for epoch in range(epochs) for _ in range(per)]
    assert rates(policy, epochs * per, per=per, start=0.1, end=0.09) == pytest.approx(expected)
    warm = rates(policy, epochs * per, per=per, start=0.1, warmup=5 * per)
    assert warm[5 * per :] == pytest.approx(expected[5 * per :])


def test_step_is_every_sixty_epochs():
    assert ALIASES["step"] == "every60"


def test_constant():
    assert rates("constant", start=0.3, end=0.1) == [0.3] * 8


@pytest.mark.parametrize("policy", ["cosine", "multistep", "constant"])
def test_warm_up_rises_linearly_to_the_rate_and_the_rest_is_the_policy(policy):
    warm = rates(policy, 12, start=0.4, warmup=4)
    assert warm[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert warm[4:] == pytest.approx(rates(policy, 8, start=0.4))


def test_warm_up_longer_than_the_training():
    assert rates("cosine", 2, start=1.0, warmup=4) == [0.25, 0.5]


def test_aliases_name_schedules():
    assert set(ALIASES.values()) <= set(LEARNING_RATES)


def test_the_published_levels():
    levels = geometric(0.3, 0.8, 0.01)
    assert levels[:14] == pytest.approx([0.3 * 0.8**k for k in range(1, 15)], rel=1e-5)
    assert levels[14:] == [0.01]


@pytest.mark.parametrize(
    ("start", "keep", "target", "expected"),
    [
        (1.0, 0.5, 0.25, [0.5, 0.25]),  # no level twice
        (1.0, 0.8, 0.5, [0.8, 0.64, 0.5]),  # 3.1 levels
        (0.3, 0.8, 0.29, [0.29]),  # 0.15 levels are one
        (1.0, 0.8, 1.0, [1.0]),
    ],
)
def test_levels_end_on_the_target(start, keep, target, expected):
    assert geometric(start, keep, target) == expected


@given(st.floats(1e-3, 1.0), st.floats(0.05, 0.999), st.floats(1e-4, 0.9999))
def test_levels_fall_by_about_what_is_kept(start, keep, share):
    target = start * share
    levels = [start, *geometric(start, keep, target)]
    assert levels[-1] == target
    *steps, last = [low / high for high, low in itertools.pairwise(levels)]
    assert steps == pytest.approx([keep] * len(steps), rel=2e-5)
    assert last < 1
    slack = 1 + 2e-5
    assert keep**1.5 / slack <= last
    assert last <= keep**0.5 * slack or not steps  # a target that is near is one level


def test_levels_fall_where_hardly_any_weight_goes():
    levels = [0.3, *geometric(0.3, 0.9999999, 0.29999)]
    assert all(low < high for high, low in itertools.pairwise(levels))
