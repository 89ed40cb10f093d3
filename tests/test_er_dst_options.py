"""Options of ER_DST/main.py: each has an effect, and a bad one is one line before training."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import yaml
from dst_runs import CPU, PUBLISHED, options, some_data, train
from script_runs import ROOT, same

from ER_DST import main as script
from ER_DST.options import DSTOptions
from startsparse import finding, models, recipe
from startsparse.commandline import parse, write_yaml
from startsparse.errors import OptionError
from startsparse.masks import masked_weights, sparse_layers
from startsparse.ratios import layer_densities

pytestmark = pytest.mark.usefixtures("no_pictures")

CONFIGS = sorted((ROOT / "ER_DST/configs").rglob("*.yaml"))


class Stopped(Exception):
    """Data was about to be loaded."""


def parsed(*argv):
    return parse(DSTOptions, script.CONFIGS, argv)


# One option a line: values with it, against the same without. Weights must differ.
DST = {"method": "DST"}
THIN = {"er_sparse_init": 0.2}
IMP = {"er_sparse_method": "ER_imp", "imp_epochs": 1}
EFFECTS = {
    "seed": ({"seed": 2}, {}),
    "lr": ({"lr": 0.03}, {}),
    "l2": ({"weight_decay": 0.1}, {}),
    "momentum": ({"momentum": 0.5}, {}),
    "nesterov": ({"nesterov": False}, {}),
    "optimizer": ({"optimizer": "adam"}, {}),
    "epochs": ({"epochs": 3}, {}),
    "method GraNet_uniform": ({"method": "GraNet_uniform"}, {}),
    "method DST": (DST, {}),
    "method GMP": ({"method": "GMP"}, {}),
    "method GMP_uniform": ({"method": "GMP_uniform"}, {"method": "GMP"}),
    "growth random": ({"growth": "random"}, {}),
    "growth momentum": ({"growth": "momentum"}, {}),
    "momentum of growth": (
        {"growth": "momentum", "optimizer": "adam", "momentum": 0.1},
        {"growth": "momentum", "optimizer": "adam"},
    ),
    "prune-rate": ({"prune_rate": 0.1}, {}),
    "stop-updates": ({"stop_updates": 0.5}, {}),
    "update-frequency": ({"update_frequency": 3}, {}),
    "init-density": ({"er_sparse_init": 0.6}, {}),
    "final-density": ({"final_density": 0.1}, {}),
    "init-prune-epoch": ({"init_prune_epoch": 1}, {}),
    "final-prune-epoch": ({"final_prune_epoch": 2}, {}),
    "is-prune": ({"is_prune": False}, {}),
    "grow-within-init": ({"grow_within_init": True}, {}),
    "flow-preservation": (THIN | {"flow_preservation": "True"}, THIN),
    "flow-preservation always": (
        {"flow_preservation": "always"},
        {"flow_preservation": "True"},
    ),
    "ortho-repair": ({"ortho_repair": True}, {}),
    "sparse-init": ({"er_sparse_method": "balanced"}, {}),
    "imp-epochs": (IMP | {"imp_epochs": 3}, IMP),
    "sparse": ({"sparse": False}, {}),
    **{
        f"init-method {init}": ({"init": init}, {})
        for init in ("kaiming", "normal", "uniform", "bimodal", "looks-linear")
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a training leaves, of each set of options once."""
    made = {}

    def state(values):
        if str(values) not in made:
            asked = options(**{"final_density": 0.15} | values)
            made[str(values)] = train(tmp_path_factory.mktemp("run"), asked).model.state_dict()
        return made[str(values)]

    return state


@pytest.mark.parametrize("option", EFFECTS)
def test_an_accepted_option_has_an_effect(trained, option):
    one, other = map(trained, EFFECTS[option])
    assert one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one)


# Where nothing is asked of them, they do nothing: the same weights.
@pytest.mark.parametrize(
    ("values", "alike"),
    [
        ({"method": "GMP", "growth": "random"}, {"method": "GMP", "growth": "gradient"}),
        ({"method": "GMP", "prune_rate": 0.1}, {"method": "GMP"}),
        (DST | {"final_density": 0.4}, DST),
        (DST | {"final_prune_epoch": 1}, DST),
        ({"sparse": False, "method": "DST", "flow_preservation": "always"}, {"sparse": False}),
    ],
)
def test_what_a_method_does_not_use_changes_nothing(trained, values, alike):
    one, other = trained(values), trained(alike)
    assert all(torch.equal(one[name], other[name]) for name in one)


