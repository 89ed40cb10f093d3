"""A sample of each promise that `make torture` tries with many inputs."""

import pytest
from torture.promises import PROMISES, all_promises, try_out


@pytest.mark.parametrize(
    "promise", [p for p in all_promises() if p.sample], ids=lambda promise: promise.name
)
def test_a_sample(promise):
    for value, error in try_out(promise, promise.sample).faults:
        raise AssertionError(repr(value)) from error


def test_every_promise_is_entered_once():
    names = [promise.name for promise in PROMISES]
    assert len(set(names)) == len(names)
