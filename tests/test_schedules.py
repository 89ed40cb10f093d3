"""Learning-rate schedules against values worked out by hand."""

import math

import pytest

from startsparse.schedules import ALIASES, LEARNING_RATES, learning_rate


def rates(policy, steps=8, **kwargs):
    return [learning_rate(policy, step, steps, **kwargs) for step in range(steps)]


def test_cosine_from_start_towards_end():
    expected = [0.01 + 0.09 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert rates("cosine", start=0.1, end=0.01) == pytest.approx(expected)
    assert learning_rate("cosine", 8, 8, start=0.1, end=0.01) == pytest.approx(0.01)


def test_multistep_divides_by_ten_at_a_half_and_three_quarters():
    expected = [0.1] * 4 + [0.01] * 2 + [0.001] * 2
    assert rates("multistep", start=0.1) == pytest.approx(expected)
    assert rates("multistep", start=0.1, end=0.005)[6:] == pytest.approx([0.005] * 2)


def test_every30_divides_by_ten_every_thirty_epochs_of_a_hundred():
    for steps in (1, 7, 391):  # of an epoch: 0.3, 0.6 and 0.9 are met to the step
        epochs = [rates("every30", 100 * steps, start=0.1)[i * steps] for i in range(100)]
        expected = [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10
        assert epochs == pytest.approx(expected)
    assert rates("every30", 10, start=0.1, end=0.005)[6:] == pytest.approx([0.005] * 4)


def test_constant():
    assert rates("constant", start=0.3, end=0.1) == [0.3] * 8


@pytest.mark.parametrize("policy", LEARNING_RATES)
def test_warm_up_rises_linearly_to_the_rate_and_the_rest_is_the_policy(policy):
    warm = rates(policy, 12, start=0.4, warmup=4)
    assert warm[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert warm[4:] == pytest.approx(rates(policy, 8, start=0.4))


def test_warm_up_longer_than_the_training():
    assert rates("cosine", 2, start=1.0, warmup=4) == [0.25, 0.5]


def test_aliases_name_schedules():
    assert set(ALIASES.values()) <= set(LEARNING_RATES)
