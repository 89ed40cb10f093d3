"""Standardising: right to the last bits of float32, against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from startsparse.errors import UserError
from startsparse.tabular import tables
from startsparse.tabular.standard import standardise


def exact(column, train):
    """The standardised column in exact arithmetic, but for the root; floats."""
    values = [Fraction(x) for x in column]
    mean = sum(values[i] for i in train) / len(train)
    variance = sum((values[i] - mean) ** 2 for i in train) / len(train)
    if variance == 0:
        return [float(x - mean) for x in values]
    # an integer root with 80 bits more than needed, so that no size over- or underflows
    scale = 1 << max(0, 200 + variance.denominator.bit_length() - variance.numerator.bit_length())
    root = Fraction(math.isqrt(int(variance * scale * scale)), scale)
    return [float((x - mean) / root) for x in values]


def check(column, train):
    features = torch.tensor(column, dtype=torch.float64).unsqueeze(1)
    found, mean, scale = standardise(features, torch.tensor(train))
    assert found.dtype == torch.float32 and mean.dtype == scale.dtype == torch.float64
    wanted = np.array(exact(column, train))
    error = np.abs(found[:, 0].double().numpy() - wanted)
    assert (error <= 2.0**-23 * np.maximum(np.abs(wanted), 1e-4)).all(), (error, wanted)


draw = np.random.default_rng(0)
COLUMNS = {
    "plain": draw.normal(size=50),
    "epoch seconds": 1.7e9 + 50 * draw.random(50),
    "epoch nanoseconds": 1.7e18 + 1e5 * draw.integers(0, 9, 50),
    "1e15 and 0, 1": 1e15 + draw.integers(0, 2, 50),
    "years": 1950.0 + draw.integers(0, 70, 50),
    "last digits": 1 + 2.0**-52 * draw.integers(0, 4, 50),
    "huge": draw.choice([-1.7e308, 1.7e308, 0], 50),
    "denormal": 5e-324 * draw.integers(0, 9, 50),
    "tiny around 1e-300": 1e-300 * (1 + draw.random(50)),
    "one outlier": np.r_[draw.normal(size=49), 1e12],
    "constant": np.full(50, 0.1),
    "constant and huge": np.full(50, 1e300),
    "all 0": np.zeros(50),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_to_the_last_bits_of_float32(column):
    check(column.tolist(), list(range(0, 50, 2)))


def test_a_constant_column_is_centred_and_another_value_of_it_keeps_its_distance():
    check([7.0, 7.0, 7.0, 1e15 + 1], [0, 1, 2])
    check([1e15, 1e15, 1e15 + 1], [0, 1])


def test_a_table_of_times_is_told_apart(tmp_path):
    """The labels are early and late within 50 seconds, which one float32 number spans."""
    times = 1.7e9 + np.linspace(0, 50, 200)
    rows = "".join(f"{time!r},{int(time > 1.7e9 + 25)}\n" for time in times.tolist())
    (tmp_path / "t.csv").write_text("time,y\n" + rows)
    table = tables.load(str(tmp_path / "t.csv"), label="y")
    features, labels = tables.split(table, 1).train
    assert ((features[:, 0] > 0) == (labels == 1)).double().mean() > 0.97
    assert len(features.unique()) == len(features)


def test_a_row_that_float32_cannot_place_is_refused():
    values = torch.cat([1e-300 * torch.linspace(0, 1, 50).double(), torch.tensor([0.5])])
    table = tables.Table(values.unsqueeze(1), torch.arange(51) % 2, ("a\n",), ("u", "v"))
    said = []
    for seed in range(20):
        try:
            tables.split(table, seed)
        except UserError as error:
            said.append(str(error))
    assert 0 < len(said) < 20  # where the row is in the training part, the others are alike
    assert said[0].startswith(r"column 'a\n': a value is further from those of the training rows")
