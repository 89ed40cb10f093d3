"""Options of STR/main.py: each has an effect, and a bad one is one line and exit code 2."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from script_runs import MLP, ROOT, SOFT, TINY, newest, weights

from startsparse import masks
from startsparse.commandline import parse, write_yaml
from startsparse.data import SHAPES
from startsparse.errors import OptionError
from startsparse.pruning import PRUNERS
from STR import main as script

IMAGES = [name for name, shape in SHAPES.items() if shape.kind == "images"]


def test_no_validation_split(run):
    folder = run(*MLP, "--valid-split", "0", "--select", "last")
    assert pd.read_csv(folder / "epochs.csv")["valid_accuracy"].isna().all()
    assert 0 < json.loads((folder / "summary.json").read_text())["test_accuracy"] <= 1


# One option a line: flags with it, against the same flags without. Weights must differ.
EFFECTS = {
    "lr": (["--lr", "0.03"], []),
    "lr-min": (["--lr-min", "0.09"], []),
    "lr-policy": (["--lr-policy", "multistep"], []),
    "lr-policy constant": (["--lr-policy", "constant_lr"], []),
    "warmup-length": (["--warmup-length", "1"], []),
    "weight-decay": (["--weight-decay", "0.01"], []),
    "no-bn-decay": (["--no-bn-decay"], []),
    "momentum": (["--momentum", "0.5"], []),
    "nesterov": (["--no-nesterov"], []),
    "optimizer": (["--optimizer", "adam"], []),
    "label-smoothing": (["--label-smoothing", "0.1"], []),
    "clip-norm": (["--clip-norm", "0.1"], []),
    "batch-size": (["-b", "100"], []),
    "valid-split": (["--valid-split", "0.3"], []),
    "augment": (["--no-augment"], []),
    "padding": (["--padding", "reflect"], []),
    "init": (["--init", "orthogonal"], []),
    "er-sparse-method": (["--er-sparse-method", "ERK"], []),
    "er-sparse-init": (["--er-sparse-init", "0.5"], []),
    "er-budget": (["--er-budget", "clip"], []),
    "er-sampling": (["--er-sampling", "exact"], []),
    "first-layer-dense": (
        ["--first-layer-dense", "--er-sparse-init", "0.995"], ["--er-sparse-init", "0.995"]
    ),
    "last-layer-dense": (
        ["--last-layer-dense", "--er-sparse-method", "uniform"], ["--er-sparse-method", "uniform"]
    ),
    "amp": (["--amp", "bf16"], []),
    "sparse-function": (
        ["--conv-type", "STRConv", *SOFT, "--sparse-function", "exp"],
        ["--conv-type", "STRConv", *SOFT],
    ),
    "sInit-value": (["--conv-type", "STRConv", "--sInit-value", "-4"],
                    ["--conv-type", "STRConv", *SOFT]),
    "st-decay": (["--conv-type", "STRConv", *SOFT, "--st-decay", "0.1"],
                 ["--conv-type", "STRConv", *SOFT]),
    **{
        f"rewind {how}": (
            ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--rewind", how],
            ["--threshold-list", "0.1", "--final_prune_epoch", "1"],
        )
        for how in ("weights", "bn", "amplitudes", "signs")
    },
    **{
        f"pruner {pruner}": (
            ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--pruner", pruner],
            ["--threshold-list", "0.1", "--final_prune_epoch", "1"],
        )
        for pruner in PRUNERS
        if pruner != "mag"
    },
    "grasp-temperature": (
        ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--pruner", "grasp",
         "--grasp-temperature", "1"],
        ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--pruner", "grasp"],
    ),
    "prune-scheduler": (
        ["--threshold-list", "0.1", "--final_prune_epoch", "1", "--prune-scheduler", "step"],
        ["--threshold-list", "0.1", "--final_prune_epoch", "1"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of the runs by their flags, each made once."""
    made = {}

    def run(flags):
        if tuple(flags) not in made:
            where = tmp_path_factory.mktemp("trained")
            folders = ["--log-dir", f"{where}/runs", "--result-dir", str(where)]
            script.main([*MLP, *flags, *folders])
            made[tuple(flags)] = weights(newest(where))
        return made[tuple(flags)]

    return run


@pytest.mark.parametrize("option", EFFECTS)
def test_an_accepted_option_has_an_effect(trained, no_pictures, option):
    one, other = map(trained, EFFECTS[option])
    # Keys differ where a layer has a mask in one network only.
    assert one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one)


def test_compile_compiles_the_network(run, monkeypatch):
    compiled = []

    def compile(module, **_):
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    run(*MLP)
    assert compiled == []
    run(*MLP, "--compile")
    _, network = compiled  # the first is a trial
    assert type(network).__name__ == "MLP"


def test_names_and_labels_are_kept(run):
    folder = run(
        *MLP,
        "--name",
        "mine",
        "--expt-setup",
        "rml",
        "--config",
        str(ROOT / "STR/configs/digits.yaml"),
    )
    assert folder.parts[-3:] == ("digits", "mine", "seed-1")
    row = pd.read_csv(folder.parents[3] / "results.csv").iloc[0]
    assert (row["name"], row["expt_setup"], row["run"]) == (
        "mine",
        "rml",
        "runs/digits/mine/seed-1",
    )


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (["--resnet-type", "large"], (512, 512, 3, 3)),
        (["--resnet-type", "small-dense", "--width", "8"], (8, 8, 3, 3)),
        (["--resnet-type", "small-dense-inc", "--width", "4"], (32, 32, 3, 3)),
        (["--resnet-type", "res50"], (2048, 1024, 1, 1)),
        (["--arch", "VGG11"], (512, 512, 3, 3)),
        (["--arch", "ResNet20", "--width", "8"], (32, 32, 3, 3)),
    ],
)
def test_networks_by_name(flags, shape):
    options = parse(script.STROptions, script.CONFIGS, flags)
    model, requested = script.network(options, script.data.SHAPES["digits"])
    layers = list(masks.sparse_layers(model).items())
    assert list(requested) == [name for name, _ in layers]
    assert max(tuple(layer.weight.shape) for _, layer in layers if layer.weight.dim() == 4) == shape


