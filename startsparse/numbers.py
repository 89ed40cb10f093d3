"""Numbers as options take them: plain decimal ones, and none that a computation cannot hold.

The same rule holds on the command line and in YAML files, for the scripts, sweeps, tables, reports
and exports. So no option can be infinite or NaN, and none overflows the integers and floats of the
libraries below.
"""

import math
import re
from typing import Annotated

import torch
from tyro.constructors import PrimitiveConstructorSpec

LARGEST = 2**31 - 1
"""Of whole numbers; counts, sizes and widths of 32 bits are safe in every library."""

LARGEST_SEED = 2**63 - 1

LARGEST_REAL = torch.finfo(torch.float32).max
"""Weights are float32."""


def whole(text: str, largest: int = LARGEST) -> int:
    """A whole number in decimal digits, between -largest - 1 and largest.

    Raises:
        ValueError: it is not; says what would be right.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
        raise ValueError(f"'{text}' is not a whole number")
    digits = text.strip().lstrip("+-0")
    value = int(text) if len(digits) < 20 else largest + 1  # Python refuses thousands of digits
    if not -largest - 1 <= value <= largest:
        raise ValueError(f"'{text}' is beyond the whole numbers that fit ({largest})")
    return value


def real(text: str) -> float:
    """A finite number in decimal digits, as 0.1 or 1e-4, that float32 can hold.

    Raises:
        ValueError: it is not; says what would be right.
    """
    try:
        value = float("x" if "_" in text or not text.isascii() else text)
    except ValueError:
        raise ValueError(f"'{text}' is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"'{text}' is not a finite number")
    if value == 0 and re.search("[1-9]", text.lower().partition("e")[0]):
        raise ValueError(f"'{text}' is too small to be told from 0")
    if abs(value) > LARGEST_REAL:
        raise ValueError(f"'{text}' is beyond the numbers that float32 holds ({LARGEST_REAL:.3g})")
    return value


WHOLE: PrimitiveConstructorSpec[int] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=lambda strings: whole(strings[0]),
    is_instance=lambda value: type(value) is int,
    str_from_instance=lambda value: [str(value)],
)
REAL: PrimitiveConstructorSpec[float] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="FLOAT",
    instance_from_str=lambda strings: real(strings[0]),
    is_instance=lambda value: type(value) in (float, int),
    str_from_instance=lambda value: [str(value)],
)
Seed = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda strings: whole(strings[0], LARGEST_SEED),
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    ),
]
"""The type of a seed, which has 64 bits."""
