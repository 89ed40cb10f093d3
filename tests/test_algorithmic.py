"""Algorithmic data: pairs and their sums, the network, epochs of several passes, runs of STR."""

import json
import math
from itertools import chain

import pandas as pd
import pytest
import torch
from data_files import fails, gathered, loaded
from script_runs import Crash, crashing, same, weights

from startsparse import models, plots, report
from startsparse.data import Repeated, Rows, Shape, modular
from startsparse.errors import OptionError, UserError
from startsparse.masks import sparse_layers
from startsparse.models.algorithmic import Algorithmic
from startsparse.trainer import Trainer
from STR import main as script

CPU = torch.device("cpu")
SMALL = ["--set", "modular-addition", "--modulus", "7", "--width", "32", "--batch-size", "64"]


def addition(**options):
    return loaded("modular-addition", **{"batch_size": 4096, **options})


def numbers(x):
    """The two numbers of each row of counts [B, p, 1, 1]."""
    counts = x.flatten(1).int().tolist()
    return [tuple(n for n, times in enumerate(row) for _ in range(times)) for row in counts]


# Data


def test_every_pair_is_there_once_with_its_sum():
    sums = addition(modulus=11, train_fraction=0.6)
    assert sums.shape == Shape(11, 11, 1)
    parts = [gathered(part) for part in (sums.train, sums.valid, sums.test)]
    pairs = [numbers(x) for x, _ in parts]
    assert sorted(chain(*pairs)) == [(a, b) for a in range(11) for b in range(a, 11)]
    assert [len(part) for part in pairs] == [40, 13, 13]  # of 66
    for (x, labels), part in zip(parts, pairs):
        assert x.dtype == torch.float32 and x.shape[1:] == (11, 1, 1)
        assert labels.tolist() == [(a + b) % 11 for a, b in part]


def test_the_parts_depend_on_the_seed_alone():
    def parts(**options):
        sums = addition(modulus=11, **options)
        return [set(numbers(gathered(p)[0])) for p in (sums.train, sums.valid, sums.test)]

    one = parts(seed=3, valid_split=0)
    torch.manual_seed(9)
    assert parts(seed=3, batch_size=8) == one
    assert all(a != b for a, b in zip(parts(seed=4), one))


def test_training_pairs_are_shuffled_and_the_others_are_not():
    sums = addition(modulus=11, batch_size=10)
    one, other = (numbers(gathered(sums.train, epoch)[0]) for epoch in (0, 1))
    assert one != other and sorted(one) == sorted(other)
    valid = [numbers(gathered(sums.valid, epoch)[0]) for epoch in (0, 1)]
    assert valid[0] == valid[1] == sorted(valid[0])


@pytest.mark.parametrize("batch_size", [3, 7, 100])
def test_rows_from_a_later_step_are_the_same_rows(batch_size):
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7)
    for seed in (None, 5):
        rows = Rows(x, y, batch_size=batch_size, device=CPU, seed=seed)
        whole = list(rows.epoch(2))
        assert len(whole) == len(rows) == {3: 3 - (seed is not None), 7: 1, 100: 1}[batch_size]
        for features, labels in whole:
            assert torch.equal(features, x[labels][:, :, None, None])
        for start in range(len(rows) + 1):
            rest = list(rows.epoch(2, start))
            assert [r[1].tolist() for r in rest] == [w[1].tolist() for w in whole[start:]]


def test_an_epoch_of_several_passes_is_several_epochs():
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7)
    rows = Rows(x, y, batch_size=4, device=CPU, seed=5)
    passes = Repeated(rows, 3)
    assert (len(passes), passes.examples) == (6, 21)

    def labels(epoch):
        return [labels.tolist() for _, labels in epoch]

    single = [labels(rows.epoch(number)) for number in range(6)]
    assert labels(passes.epoch(0)) == list(chain(*single[:3]))
    for start in range(7):
        assert labels(passes.epoch(1, start)) == list(chain(*single[3:]))[start:]
    assert len({str(epoch) for epoch in single}) == 6


# The network


def test_the_embedding_of_a_pair_is_the_sum_of_both():
    model = Algorithmic(7, 5, width=6)
    x, _ = next(addition(modulus=7).train.epoch(0))
    table = model.embedding.weight.T
    summed = torch.stack([table[a] + table[b] for a, b in numbers(x)])
    torch.testing.assert_close(model(x), model.decoder(summed))
    torch.testing.assert_close(model(x.flatten(1)), model(x))


def test_its_layers():
    model = models.build("algorithmic", classes=5, channels=7, size=1, width=6)
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparse_layers(model).items()}
    assert shapes == {"embedding": (6, 7), "decoder.0": (12, 6), "decoder.2": (5, 12)}


# Runs