BAD = {
    "--final-density: 0.6 should be at most the --init-density of 0.5; --method GraNet prunes": [
        *("--sparse", "--final-density", "0.6")
    ],
    "--final-density: 0.05 should be at most the --init-density of 0.01; --method GMP_uniform": [
        *("--sparse", "--method", "gmp-uniform", "--init-density", "0.01")
    ],
    "--final-prune-epoch: 161 should be at most the --epochs, 160": [
        *("--sparse", "--final-prune-epoch", "161", "--epochs", "160")
    ],
    "--final-prune-epoch: 110 should be at most the --epochs, 2": [
        *("--sparse", "--final-prune-epoch", "110", "--epochs", "2")
    ],
    "--final-prune-epoch: '1.5' is not a whole number": ["--final-prune-epoch", "1.5"],
    "--init-prune-epoch: 110 should be below the epoch in which pruning ends, 110 ": [
        *("--sparse", "--init-prune-epoch", "110", "--epochs", "160")
    ],
    "--init-prune-epoch: 2 should be below the epoch in which pruning ends, 1.375 ": [
        *("--sparse", "--init-prune-epoch", "2", "--epochs", "2")
    ],
    "--init-prune-epoch: 5 should be below the epoch in which pruning ends, 5 ": [
        *("--sparse", "--init-prune-epoch", "5", "--final-prune-epoch", "5", "--epochs", "9")
    ],
    "--init-prune-epoch: -1 should be at least 0": ["--sparse", "--init-prune-epoch", "-1"],
    "--init-density: 0.0 should be above 0 and at most 1": ["--sparse", "--init-density", "0"],
    "--init-density: 1.5 should be above 0 and at most 1": ["--sparse", "--init-density", "1.5"],
    "--init-density: 'half' is not a number": ["--init-density", "half"],
    "--final-density: 0.0 should be above 0 and at most 1": ["--sparse", "--final-density", "0"],
    "--prune-rate: 1.5 should be at least 0 and at most 1": ["--sparse", "--prune-rate", "1.5"],
    "--stop-updates: 0.0 should be above 0 and at most 1": ["--sparse", "--stop-updates", "0"],
    "--stop-updates: 1.5 should be above 0 and at most 1": ["--sparse", "--stop-updates", "1.5"],
    "--update-frequency: 0 should be at least 1": ["--sparse", "--update-frequency", "0"],
    "--imp-epochs: 0 should be at least 1": [
        *("--sparse", "--sparse-init", "ER_imp", "--imp-epochs", "0")
    ],
    "--l2: -1.0 should be at least 0": ["--l2", "-1"],
    "--l2: 'abc' is not a number": ["--l2", "abc"],
    "--l2: needs a value": ["--l2"],
    "--batch-size: 'x' is not a whole number": ["-b", "x"],
    "--data: 'cifar' is none of digits, mnist": ["--data", "cifar"],
    "--model: 'vgg' is none of resnet20": ["--model", "vgg"],
    "--method: 'RigL' is none of GraNet, GraNet_uniform, DST": ["--method", "RigL"],
    "--sparse-init: 'erdos' is none of uniform, ERK": ["--sparse-init", "erdos"],
    "--growth: 'both' is none of random, gradient, momentum": ["--growth", "both"],
    "--prune: 'random' is none of magnitude": ["--prune", "random"],
    "--init-method: 'he' is none of default, kaiming": ["--init-method", "he"],
    "--optimizer: 'lion' is none of sgd, adam, adamw": ["--optimizer", "lion"],
    "--is-prune: 'maybe' should be True or False": ["--is-prune", "maybe"],
    "--flow-preservation: 'maybe' is none of False, True, always": [
        *("--flow-preservation", "maybe")
    ],
    "--flow-preservation: needs a value": ["--flow-preservation"],
    "--ratios-from: has no effect without --sparse-init network or ER_imp": [
        *("--sparse", "--ratios-from", "x.json")
    ],
    "--ratios-from: has no effect without --sparse-init network or": [
        *("--sparse", "--sparse-init", "snip", "--ratios-from", "x.json")
    ],
    "--ratios-from: /none.json does not exist": [
        *("--sparse", "--sparse-init", "ER_imp", "--ratios-from", "/none.json")
    ],
    "--sparse-init: network needs an --ratios-from": ["--sparse", "--sparse-init", "network"],
    "--final-density: 0.05 is below the share of the layers kept dense": [
        *("--sparse", "--model", "mlp", "--first-layer-dense")
    ],
    "--init-density: 0.5 is below the share of the layers kept dense": [
        *("--sparse", "--model", "mlp", "--first-layer-dense", "--is-prune", "False")
    ],
    "--model: no network is called 'vgg16' for ImageNet": [
        *("--data", "imagenet", "--model", "vgg16")
    ],
    "--width: the ImageNet ResNets": ["--data", "imagenet", "--model", "resnet18", "--width", "8"],
    "--init-densty: unknown option; did you mean --init-density": ["--init-densty", "0.5"],
    "--valid-split: 1.0 should be": ["--valid-split", "1"],
    "--resume: nowhere does not exist": ["--resume", "nowhere"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_one_line_before_data_or_devices(message, monkeypatch):
    for module, name in ((recipe, "load_data"), (script.parallel, "choose_devices")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("touched"))
    with pytest.raises(OptionError) as error:
        # a set without a YAML file: the script's own defaults
        script.main([*([] if "--data" in BAD[message] else ["--data", "mnist"]), *BAD[message]])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "--er-" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_schedule_that_ends_where_it_begins_is_no_error():
    for argv in (
        ["--sparse", "--init-density", "0.05", "--final-density", "0.05"],
        ["--sparse", "--final-prune-epoch", "3", "--epochs", "3"],
    ):
        assert parsed(*argv) is not None


def test_an_initialisation_that_does_not_suit_a_layer_leaves_no_run(run_dst, tmp_path):
    message = "^--init-method: looks-linear: layer 'hidden.0': 15 out"
    with pytest.raises(OptionError, match=message):
        run_dst("--model", "mlp", "--width", "15", "--init-method", "looks-linear")
    assert not (tmp_path / "a").exists()


def test_the_process_ends_with_code_2_and_one_line():
    done = subprocess.run(
        [sys.executable, "main.py", "--init-density", "0.5", "--final_density", "0.9"],
        cwd=ROOT / "ER_DST",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --final-density: 0.9 should be at most the --init-density of 0.5; "
        "--method GraNet prunes\n"
    )


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("init_densty: 0.3", "unknown option 'init_densty'; did you mean init-density"),
        ("init_density: abc", "--init-density: 'abc' is not a number"),
        ("init_density: [1, 2]", "init-density: should be one value"),
        ("is_prune: 3", "is_prune: '3' should be true or false"),
        ("flow_preservation: 3", "--flow-preservation: '3' is none of False, True, always"),
        ("sparse: 3", "sparse: '3' should be true or false"),
        ("data: cifar", "--data: 'cifar' is none of"),
        ("model: resnet19", "--model: 'resnet19' is none of"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(OptionError) as error:
        script.main(["--config", str(path)])
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("true", "True"),
        ("no", "False"),
        ("'False'", "False"),
        ("Always", "always"),
        ("on", "True"),
        ("off", "False"),
    ],
)
def test_flow_preservation_in_yaml(tmp_path, value, meant):
    path = tmp_path / "mine.yaml"
    path.write_text(f"sparse: true\nflow_preservation: {value}\n")
    assert parsed("--config", str(path)).flow_preservation == meant


def test_yaml_has_the_names_of_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "init_density: 0.3\ndata: mnist\nmodel: MLP\nl2: 1.0e-3\nsparse: true\northo-repair: on\n"
        f"sparse_init: ER_same_params\nfinal_prune_epoch: 3\ndata-dir: {tmp_path}\nlog_dir: here\n"
    )
    found = parsed("--config", str(path))
    given = {
        "er_sparse_init": 0.3,
        "set": "mnist",
        "arch": "mlp",
        "weight_decay": 1e-3,
        "sparse": True,
        "ortho_repair": True,
        "er_sparse_method": "balanced",
        "final_prune_epoch": 3,
        "data": str(tmp_path),
        "log_dir": "here",
    }
    assert {name: getattr(found, name) for name in given} == given
    rest = dataclasses.asdict(found).keys() - given.keys() - {"config"}
    assert all(getattr(found, name) == getattr(DSTOptions(), name) for name in rest)
    again = parsed("--config", str(path), "--init-density", "0.4", "--is-prune", "False")
    assert (again.er_sparse_init, again.is_prune, again.set) == (0.4, False, "mnist")
    assert again.final_prune_epoch is None  # of no effect any more