BAD = {
    "--lr: 'abc' is not a number": ["--lr", "abc"],
    "--lr: 0.0 should be above 0": ["--lr", "0"],
    "--lrr: unknown option; did you mean --lr": ["--lrr", "3"],
    "--st-decay: 'abc' is not a number": ["--st-decay", "abc"],
    "--st-decay: -1.0 should be at least 0": ["--st-decay", "-1", "--conv-type", "STRConv"],
    "--epochs: '1.5' is not a whole number": ["--epochs", "1.5"],
    "--conv-type: 'Conv' is none of DenseConv, ConvMask": ["--conv-type", "Conv"],
    "--er-sparse-init: 1.5 should be above 0 and at most 1": ["--er-sparse-init", "1.5"],
    "--threshold-list: 0.3 should be above 0 and at most 0.2": ["--threshold-list", "0.3"],
    "--threshold-list: prunes masks": ["--threshold-list", "0.1", "--conv-type", "STRConv"],
    "--grasp-temperature: 0.0 should be above 0": [
        *("--grasp-temperature", "0", "--pruner", "grasp", "--threshold-list", "0.1")
    ],
    "--er-sparse-method: network needs an --er-sparsity-file": ["--er-sparse-method", "network"],
    "--er-sparsity-file: has no effect without --er-sparse-method network": [
        "--er-sparsity-file",
        "x.json",
    ],
    "--reset-weights: means weights, --rewind says bn": [
        *("--reset-weights", "--rewind", "bn", "--threshold-list", "0.1")
    ],
    "--width: small-dense needs it": ["--resnet-type", "small-dense"],
    "--width: the ImageNet ResNets": ["--set", "imagenet", "--width", "8"],
    "--resnet-type: .*choose from large, res50": [
        *("--set", "imagenet", "--resnet-type", "small-dense", "--width", "8")
    ],
    "--arch: .*ImageNet": ["--set", "imagenet", "--arch", "vgg16"],
    "--er-sparse-init: density 0.0005 is below": [
        "--first-layer-dense",
        *TINY,
        "--er-sparse-init",
        "0.0005",
    ],
    "--er-sparsity-file: .*none.json does not exist": [
        "--er-sparse-method",
        "network",
        "--er-sparsity-file",
        "none.json",
    ],
    "--evaluate: name the run": ["--evaluate"],
    "--nesterov: needs": ["--nesterov", "--momentum", "0"],
    "--multigpu: 'a' is no list": ["--multigpu", "a"],
    "--compile: works on one device": ["--compile", "--multigpu", "0,1"],
    "--valid-split: 0.0 leaves nothing|--valid-split: 0": ["--valid-split", "0"],
    "--resume: nowhere does not exist": ["--resume", "nowhere"],
    "--config: cannot read nowhere.yaml": ["--config", "nowhere.yaml"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_one_line_before_data_or_devices(message, monkeypatch):
    for module, name in ((script.data, "load"), (script.parallel, "choose_devices")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("touched"))
    with pytest.raises(OptionError, match=f"^({message})") as error:
        script.main(BAD[message])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 3", "unknown option 'learning_rate'"),
        ("epoch: 3", "unknown option 'epoch'; did you mean epochs"),
        ("lr: abc", "--lr: 'abc' is not a number"),
        ("nesterov: 3", "nesterov: '3' should be true or false"),
        ("lr: [1, 2]", "lr: should be one value"),
        ("lr: {a: 2}", "lr: should be one value"),
        ("- 1", "should hold one 'option: value' per line"),
        ("a: : b", "is not YAML"),
        ("arch: resnet19", "--arch: 'resnet19' is none of"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(OptionError) as error:
        script.main(["--config", str(path)])
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_the_process_ends_with_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "main.py", "--batch_size", "many"],
        cwd=ROOT / "STR",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --batch-size: 'many' is not a whole number\n"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "STR/configs").rglob("*.yaml")), ids=lambda p: p.name
)
def test_every_config_is_complete_and_goes_around(path, tmp_path):
    data = ["--data", str(tmp_path)] if path.name == "folder.yaml" else []
    options = parse(script.STROptions, script.CONFIGS, ["--config", str(path), *data])
    assert options.set in path.name or path.parent.name == "largescale"
    copy = tmp_path / "copy.yaml"
    copy.write_text(write_yaml(options))
    again = parse(script.STROptions, script.CONFIGS, ["--config", str(copy)])
    again.config = options.config
    assert again == options
    assert yaml.safe_load(copy.read_text())["set"] == options.set


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_configs_of_images_warm_up(name):
    """Without, the dense network learns less at first, and sparse ones seem to be better."""
    data = ["--data", str(ROOT)] if name == "folder" else []
    options = parse(script.STROptions, script.CONFIGS, ["--set", name, *data])
    assert options.warmup_length == (5 if options.epochs >= 100 else 1)


@pytest.mark.parametrize(("name", "decay"), [("cifar", 1e-4), ("cifar100", 1e-3)])
def test_weight_decay_of_the_published_recipes(name, decay):
    path = script.CONFIGS / f"largescale/resnet18-{name}-str-1.yaml"
    assert parse(script.STROptions, script.CONFIGS, ["--config", str(path)]).weight_decay == decay