@pytest.mark.parametrize("conv_type", ["DenseConv", "ConvMask"])
def test_a_short_training_learns_its_pairs_by_heart(run, no_pictures, conv_type):
    """Generalisation comes later: see results/algorithmic."""
    folder = run(*SMALL, "--conv-type", conv_type, "--epochs", "8")
    epochs = pd.read_csv(folder / "epochs.csv")
    assert epochs["train_accuracy"].iloc[0] < 0.6
    assert epochs["train_accuracy"].iloc[-1] == 1
    result = json.loads((folder / "summary.json").read_text())
    assert result["weights"] == 7 * 32 + 32 * 64 + 64 * 7
    assert result["density"] == (1 if conv_type == "DenseConv" else pytest.approx(0.5, abs=0.03))
    # FLOPs of 160 steps on 20 of 28 pairs
    dense = 2 * (7 * 32 + 32 * 64 + 64 * 7)
    per_pair = 3 * dense - 2 * 7 * 32
    spent = result["training_flops"] / result["training_flops_share"]
    assert spent == pytest.approx(160 * 20 * per_pair)


def test_resumed_equals_uninterrupted_within_passes(run, monkeypatch, no_pictures):
    argv = [*SMALL, "--epochs", "2", "--passes", "3", "--batch-size", "8", "--save-every", "4"]
    whole = run(*argv, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crashing("after", 1))
        run(*argv, where="parts")
    assert same(whole, run(*argv, "--resume", "auto", where="parts"))


def test_an_mlp_takes_rows_of_numbers(run, no_pictures):
    folder = run(*SMALL, "--arch", "mlp", "--epochs", "1")
    assert weights(folder)["hidden.0.weight"].shape == (32, 7)


@pytest.mark.parametrize(
    "flags", [["--modulus", "8"], ["--train-fraction", "0.5"], ["--passes", "5"]]
)
def test_an_accepted_option_has_an_effect(run, no_pictures, flags):
    one, other = (
        weights(run(*SMALL, "--epochs", "1", *more, where=where))
        for where, more in (("a", []), ("b", flags))
    )
    assert any(one[k].shape != other[k].shape or not torch.equal(one[k], other[k]) for k in one)


BAD = {
    "--modulus: 1 should be at least 2": ["--modulus", "1"],
    "--modulus: '2.5' is not a whole number": ["--modulus", "2.5"],
    "--train-fraction: 0.0 should be above 0 and below 1": ["--train-fraction", "0"],
    "--train-fraction: 1.0 should be above 0 and below 1": ["--train-fraction", "1"],
    "--train-fraction: 'nan' is not a finite number": ["--train-fraction", "nan"],
    "--train-fraction: 0.9999 of 1770 pairs leaves 1770 to train on and 0": [
        *("--train-fraction", "0.9999")
    ],
    "--train-fraction: 0.0001 of 1770 pairs leaves 0 to train on and 1770": [
        *("--train-fraction", "0.0001")
    ],
    "--arch: resnet20 is not for modular-addition, a set of rows; --arch mlp or algorithmic is": [
        *("--arch", "resnet20")
    ],
    "--arch: gcn is not for modular-addition": ["--arch", "gcn"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_one_line_before_data_or_devices(message, monkeypatch):
    for module, name in ((script.data, "load"), (script.parallel, "choose_devices")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("touched"))
    with pytest.raises(OptionError) as error:
        script.main(["--set", "modular-addition", *BAD[message]])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_network_is_not_for_images():
    with pytest.raises(OptionError, match=r"^--arch: algorithmic is not for digits, a set of imag"):
        script.main(["--arch", "algorithmic"])


def test_load_checks_its_options_too():
    assert fails(OptionError, name="modular-addition", modulus=1).startswith("--modulus: 1 ")
    assert fails(OptionError, name="digits", passes=0).startswith("--passes: 0 ")
    modular.check(59, 0.999)  # two pairs are held out: one to validate, one to test


# The two curves


def test_curves_are_means_over_the_runs_of_a_setting(tmp_path):
    rows = []
    for run, (kind, scale) in enumerate([("dense", 1.0), ("dense", 0.5), ("ER", 0.2)]):
        folder = tmp_path / f"run{run}"
        folder.mkdir()
        epochs = pd.DataFrame({"epoch": [1, 2, 3], "train_accuracy": [0.5, 1, 1], "lr": 0})
        epochs["valid_accuracy"] = [0, 0.1 * scale, scale]
        epochs.to_csv(folder / "epochs.csv", index=False)
        rows.append({"run": str(folder), "kind": kind})
    table = report.curves(pd.DataFrame(rows), ["kind"])
    dense = table[table["kind"] == "dense"].set_index("epoch")
    assert dense["valid_accuracy"].tolist() == pytest.approx([0, 0.075, 0.75])
    assert dense["train_accuracy"].tolist() == [0.5, 1, 1]
    assert dense["valid_accuracy_ci95"][3] == pytest.approx(12.7062 * 0.25, rel=1e-4)
    assert table["runs"].tolist() == [1, 1, 1, 2, 2, 2]
    assert math.isnan(table["valid_accuracy_ci95"][0])
    plots.plot_curves(table, ["kind"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "run1/epochs.csv").unlink()
    with pytest.raises(UserError, match=r"^--curves: .*run1/epochs\.csv does not exist"):
        report.curves(pd.DataFrame(rows), ["kind"])