@pytest.mark.parametrize(
    "argv",
    [
        PUBLISHED.split(),
        [
            "--sparse",
            "--final-prune-epoch",
            "3",
            "--flow-preservation",
            "True",
            "--is-prune",
            "yes",
        ],
        *(["--config", str(path)] for path in CONFIGS),
    ],
    ids=["published", "some", *(path.name for path in CONFIGS)],
)
def test_options_go_around(argv, tmp_path):
    shown = parsed(*argv)
    copy = tmp_path / "copy.yaml"
    copy.write_text(write_yaml(shown))
    again = parsed("--config", str(copy))
    again.config = shown.config
    assert again == shown
    content = yaml.safe_load(copy.read_text())
    assert content["data"] == shown.set
    assert content["init_density"] == shown.er_sparse_init
    assert content["l2"] == shown.weight_decay
    assert "er_sparse_init" not in content


def test_options_yaml_repeats_the_run(run_dst):
    first = run_dst(
        *("--sparse", "--model", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "128"),
        *(
            "--update-frequency",
            "3",
            "--init-density",
            "0.999",
            "--growth",
            "random",
            "--l2",
            "0.01",
        ),
        *("--ortho-repair", "True", "--sparse-init", "pyramid", "--first-layer-dense"),
        *("--final-density", "0.99"),
    )
    again = run_dst("--config", str(first / "options.yaml"), where="b")
    assert same(first, again)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--save", "there"], "log_dir", "there"),
        (["--log-dir", "there"], "log_dir", "there"),
        (["-b", "7"], "batch_size", 7),
        (["--batch_size", "7"], "batch_size", 7),
        (["--wd", "0.1"], "weight_decay", 0.1),
        (["--weight-decay", "0.1"], "weight_decay", 0.1),
        (["--init_density=0.1", "--final_density=0.1"], "er_sparse_init", 0.1),
        (["--ratios-from", "/x", "--sparse-init", "network"], "er_sparsity_file", "/x"),
        (["--no-nesterov"], "nesterov", False),
        (["--flow-preservation", "true"], "flow_preservation", "True"),
        (["--flow-preservation", "no"], "flow_preservation", "False"),
        (["--flow-preservation", "ALWAYS"], "flow_preservation", "always"),
        (["--ortho-repair", "1"], "ortho_repair", True),
    ],
)
def test_other_spellings(argv, field, value):
    assert getattr(parsed(*argv), field) == value


