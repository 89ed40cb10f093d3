"""Devices: which to use, and a network on several of them; for several processes: `processes`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from startsparse import processes
from startsparse.errors import OptionError, UserError, one_line

log = logging.getLogger("startsparse")


def choose_devices(multigpu: str) -> list[torch.device]:
    """The devices of ``--multigpu``: GPUs as in "0,1"; "" is the first GPU, if there is one.

    Of several processes, each has the GPU of its number on its machine. Without CUDA it is the CPU;
    a line says so where ``multigpu`` names GPUs.

    Raises:
        UserError: a GPU that this machine does not have.
        OptionError: this machine has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        if multigpu:
            log.info("--multigpu %s: there is no CUDA here, the CPU is used", multigpu)
        return [torch.device("cpu")]
    # One seed is one run: no algorithm whose sums depend on the order in which threads arrive.
    torch.backends.cudnn.deterministic = True
    if processes.world_size() > 1:
        count, gpus = processes.local_size(), torch.cuda.device_count()
        if count > gpus:
            raise OptionError(
                f"torchrun: --nproc-per-node {count} needs as many GPUs, and this machine has "
                f"{gpus}; start fewer processes, or hide the GPUs by CUDA_VISIBLE_DEVICES=''"
            )
        torch.cuda.set_device(processes.local_rank())  # NCCL looks at it
        return [torch.device("cuda", processes.local_rank())]
    indices = [int(index) for index in (multigpu or "0").split(",")]
    for index in indices:
        if index >= torch.cuda.device_count():
            have = f"0 to {torch.cuda.device_count() - 1}"
            raise UserError(f"--multigpu: there is no GPU {index} here; name some of {have}")
    return [torch.device("cuda", index) for index in dict.fromkeys(indices)]


class Parallel(nn.DataParallel):
    """DataParallel that gives each device two examples at least, as BatchNorm needs them.

    Parts differ by one example at most. A small batch leaves some devices without work.
    """

    def scatter(
        self, inputs: tuple[Tensor, ...], kwargs: dict[str, Any] | None, device_ids: Sequence[Any]
    ) -> Any:
        """One tuple of inputs for each device that has work."""
        (examples,) = inputs
        working = device_ids[: max(1, len(examples) // 2)]
        parts = examples.tensor_split(len(working))
        scattered = [(p.to(d, non_blocking=True),) for p, d in zip(parts, working)]
        return scattered, [kwargs or {}] * len(working)

    def parallel_apply(
        self, replicas: Sequence[Any], inputs: Sequence[Any], kwargs: Any
    ) -> list[Any]:
        """The outputs of the replicas, each computed by a thread that works as this one does."""
        return super().parallel_apply([_as_here(each) for each in replicas], inputs, kwargs)


def _as_here(replica: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``replica``, computed under the autocast and the inference mode of the calling thread.

    DataParallel's threads take over whether there are gradients, and whether there is autocast, but
    its dtype becomes float16, and inference mode ends.
    """
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    # Not inference_mode(False) elsewhere, as that would switch gradients on.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else nullcontext

    def computed(*inputs: Any, **kwargs: Any) -> Tensor:
        with mode(), torch.autocast("cuda", dtype, enabled=enabled):
            return replica(*inputs, **kwargs)

    return computed


def parallel(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """``model``, or DataParallel around it where there are several devices."""
    return Parallel(model, [d.index for d in devices]) if len(devices) > 1 else model


def check_compile(device: torch.device) -> None:
    """Compile a small function: torch.compile itself begins when the first batch is trained on.

    Raises:
        OptionError: it fails, without a C++ compiler for one.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of compilers, caches, subprocesses, threads
        raise OptionError(f"--compile: does not work here ({_of_compile(error)})") from None


@contextmanager
def compiling() -> Iterator[None]:
    """What torch.compile raises inside is a `UserError` of one line."""
    try:
        yield
    except Exception as error:
        if not any("torch._dynamo" in kind.__module__ for kind in type(error).__mro__):
            raise
        raise UserError(f"--compile: failed ({_of_compile(error)})") from None


def _of_compile(error: Exception) -> str:
    """The first line, and the compiler's first error, of its many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    others = [line for line in lines[1:] if "error:" in line]
    return one_line("; ".join([first, *others[:1]])[:400])


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The autocast context of ``--amp``: bf16, off, or auto (bf16 on GPUs that have it)."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")
