"""Settings of all tests."""

import os

import torch
from hypothesis import settings

# Two test processes with two threads each would wait for one another on two cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: a test that fails can be run again, and 4 sigma stays 4 sigma.
settings.register_profile("startsparse", derandomize=True, deadline=None)
settings.load_profile("startsparse")
