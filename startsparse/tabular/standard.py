"""Numbers to mean 0 and standard deviation 1, right to the last bits of float32."""

import numpy as np
import torch
from torch import Tensor


def standardise(features: Tensor, train: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features by mean and standard deviation of the rows ``train``; rounded to float32 at the end.

    A column that is constant in these rows is only centred. Offsets and scales do not matter: a
    column is first divided by a power of two, and the first row subtracted. So neither do squares
    overflow, nor does an offset hide the spread.

    Args:
        features: float64 [N, F], finite.
        train: int64 [M] of rows.

    Returns:
        float32 [N, F], infinite where it is beyond float32, and float64 mean and scale [F].
    """
    values, rows = features.numpy(), train.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        first = _exponents(values[rows]) + 1
        base = np.ldexp(values[rows[0]], -first)
        values = np.ldexp(values, -first) - base  # of the training rows, within 1 and -1
        second = _exponents(values[rows])
        values = np.ldexp(values, -second)
        mean = values[rows].mean(0)
        std = np.sqrt(np.square(values[rows] - mean).mean(0))
        constant = std == 0
        result = np.where(
            constant, np.ldexp(values, first), (values - mean) / np.where(constant, 1, std)
        )
        result = result.astype(np.float32)
        mean = np.ldexp(np.ldexp(mean, second) + base, first)
        scale = np.where(constant, 1, np.ldexp(std, first + second))
    return torch.from_numpy(result), torch.from_numpy(mean), torch.from_numpy(scale)


def _exponents(values: np.ndarray) -> np.ndarray:
    """The smallest e of each column with 2^e above all its values; 0 where all are 0."""
    return np.frexp(np.abs(values).max(0))[1]