# --- warnings -------------------------------------------------------------------------------------


FIRST = ["config", "run", "network", "device", "options"]


def said_before_data(monkeypatch, capsys, *argv):
    def stop(*_):
        raise Stopped

    monkeypatch.setattr(recipe, "load_data", stop)
    with pytest.raises(Stopped):
        script.main(["--data", "cifar10", "--sparse", *argv])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:5]] == [
        "config",
        "run",
        "network",
        "device",
        "options",
    ]
    return said[5:]


def test_layers_too_thin_for_flow_preservation_are_named_before_training(monkeypatch, capsys):
    flags = ["--model", "vgg16", "--sparse-init", "pyramid", "--init-density", "0.002"]
    flags += ["--final-density", "0.0001", "--flow-preservation"]
    said = said_before_data(monkeypatch, capsys, *flags, "always")
    assert [line.startswith("warning: --flow-preservation: ") for line in said] == [True, True]
    assert said_before_data(monkeypatch, capsys, *flags, "True") == said[:1]
    with torch.device("meta"):
        layers = sparse_layers(models.build("vgg16", classes=10))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    densities = layer_densities("pyramidal", list(shapes.values()), 0.002)
    short, total = [], 0
    for (name, shape), density in zip(shapes.items(), densities):
        size, units = layers[name].weight.numel(), max(shape[0], shape[1])
        total += units
        if density * size < units:
            short.append(f"{name} {density * size:.0f} of {units}")
    assert 0 < len(short) < len(shapes)
    assert said[0].split("more: ")[1] == ", ".join(short)
    assert f"it needs {total} weights, density 0.0001 has 1472: it will not be reached" in said[1]


@pytest.mark.parametrize("method", ["GraNet_uniform", "GMP_uniform"])
def test_layers_that_uniform_pruning_makes_too_thin_are_named(monkeypatch, capsys, method):
    flags = ["--model", "resnet20", "--final-density", "0.02", "--flow-preservation"]
    assert said_before_data(monkeypatch, capsys, *flags, "True", "--method", method) == []
    flags.append("always")
    said = said_before_data(monkeypatch, capsys, *flags, "--method", method)
    # 0.02 of 3 x 9 x 16, 16 x 32, 32 x 64 and 64 x 10 weights
    assert said == [
        "warning: --flow-preservation: layers with fewer weights than units at the end, which get "
        "more: conv1 9 of 16, stages.1.0.shortcut.0 10 of 32, stages.2.0.shortcut.0 41 of 64, "
        "fc 13 of 64"
    ]
    # What is dense stays so, and the others have less.
    said = said_before_data(monkeypatch, capsys, *flags, "--method", method, "--last-layer-dense")
    (said,) = said
    assert said.endswith(
        " conv1 7 of 16, stages.1.0.shortcut.0 9 of 32, stages.2.0.shortcut.0 36 of 64"
    )


