"""Randomness is derived, not carried.

Every draw of a run comes from a new generator, seeded by (seed, purpose, epoch, step). There is no
hidden state to save: the same seed gives the same run, and a resumed run is the same run.
"""

import hashlib

import torch


def derive(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> int:
    """A 63-bit seed that depends on all four arguments and on nothing else."""
    key = repr((int(seed), purpose, int(epoch), int(step))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(
    seed: int,
    purpose: str,
    epoch: int = 0,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A generator for one draw; ``purpose`` names it, as in "shuffle", "mask/layer1.conv".

    On a GPU it gives other numbers than on the CPU, and other models of GPUs may give others.
    """
    return torch.Generator(device).manual_seed(derive(seed, purpose, epoch, step))
