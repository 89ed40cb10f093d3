"""Every kind of run on a pretended GPU: equal to the CPU's to the bit, and no step waits."""

import pytest
from gpu_scenarios import SCENARIOS

DRAWS_THERE = {"set"}  # random growth draws on the device: equal in counts


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "diverges"])
def test_a_run_on_a_gpu_is_that_on_the_cpu(gpu, name):
    run = gpu(name)
    assert "error" not in run, run["error"]
    assert "device   cuda:0" in run["log"]
    assert run["counts"] == ""
    assert run["differs"] == "" or name in DRAWS_THERE
    assert "step" not in run["waits"]  # none in an ordinary step
    epochs = run["log"].count("\nepoch ") // 2  # here and there
    assert sum(run["waits"]["look"].values()) <= 4 * epochs