def test_a_density_that_the_repair_exceeds_for_good_is_named(monkeypatch, capsys):
    """Where nothing is pruned, what the first repair adds is there at the end too."""
    flags = ["--model", "vgg16", "--method", "DST", "--init-density", "0.0001"]
    said = said_before_data(monkeypatch, capsys, *flags, "--flow-preservation", "True")
    assert [line.split(": ")[2].split(" ")[0] for line in said] == ["layers", "it"]
    assert "density 0.0001 has 1472: it will not be reached" in said[1]


@pytest.mark.parametrize("sparse_init", ["snip", "ER_snip"])
def test_layers_that_a_search_makes_too_thin_are_named(tmp_path, monkeypatch, capsys, sparse_init):
    def stop(*_):
        raise Stopped

    monkeypatch.setattr(recipe, "load_data", lambda *_: some_data())
    monkeypatch.setattr(finding, "open_run", stop)
    flags = ["--model", "mlp", "--width", "8", "--init-density", "0.1", "--final-density", "0.1"]
    flags += [
        "--data",
        "cifar10",
        "--sparse",
        "--sparse-init",
        sparse_init,
        "--flow-preservation",
        "True",
    ]
    with pytest.raises(Stopped):
        script.main(["--data", "cifar10", *flags])
    said = [line for line in capsys.readouterr().out.splitlines() if "fewer weights" in line]
    asked = options(er_sparse_method=sparse_init, er_sparse_init=0.1, final_density=0.1)
    model, requested, _ = script.network(asked, some_data(), CPU)
    units = {"hidden.0": 16, "hidden.3": 8, "hidden.6": 8, "classifier": 8}
    left = {name: requested[name] * w.numel() for name, w, _ in masked_weights(model)}
    thin = [f"{n} {w:.0f} of {units[n]}" for n, w in left.items() if w < units[n]]
    assert len(thin) > 1
    assert [line.split("start, which get more: ")[1] for line in said] == [", ".join(thin)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--flow-preservation", "False", "--final-density", "0.0001"],
        ["--flow-preservation", "always", "--final-density", "0.01"],
        ["--flow-preservation", "True", "--final-density", "0.0001"],
        ["--flow-preservation", "always", "--sparse-init", "snip", "--final-density", "0.01"],
    ],
)
def test_nothing_is_said_where_flow_can_be_kept(monkeypatch, capsys, flags):
    assert said_before_data(monkeypatch, capsys, "--model", "vgg16", *flags) == []


@pytest.mark.parametrize(
    ("values", "often"),
    [({}, "once"), ({"method": "DST"}, "never"), ({"update_frequency": 7}, None)],
)
def test_updates_rarer_than_the_training_is_long_are_said(tmp_path, capsys, values, often):
    train(tmp_path, options(**{"update_frequency": 8, "final_density": 0.2} | values))
    said = [line for line in capsys.readouterr().out.splitlines() if "update-frequency" in line]
    expected = "warning: --update-frequency: 8 steps, but the whole training has 8; the mask moves "
    assert said == ([expected + often] if often else [])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "DST", "update_frequency": 4}, True),
        ({"method": "DST", "update_frequency": 3}, False),
        ({"method": "GraNet", "update_frequency": 4}, True),
        ({"method": "GraNet", "update_frequency": 4, "final_prune_epoch": 1}, True),
        ({"method": "GraNet", "update_frequency": 4, "epochs": 4, "final_prune_epoch": 1}, False),
        ({"method": "GMP", "update_frequency": 4}, False),
    ],
)
def test_a_stop_before_the_first_update_is_said(tmp_path, capsys, values, said):
    train(tmp_path, options(**{"stop_updates": 0.5, "final_density": 0.2} | values))
    lines = [line for line in capsys.readouterr().out.splitlines() if "stop-updates" in line]
    assert lines == said * [
        "warning: --stop-updates: drop and grow ends after 4 steps, before the first update, "
        "after 4: nothing is grown"
    ]
