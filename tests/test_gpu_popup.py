"""On a GPU, effective weights of all layers take few operations."""

import pytest


@pytest.mark.parametrize(
    ("name", "ceiling"), [("soft", 1.5), ("popup-layer", 2.5), ("popup-global", 2.5)]
)
def test_operations_of_a_step(gpu, name, ceiling):
    dense, run = gpu("dense"), gpu(name)
    assert "error" not in run, run["error"]
    assert run["launches"]["step"] <= ceiling * dense["launches"]["step"]
