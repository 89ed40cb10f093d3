"""What the project says about speed and memory, as programs that print it: python -m benchmarks."""

import startsparse.threads  # noqa: F401 - before torch
