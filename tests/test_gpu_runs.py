"""Every kind of run on a pretended GPU: equal to the CPU's to the bit, and no step waits."""

import pytest
from gpu_scenarios import SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_on_a_gpu_is_that_on_the_cpu(gpu, name):
    run = gpu(name)
    assert "error" not in run, run["error"]
    assert "device   cuda:0" in run["log"]
    assert run["differs"] == ""
    assert run["waits"].get("step", {}) == {}
