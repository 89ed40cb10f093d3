"""Options of ER_SLT/main.py: names, defaults, the levels they mean, and bad ones."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
import yaml
from script_runs import ROOT
from slt_runs import MLP, PUBLISHED

from ER_SLT import main as script
from ER_SLT.edge_popup import RANKINGS, SCORE_INITS
from ER_SLT.initializers import INITS
from ER_SLT.levels import densities
from ER_SLT.options import CIFAROptions, SLTOptions
from startsparse import models
from startsparse.commandline import parse, write_yaml
from startsparse.data import SHAPES
from startsparse.errors import OptionError, UserError
from startsparse.masks import sparse_layers


def parsed(*argv):
    return parse(SLTOptions, script.CONFIGS, argv)


def cifar(*argv):
    """The options of cifar_main.py."""
    return parse(CIFAROptions, script.CONFIGS, argv)


def planned(*argv, parsed=parsed):
    """Options, network and requested densities, as they are before data is touched."""
    options = parsed(*argv)
    with torch.device("meta"), script.own_names(SLTOptions):
        return options, *script.plan(options, SHAPES[options.set])


# --- names and defaults ---------------------------------------------------------------------------


def test_the_published_command_means_what_it_says():
    options, model, requested = planned(*PUBLISHED, parsed=cifar)
    assert (options.arch, options.set, options.init) == ("resnet18", "cifar10", "kn-zero-bias")
    assert (options.er_sparse_init, options.sparsity, options.anneal) == (0.5, 0.2, False)
    assert (options.levels, options.epochs, options.lr, options.seed) == (5, 100, 0.1, 2)
    assert options.save_model
    assert options.name == "runs-strong-tick-anneal-lr-0.1-2"
    assert set(requested.values()) == {0.5}
    assert requested.keys() == sparse_layers(model).keys()
    assert densities(options) == [0.2] * 5


def test_defaults_are_those_of_the_published_recipe():
    options = cifar()
    assert options == dataclasses.replace(cifar("--seed", "2", "--augment"), seed=1, augment=False)
    assert (options.set, options.arch, options.config) == ("cifar10", "resnet18", "")
    assert (options.batch_size, options.momentum, options.weight_decay) == (128, 0.9, 5e-4)
    assert (options.lr, options.lr_policy, options.optimizer) == (0.1, "every30", "sgd")
    assert (options.levels, options.epochs, options.sparsity_start) == (5, 100, 0.6)
    assert (options.er_sparse_method, options.ranking, options.score_init) == (
        "uniform", "layer", "kaiming"
    )  # fmt: skip
    assert options.anneal
    assert not options.nesterov
    assert (options.augment, options.padding) == (False, "zeros")
    assert (options.bfac, options.scale_fan, options.shuffle) == (0.05, False, False)
    assert options.weight_scale == 1


def test_images_are_cropped_where_that_is_asked_for():
    found = []
    for more in ([], ["--augment"], ["--augment", "--padding", "reflect"]):
        options = parsed("--dataset", "digits", *more)
        train = script.recipe.load_data(options, torch.device("cpu")).train
        found.append((train.pad, bool(train._images[:, 0].any())))
    assert found == [(0, True), (4, False), (4, True)]


def test_without_arguments_it_is_digits_and_one_argument_changes_one_thing():
    options = parse(SLTOptions, script.CONFIGS, [])
    assert options.config.endswith("configs/digits.yaml")
    assert (options.set, options.er_sparse_init, options.sparsity) == ("digits", 0.5, 0.2)
    assert (options.arch, options.anneal, options.levels) == ("resnet20", True, 3)
    assert parsed("--seed", "2") == dataclasses.replace(options, seed=2)
    assert parsed("--sparsity", "0.1") == dataclasses.replace(options, sparsity=0.1)


@pytest.mark.parametrize("spell", [str.lower, str.upper, str.capitalize])
@pytest.mark.parametrize("arch", models.MODELS)
def test_every_network_in_any_capitalisation(arch, spell):
    other = {"gcn": "karate", "algorithmic": "modular-addition"}  # than images
    options, model, requested = planned(
        "--model", spell(arch), "--dataset", other.get(arch, "mnist")
    )
    assert options.arch == arch
    assert len(requested) == len(sparse_layers(model)) > 1


@pytest.mark.parametrize(
    "name", ["CIFAR10", "CIFAR100", "tiny-imagenet", "Tiny_ImageNet", "imagenet", "MNIST", "DIGITS"]
)
def test_every_data_set_in_any_capitalisation(name):
    options, model, _ = planned("--dataset", name)
    assert options.set == name.lower().replace("_", "-")
    assert list(sparse_layers(model).values())[-1].out_features == SHAPES[options.set].classes


def test_other_spellings():
    spelled = parsed(
        *("--batch_size", "7", "--weight-decay", "0.1", "--initBias", "Signed-Const-With-Bias"),
        *("--name", "x", "--sparsity_start", "0.4", "--er-sparse-init", "0.3", "--anneal", "1"),
        *("--lr-policy", "Cosine_LR", "--er-sparse-method", "ER_same_params", "--scale_fan"),
    )
    assert (spelled.batch_size, spelled.weight_decay, spelled.name) == (7, 0.1, "x")
    assert (spelled.sparsity_start, spelled.er_sparse_init, spelled.scale_fan) == (0.4, 0.3, True)
    assert (spelled.lr_policy, spelled.er_sparse_method) == ("cosine", "balanced")
    assert spelled.init == "signed-const-with-bias"


def test_both_rankings_have_a_flag(tmp_path):
    assert parsed("--per-layer").ranking == parsed("--seed", "1").ranking == "layer"
    assert parsed("--global").ranking == "global"
    assert {parsed("--per-layer").ranking, parsed("--global").ranking} == set(RANKINGS)
    (tmp_path / "a.yaml").write_text("global: true\n")
    assert parsed("--config", f"{tmp_path}/a.yaml").ranking == "global"
    assert parsed("--config", f"{tmp_path}/a.yaml", "--no-global", "--per-layer").per_layer


@pytest.mark.parametrize("argv", [[], ["--global"], PUBLISHED, MLP])
def test_options_yaml_reads_back(tmp_path, argv):
    options = parsed(*(argv or ["--seed", "1"]))
    (tmp_path / "options.yaml").write_text(write_yaml(options))
    again = parsed("--config", str(tmp_path / "options.yaml"))
    again.config = options.config
    assert again == options
    written = yaml.safe_load((tmp_path / "options.yaml").read_text())
    assert {"model", "dataset", "initBias", "er_init_density", "save_file", "wd"} <= written.keys()


def test_choices_are_those_of_the_code():
    for how in INITS:
        assert parsed("--initBias", how).init == how
    for how in SCORE_INITS:
        assert parsed("--score-init", how).score_init == how


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    shown = capsys.readouterr().out
    for option in (
        "--model",
        "--dataset",
        "--sparsity-start",
        "--initBias",
        "--global",
        "--anneal",
    ):
        assert option in shown


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], [0.4816, 0.3866, 0.3104, 0.2491, 0.2]),  # 0.6 (1/3)^(j/5)
        (["--levels", "2", "--er-init-density", "1"], [0.34641, 0.2]),
        (["--sparsity-start", "1", "--sparsity", "0.01", "--levels", "2"], [0.1, 0.01]),
        (["--sparsity-start", "1"], [0.5, 0.5, 0.3807, 0.2759, 0.2]),  # no more than the ER mask
        (["--er-init-density", "0.2"], [0.2] * 5),
        (["--sparsity", "0.3", "--sparsity-start", "0.3"], [0.3] * 5),
        (["--levels", "1"], [0.2]),
        (["--anneal", "False", "--levels", "3"], [0.2] * 3),
    ],
)
def test_annealing_schedule(argv, expected):
    options = cifar(*argv)
    found = densities(options)
    assert found == pytest.approx(expected, abs=5e-5)
    assert found[-1] == options.sparsity
    assert all(a >= b for a, b in itertools.pairwise(found))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sparsity", "0.6"], "--sparsity: 0.6 should be at most the --er-init-density of 0.5"),
        (["--sparsity", "0"], "--sparsity: 0.0 should be above 0 and at most 1"),
        (["--sparsity-start", "0.1"], "--sparsity-start: 0.1 should be at least the --sparsity of"),
        (["--sparsity_start", "1.2"], "--sparsity-start: 1.2 should be above 0 and at most 1"),
        (["--levels", "0"], "--levels: 0 should be at least 1"),
        (["--epochs", "0"], "--epochs: 0 should be at least 1"),
        (["--bfac", "0", "--initBias", "kn-nonzero-bias"], "--bfac: 0.0 should be above 0"),
        (["--bfac", "0.1"], "--bfac: has no effect with --initBias kn-zero-bias"),
        (["--dataset", "cora", "--weight-scale", "0"], "--weight-scale: 0.0 should be above 0"),
        (["--er-init-density", "1.5"], "--er-init-density: 1.5 should be above 0 and at most 1"),
        (["--wd", "-1"], "--wd: -1.0 should be at least 0"),
        (["--per-layer", "--global"], "--global: not with --per-layer; --no-per-layer takes that"),
        (["--initBias", "zero"], "--initBias: 'zero' is none of kn-zero-bias"),
        (["--score-init", "ones"], "--score-init: 'ones' is none of constant, kaiming"),
        (["--anneal", "maybe"], "--anneal: 'maybe' should be True or False"),
        (["--dataset", "svhn"], "--dataset: 'svhn' is none of digits"),
        (["--evaluate"], "--evaluate: needs a value"),
        (["--evaluate", "x", "--resume", "auto"], "--evaluate: names a ticket or run folder"),
        (["--er-sparse-method", "network"], "--er-sparse-method: network needs an --er-sparsity"),
        (["--sparsty", "0.1"], "--sparsty: unknown option; did you mean --sparsity?"),
    ],
)
def test_bad_options_are_one_line(argv, message):
    with pytest.raises(OptionError) as caught:
        parsed(*argv)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_bad_plans_are_found_before_data(monkeypatch, tmp_path):
    monkeypatch.setattr(script.recipe, "load_data", lambda *_: pytest.fail("data was touched"))
    argv = ["--log-dir", str(tmp_path / "runs"), "--er-sparse-method", "balanced"]
    with pytest.raises(
        OptionError, match=r"--sparsity: 0.3 should be at most 0.26\d*, the density"
    ):
        script.main([*argv, "--dataset", "cifar10", "--sparsity", "0.3", "--er-budget", "clip"])
    with pytest.raises(OptionError, match="--model: no network is called 'mlp' for ImageNet"):
        script.main([*argv, "--dataset", "imagenet", "--model", "mlp"])
    assert not (tmp_path / "runs").exists()


def test_a_bad_option_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, ROOT / "ER_SLT/main.py", "--sparsity", "0.9"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --sparsity: 0.9 should be at most the --er-init-density")
    assert done.stderr.count("\n") == 1


def test_a_ticket_that_cannot_be_evaluated(tmp_path):
    with pytest.raises(UserError, match="--evaluate: .*x: no ticket can be read there"):
        script.main(["--evaluate", str(tmp_path / "x")])
    (tmp_path / "x").write_text("no ticket")
    with pytest.raises(UserError, match="--evaluate: .*x: not a ticket of this project, or a"):
        script.main(["--evaluate", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--evaluate: .*ticket.safetensors: no ticket can be"):
        script.main(["--evaluate", str(tmp_path)])
