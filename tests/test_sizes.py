"""Sizes that cannot be: batches too small for BatchNorm, networks too large for the machine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ER_DST.main
import ER_SLT.main
import STR.main
from startsparse import data, memory, parallel, recipe
from startsparse.errors import OptionError
from startsparse.options import Options

SCRIPTS = {"STR": STR.main, "ER_DST": ER_DST.main, "ER_SLT": ER_SLT.main}


class ReachedError(Exception):
    """Stands for the reading of data."""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start a script, up to its data."""

    def reached(*_):
        raise ReachedError

    monkeypatch.setattr(recipe, "load_data", reached)

    def run(script, *argv):
        folders = ["--log-dir", str(tmp_path / "runs"), "--result-dir", str(tmp_path)]
        SCRIPTS[script].main([*argv, *folders])

    return run


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_example_is_too_few_for_batchnorm_on_one_pixel(start, script):
    message = "^--batch-size: 1 gives BatchNorm one value per channel"
    with pytest.raises(OptionError, match=message):
        start(script, "--arch", "mlp", "--batch-size", "1")
    with pytest.raises(ReachedError):
        start(script, "--arch", "mlp", "--batch-size", "2")
    with pytest.raises(ReachedError):  # 8x8 pixels are 64 values
        start(script, "--arch", "resnet20", "--width", "4", "--batch-size", "1")


def test_networks_without_batchnorm_and_whole_graphs_take_one_example(start):
    with pytest.raises(ReachedError):
        start("STR", "--set", "modular-addition", "--arch", "algorithmic", "--batch-size", "1")
    with pytest.raises(ReachedError):
        start("STR", "--set", "karate", "--arch", "mlp")


@pytest.mark.parametrize(("size", "fits"), [(8, False), (9, True), (32, True)])
def test_what_counts_is_the_map_that_batchnorm_gets(size, fits):
    options = Options(arch="resnet18", width=2, batch_size=1)
    with torch.device("meta"):
        if fits:
            recipe.build(options, data.Shape(10, 3, size))
            return
        with pytest.raises(OptionError, match="--batch-size"):
            recipe.build(options, data.Shape(10, 3, size))


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("examples", range(2, 14))
def test_each_device_gets_two_examples_at_least(examples, devices):
    rows = torch.arange(examples)
    scatter = parallel.Parallel.scatter
    parts, _ = scatter(nn.Identity(), (rows,), {}, ["cpu"] * devices)
    assert torch.equal(torch.cat([part for (part,) in parts]), rows)
    assert all(len(part) >= 2 for (part,) in parts)
    assert len(parts) == min(devices, examples // 2)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["2147483647", "100000"])
@pytest.mark.parametrize("network", ["resnet20", "resnet50", "vgg11", "mlp"])
def test_widths_that_no_machine_holds_are_refused_before_data_is_read(start, network, width):
    with pytest.raises(OptionError, match="^--width: (no computer holds|the weights alone need)"):
        start("STR", "--arch", network, "--width", width)


def test_what_counts_is_the_memory_of_the_machine(start, monkeypatch):
    counted = 4 * (3072 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 10 + 10 + 3 * 2 * 16)
    for installed, error in ((counted, ReachedError), (counted - 1, OptionError)):
        monkeypatch.setattr(recipe, "memory", SimpleNamespace(installed=lambda: installed))  # noqa: B023
        with pytest.raises(error):
            start("STR", "--arch", "mlp", "--width", "16")


WHOLE = memory.installed()


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "12345\n"}, 12345),
        ("0::/\n", {"memory.max": "max\n"}, WHOLE),
        ("0::/\n", {"memory.max": ""}, WHOLE),
        ("0::/\n", {}, WHOLE),
        ("0::/a/b\n", {"a__b__memory.max": "max\n", "a__memory.max": "12345\n"}, 12345),
        ("5:cpu:/\n4:memory:/a\n", {"memory__a__memory.limit_in_bytes": "12345\n"}, 12345),
        ("4:memory:/\n", {"memory__memory.limit_in_bytes": f"{2**63 - 4096}\n"}, WHOLE),
    ],
)
def test_the_memory_of_a_container_counts(cgroups, own, files, expected):
    cgroups(own, **files)
    assert memory.installed() == expected


def test_a_modulus_whose_pairs_no_machine_holds(start):
    with pytest.raises(OptionError, match="--modulus: the pairs of 1000000 need .* GiB"):
        start("STR", "--set", "modular-addition", "--arch", "algorithmic", "--modulus", "1000000")
