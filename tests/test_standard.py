"""Standardising: right to the last bits of float32, against exact arithmetic."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from standardised import assert_close, exact

from startsparse.data import planetoid
from startsparse.data.arrays import Arrays
from startsparse.errors import UserError
from startsparse.tabular import tables
from startsparse.tabular.standard import standardise


def check(column, train):
    features = torch.tensor(column, dtype=torch.float64).unsqueeze(1)
    found, mean, scale = standardise(features, torch.tensor(train))
    assert found.dtype == torch.float32 and mean.dtype == scale.dtype == torch.float64
    assert_close(found[:, 0].numpy(), exact(column, train))


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
    assert said[0].startswith(
        r"the table: column 'a\n': a value is further from those of the training rows"
    )


@pytest.mark.parametrize("value", [1, 3, 13, 77, 200, 251])
def test_a_constant_channel_of_images_is_divided_by_1(value):
    """In float64 its variance came out as 1e-17 here, and other pixels were multiplied by 1e8."""
    images = torch.full((7, 32, 32, 1), value, dtype=torch.uint8)
    pixels = images.long().flatten(1)
    moments = torch.stack([pixels.sum(1), pixels.square().sum(1)], 1).unsqueeze(2)
    arrays = Arrays((images, torch.zeros(7)), None, 2, ("a", "b"), 0, False, moments=moments)
    assert arrays.normalisation(torch.arange(7)) == ([value / 255], [1.0])


def test_a_single_grey_step_in_many_images_has_its_deviation():
    images = torch.full((70, 32, 32, 1), 200, dtype=torch.uint8)
    images[0, 0, 0, 0] = 201
    pixels = images.long().flatten(1)
    moments = torch.stack([pixels.sum(1), pixels.square().sum(1)], 1).unsqueeze(2)
    arrays = Arrays((images, torch.zeros(70)), None, 2, ("a", "b"), 0, False, moments=moments)
    (mean,), (std,) = arrays.normalisation(torch.arange(70))
    share = Fraction(1, 70 * 32 * 32)
    assert mean == pytest.approx(float((200 + share) / 255), rel=1e-15)
    assert std == pytest.approx(math.sqrt(share * (1 - share)) / 255, rel=1e-14)


def test_features_of_a_node_are_divided_by_their_exact_sum():
    """In float32 1e8 + 1 is 1e8, a thousand times."""
    values = torch.tensor([1e8, *[1.0] * 1000], dtype=torch.float64)
    sparse = values.unsqueeze(0).to_sparse()
    spec = dataclasses.replace(planetoid.CORA, nodes=1, features=1001)
    found = planetoid._rows(spec, (torch.tensor([0]), sparse))
    wanted = (values / (1e8 + 1000)).float()
    assert torch.equal(found.dense[0], wanted)
