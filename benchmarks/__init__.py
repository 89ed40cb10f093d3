"""Programs that measure what the project claims of speed and memory: python -m benchmarks."""

import startsparse.threads  # noqa: F401 - before torch
