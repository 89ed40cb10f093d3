"""Standardised columns in exact arithmetic."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def exact(column: Sequence[float], train: Sequence[int]) -> np.ndarray:
    """A column by mean and deviation of the rows ``train``; float64, rounded once."""
    values = [Fraction(x) for x in column]
    mean = sum(values[i] for i in train) / len(train)
    variance = sum((values[i] - mean) ** 2 for i in train) / len(train)
    if variance == 0:
        return np.array([float(x - mean) for x in values])
    # whole numbers with 100 bits more than float64 has, so that nothing over- or underflows
    scale = 1 << max(0, 200 + variance.denominator.bit_length() - variance.numerator.bit_length())
    root = Fraction(math.isqrt(int(variance * scale * scale)), scale)
    return np.array([float((x - mean) / root) for x in values])


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """As close as float32 can be, and 1e-11 around 0."""
    error = np.abs(found.astype(np.float64) - wanted)
    assert (error <= 2.0**-23 * np.maximum(np.abs(wanted), 1e-4)).all(), (found, wanted)
