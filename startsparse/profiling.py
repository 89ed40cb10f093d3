"""What training steps spend their time on: ``--profile``."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from startsparse.atomic import replacing

log = logging.getLogger("startsparse")

TRACE = "profile.json"
STEPS = 10  # that are traced
WARM_UP = 10  # before them: compilation, the choice of kernels, the first pages of memory
LONGEST = 10  # operations that are printed


class Operation(NamedTuple):
    """All calls of one operation.

    Attributes:
        milliseconds: of its own, without the operations that it calls: of the kernels that it
            launched on a GPU, or of the CPU.
    """

    name: str
    milliseconds: float
    calls: int


def new_profile(device: torch.device) -> profile:
    """A profiler of the CPU, and of the GPU if ``device`` is one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own stages otherwise
    gpu = [ProfilerActivity.CUDA] * (device.type == "cuda")
    return profile(activities=[ProfilerActivity.CPU, *gpu])


def operations(seen: profile, device: torch.device) -> list[Operation]:
    """The operations that a stopped profiler saw, the longest first."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [
        Operation(event.key, getattr(event, name) / 1e3, event.count)
        for event in seen.key_averages()
        if event.device_type == DeviceType.CPU  # kernels count for what launched them
    ]
    return sorted(found, key=lambda operation: -operation.milliseconds)


class StepProfiler:
    """Traces `STEPS` steps of one epoch, once, and prints the longest operations.

    Steps of two epochs would have an evaluation between them. Of epochs that are shorter, all steps
    are traced.
    """

    def __init__(self, path: Path, device: torch.device):
        """``path``: the file of the trace, in Chrome's format."""
        self.path, self.device = path, device
        self._steps = self._traced = 0
        self._running: profile | None = None
        self._done = False

    def before_step(self, step: int, steps: int) -> None:
        """Called before ``step`` of an epoch of so many steps."""
        whole = steps - step >= STEPS or step == 0
        if not self._done and self._running is None and whole and self._steps >= WARM_UP:
            self._synchronize()
            self._running = new_profile(self.device)
            self._running.start()

    def after_step(self, step: int, steps: int) -> None:
        """Called after ``step`` of an epoch of so many steps."""
        self._steps += 1
        self._traced += self._running is not None
        if self._running and (self._traced == STEPS or step + 1 == steps):
            self._synchronize()
            seen, self._running, self._done = self._running, None, True
            seen.stop()
            with replacing(self.path, make_folder=False) as temporary:
                seen.export_chrome_trace(str(temporary))
            log.info("%s", text(operations(seen, self.device), self._traced))
            log.info("trace of %d steps: %s", self._traced, self.path.resolve())

    def end(self) -> None:
        """Called after the training: warn if it had too few steps."""
        if not self._done:
            log.warning(
                "warning: --profile: no trace: it begins after %d steps, in an epoch that has %d "
                "left, or whole; more --epochs make room for it",
                WARM_UP,
                STEPS,
            )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def text(found: list[Operation], steps: int) -> str:
    """A table of the longest operations, per step."""
    total = sum(operation.milliseconds for operation in found)
    lines = [f"{'longest operations':<52} {'ms/step':>9} {'share':>7} {'calls/step':>11}"]
    for name, milliseconds, calls in found[:LONGEST]:
        share = milliseconds / total if total else 0.0
        lines.append(
            f"{name[:52]:<52} {milliseconds / steps:9.3f} {share:7.1%} {calls / steps:11.1f}"
        )
    return "\n".join(lines)
