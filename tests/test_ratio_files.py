"""--er-sparsity-file: what a file of densities may say, and what is refused by file and layer."""

import json

import pytest
import torch

from startsparse import checkpoint, er, masks, models
from startsparse.errors import OptionError
from STR.options import STROptions

MLP = {"arch": "mlp", "width": 8}
NAMES = ["hidden.0", "hidden.3", "hidden.6", "classifier"]
GOOD = dict.fromkeys(NAMES, 0.5)


def asked(path, density=0.3):
    options = STROptions(
        **MLP, er_sparse_method="network", er_sparsity_file=str(path), er_sparse_init=density
    )
    model = models.build("mlp", classes=10, width=8)
    assert list(masks.sparse_layers(model)) == NAMES
    return er.requested_densities(model, options)


def refused(path):
    with pytest.raises(OptionError) as error:
        asked(path)
    line = str(error.value)
    assert line.startswith(f"--er-sparsity-file: {path}")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("1e-320", "is 1e-320, too small to compute with; write 0"),
        ("-0.1", "is -0.1, not a number from 0 to 1"),
        ("1.5", "is 1.5, not a number from 0 to 1"),
        ("1e400", "is inf, not a number"),
        ("NaN", "is nan, not a number"),
        ("Infinity", "is inf, not a number"),
        ('"0.5"', "is '0.5', not a number"),
        ("true", "is True, not a number"),
        ("null", "is None, not a number"),
        ("[1]", "is [1], not a number"),
        ('{"density": {"a": 1}}', "is {'a': 1}, not a number"),
        ('{"threshold": 1}', "is None, not a number"),
        (json.dumps("x" * 100), "..., not a number"),
    ],
)
def test_a_wrong_density_is_named(tmp_path, value, what):
    path = tmp_path / "ratio.json"
    path.write_text(json.dumps({**GOOD, "hidden.3": "?"}).replace('"?"', value))
    line = refused(path)
    assert "the density of 'hidden.3' " in line
    assert what in line


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "should be JSON, layer -> density (Expecting value"),
        ("[1]", "should be JSON, layer -> density"),
        ("[" * 10**5, "should be JSON, layer -> density (is nested too deeply)"),
        ('{"hidden.0": 0.1, "hidden.0": 0.2}', "density (names 'hidden.0' twice)"),
        ("9" * 5000, "should be JSON, layer -> density (Exceeds the limit"),
        (json.dumps({**GOOD, "x\ny": 1}), "has a layer 'x\\ny', which the network has not"),
        (json.dumps(dict.fromkeys(NAMES[1:], 1)), "the density of 'hidden.0' is missing"),
        (" " * (17 << 20) + "{}", "cannot be read (has more than 16,777,216 bytes)"),
        (b"\xff\xfe{", "should be JSON, layer -> density ('utf-"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, what):
    path = tmp_path / "ratio.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert what in refused(path)


def test_zero_and_one_are_densities(tmp_path):
    path = tmp_path / "ratio.json"
    path.write_text(json.dumps({**GOOD, "hidden.3": {"density": 0, "threshold": float("nan")}}))
    assert asked(path)["hidden.3"] == 0


def test_masks_that_are_no_masks(tmp_path):
    path = tmp_path / "best.pt"
    state = models.build("mlp", classes=10, width=8).state_dict()
    checkpoint.save_by_rank_0(path, {"model": state})
    assert asked(path) == pytest.approx(dict.fromkeys(NAMES, 0.3))
    for mask in (torch.full((8, 8), 2.0), torch.ones(8, 7, dtype=torch.bool)):
        checkpoint.save_by_rank_0(path, {"model": {**state, "hidden.3.weight_mask": mask}})
        assert "'hidden.3.weight_mask' is no mask of it" in refused(path)
    path.write_bytes(b"PK")
    assert "not a complete checkpoint" in refused(path)
