"""What the option says is what runs: an option without effect is an error, found by the table."""

import dataclasses
import json

import pytest
import yaml
from script_runs import ROOT, original_commands
from slt_runs import PUBLISHED

from ER_DST.main import CONFIGS as DST_CONFIGS
from ER_DST.options import DSTOptions
from ER_SLT.main import CONFIGS as SLT_CONFIGS
from ER_SLT.options import CIFAROptions, SLTOptions
from startsparse import effects, runs
from startsparse.commandline import parse, write_yaml
from startsparse.errors import OptionError
from startsparse.fields import default, flag, shown, text
from STR.main import CONFIGS as STR_CONFIGS
from STR.options import STROptions

SCRIPTS = {
    "STR": (STROptions, STR_CONFIGS),
    "ER_DST": (DSTOptions, DST_CONFIGS),
    "ER_SLT": (SLTOptions, SLT_CONFIGS),
}

# Of each script: option -> flags with which it counts, flags with which it does not, and what the
# error says then. {DIR} is a folder, {RUN} a finished run.
LEVEL = "--threshold-list 0.1"
NO_LEVEL = "without --threshold-list"
HARD = ("--conv-type STRConv", "--conv-type ConvMask", "with --conv-type ConvMask")
NO_MASK = ("", "--conv-type DenseConv", "with --conv-type DenseConv")


def shared(set_, data, arch, decay):
    """Rows of the options that all scripts have; four of them have other names in each."""
    graph = f"{set_} karate {arch} gcn"
    numbers = f"{set_} modular-addition {arch} algorithmic"
    photos = f"{set_} imagenet {arch} resnet50"
    return {
        "--seed": ("", "--seeds 1 2", "with --seeds"),
        data: (f"{set_} cifar10", "", f"with {set_} digits, which has no files"),
        "--image-size": (f"{set_} folder {data} .", "", f"without {set_} folder"),
        "--channels": (f"{set_} folder {data} .", "", f"without {set_} folder"),
        "--flip": (
            f"{set_} cifar10 --augment",
            f"{set_} digits --augment",
            f"with {set_} digits: a",
        ),
        "--data-memory": ("", photos, f"with {set_} imagenet, which is always read so"),
        "--mirror": (f"{set_} cifar10", "", f"with {set_} digits, which is not downloaded"),
        "--checksum": (f"{set_} mnist", "", f"with {set_} digits, for which no checksums are"),
        "--valid-split": ("", graph, f"with {set_} karate, which has a validation part"),
        "--workers": (photos, "", f"without {set_} imagenet"),
        "--augment": ("", numbers, f"with {set_} modular-addition, which has no images"),
        "--padding": ("--augment", "--no-augment", "with --no-augment"),
        "--modulus": (numbers, "", f"without {set_} modular-addition"),
        "--train-fraction": (numbers, "", f"without {set_} modular-addition"),
        "--batch-size": ("", graph, f"with {set_} karate: the graph is always one batch"),
        "--lr-min": ("--lr-policy cosine", "--lr-policy constant", "with --lr-policy constant"),
        "--momentum": ("--optimizer sgd", "--optimizer adam", "with --optimizer adam"),
        "--nesterov": ("--optimizer sgd", "--optimizer adam", "with --optimizer adam"),
        "--sync-bn": ("", numbers, f"with {arch} algorithmic, which has no BatchNorm"),
        "--sparse-compute": ("", "--compile", "as on: --compile generates kernels of its own"),
        "--no-bn-decay": (f"{decay} 0.1", f"{decay} 0", f"with {decay} 0"),
    }


ROWS = {
    "STR": shared("--set", "--data", "--arch", "--weight-decay")
    | {
        "--arch": ("", "--resnet-type large", "with --resnet-type large"),
        "--init": ("", "--start-from {RUN}", "with --start-from, whose weights it begins with"),
        "--er-sparse-method": NO_MASK,
        "--er-sparse-init": ("", "--start-from {RUN}", "with --start-from"),
        "--er-sparsity-file": (
            *("--er-sparse-method network", "--er-sparse-method ERK"),
            "without --er-sparse-method network",
        ),
        "--er-budget": (
            *("--er-sparse-method ERK", "--er-sparse-method uniform"),
            "with --er-sparse-method uniform",
        ),
        "--er-sampling": NO_MASK,
        "--first-layer-dense": ("--conv-type STRConv", *NO_MASK[1:]),
        "--last-layer-dense": NO_MASK,
        "--sparse-function": HARD,
        "--sInit-value": HARD,
        "--st-decay": HARD,
        "--pruner": (LEVEL, "", NO_LEVEL),
        "--grasp-temperature": (f"{LEVEL} --pruner grasp", LEVEL, "without --pruner grasp"),
        "--target-expt-name": (f"{LEVEL} --pruner mask-ref", LEVEL, "without --pruner mask-ref"),
        "--final-prune-epoch": (LEVEL, "", NO_LEVEL),
        "--rewind": (LEVEL, "", NO_LEVEL),
        "--reset-weights": (LEVEL, "", NO_LEVEL),
        "--prune-scheduler": (LEVEL, "", NO_LEVEL),
    },
    "ER_DST": shared("--data", "--data-dir", "--model", "--l2")
    | {
        "--momentum": (
            "--optimizer adam --growth momentum", "--optimizer adam", "with --optimizer adam"
        ),
        "--method": ("--sparse", "--no-sparse", "without --sparse"),
        "--sparse-init": ("--sparse", "--no-sparse", "without --sparse"),
        "--init-density": ("--sparse", "--no-sparse", "without --sparse"),
        "--ratios-from": (
            *("--sparse-init ER_imp", "--sparse-init snip"),
            "without --sparse-init network or ER_imp",
        ),
        "--er-budget": ("--sparse-init ERK", "--sparse-init snip", "with --sparse-init snip"),
        "--er-sampling": ("--sparse-init ERK", "--sparse-init snip", "with --sparse-init snip"),
        "--first-layer-dense": ("", "--no-sparse", "without --sparse"),
        "--last-layer-dense": ("", "--no-sparse", "without --sparse"),
        "--final-density": ("--method GMP", "--method DST", "with --method DST"),
        "--prune": ("", "--is-prune False", "with --is-prune False"),
        "--growth": ("--method DST", "--method GMP", "with --method GMP"),
        "--prune-rate": ("", "--is-prune False", "with --is-prune False"),
        "--stop-updates": ("", "--method GMP", "with --method GMP"),
        "--update-frequency": ("", "--is-prune False", "with --is-prune False"),
        "--init-prune-epoch": ("", "--method DST", "with --method DST"),
        "--final-prune-epoch": ("--epochs 160", "--method DST", "with --method DST"),
        "--is-prune": ("", "--no-sparse", "without --sparse"),
        "--grow-within-init": ("", "--method GMP", "with --method GMP"),
        "--flow-preservation": ("", "--no-sparse", "without --sparse"),
        "--ortho-repair": ("", "--no-sparse", "without --sparse"),
        "--imp-epochs": (
            *("--sparse-init ER_imp", "--sparse-init ER_imp --ratios-from x"),
            "with --ratios-from",
        ),
    },
    "ER_SLT": shared("--dataset", "--data", "--model", "--wd")
    | {
        "--no-bn-decay": (None, "", "in ER_SLT: BatchNorm has no parameters here"),
        "--er-sparse-method": ("", "--er-init-density 1", "with --er-init-density 1"),
        "--er-sparsity-file": (
            *("--er-sparse-method network", "--er-sparse-method ERK"),
            "without --er-sparse-method network",
        ),
        "--er-budget": ("--er-sparse-method ERK", "", "with --er-sparse-method uniform"),
        "--er-sampling": ("", "--er-init-density 1", "with --er-init-density 1"),
        "--first-layer-dense": ("", "--er-init-density 1", "with --er-init-density 1"),
        "--last-layer-dense": ("", "--er-init-density 1", "with --er-init-density 1"),
        "--bfac": ("--initBias kn-nonzero-bias", "", "with --initBias kn-zero-bias"),
        "--scale-fan": ("", "--er-init-density 1 --sparsity 1 --anneal False", "with --sparsity 1"),
        "--weight-scale": (
            *("--dataset karate --model gcn", ""),
            "with --model resnet20: its BatchNorm takes it back",
        ),
        "--anneal": ("--levels 2", "--levels 1", "with --levels 1"),
        "--sparsity-start": ("--anneal True", "--anneal False", "with --anneal False"),
        "--per-layer": ("--global", "", "when taken back without --global"),
    },
}  # fmt: skip

# Values that are not the default, where the default and 1 more of it will not do.
OTHER = {
    "data": "{DIR}", "mirror": "http://x", "er_sparsity_file": "/layers.json",
    "target_expt_name": "/some-run", "sparse_compute": "on", "st_decay": "0.1",
    "final_prune_epoch": "2", "valid_split": "0.2", "train_fraction": "0.5",
    "sparsity_start": "0.7",
    "momentum": "0.5", "stop_updates": "0.5", "weight_scale": "2.5",
    "er_sparse_init": "0.4", "final_density": "0.01", "prune_rate": "0.3",
    "flow_preservation": "True", "lr_min": "0.001", "grasp_temperature": "100.0", "bfac": "0.1",
    "modulus": "31", "channels": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "summary.json").write_text(json.dumps(dict.fromkeys(runs.MEASURED, 0.2)))
    return {"{DIR}": str(run), "{RUN}": str(run)}


def words(line, places):
    for name, path in places.items():
        line = line.replace(name, path)
    return line.split()


def assigned(kind, field):
    """Flags that give an option a value other than its default."""
    usual, name = default(kind, field), flag(shown(kind)[field])
    if isinstance(usual, bool):
        return f"{name}={not usual}"
    if field in OTHER:
        return f"{name} {OTHER[field]}"
    hint = kind.__dataclass_fields__[field].type
    spec = next((e for e in hint.__metadata__ if str(getattr(e, "metavar", ""))[:1] == "{"), None)
    if spec:
        others = [v for v in spec.metavar.strip("{}").split(",") if v != usual]
        return f"{name} {(others or [usual])[0]}"
    return f"{name} {usual + 1}"


TABLE = [(s, field) for s, (kind, _) in SCRIPTS.items() for field in effects.conditions(kind)]


@pytest.mark.parametrize(("script", "field"), TABLE)
def test_an_option_counts_or_is_an_error(script, field, places, tmp_path):
    kind, configs = SCRIPTS[script]
    counting, idle, said = ROWS[script][flag(shown(kind)[field])]
    named = words(assigned(kind, field), places)
    if field == "per_layer":  # the one of which the default itself can be without effect
        named, counting = ["--no-per-layer"], "--global"
    if counting is not None:
        options = parse(kind, configs, [*words(counting, places), *named])
        assert field not in effects.idle(options)
        name = flag(shown(kind)[field])
        value = getattr(options, field)
        if field != "per_layer":
            assert f"{name}={value}" == named[0] or str(value) == named[1]

    argv = words(idle, places)
    with pytest.raises(OptionError) as error:
        parse(kind, configs, [*argv, *named])
    name = flag(shown(kind)[field])
    assert str(error.value).startswith(f"{name}: has no effect {said}")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    # The default, named, is no better; the same in a file is said of the file, and its default not.
    if field == "sparse_compute":  # off and auto say nothing that is not so
        return
    usual = default(kind, field)
    if field != "per_layer" and usual is not None and usual != "":
        with pytest.raises(OptionError, match=f"^{name}: has no effect "):
            parse(kind, configs, [*argv, f"{name}={usual}"])
    base = dataclasses.replace(parse(kind, configs, argv), config="")
    content = yaml.safe_load(write_yaml(base))
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    again = parse(kind, configs, ["--config", str(path)])
    assert dataclasses.replace(again, config="") == base
    if field == "per_layer":
        return
    key = shown(kind)[field].replace("-", "_")
    value = named[0].partition("=")[2] or named[1]
    if value == usual:  # there is no other
        return
    path.write_text(yaml.safe_dump(content | {key: value}))
    with pytest.raises(OptionError) as error:
        parse(kind, configs, ["--config", str(path)])
    assert str(error.value).startswith(f"{path}: {name}: has no effect {said}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_its_place_in_the_help(script):
    kind, _ = SCRIPTS[script]
    listed = [field for fields in kind.groups.values() for field in fields]
    assert len(listed) == len(set(listed))
    rows = {field: ROWS[script][flag(shown(kind)[field])] for field in effects.conditions(kind)}
    never = {field for field, row in rows.items() if row[0] is None}
    assert set(listed) | never == {field.name for field in dataclasses.fields(kind)}
    assert len(set(listed) & never) == 0


# --- what the command line switches off -----------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "argv", "expected"),
    [
        ("STR", ["--config", "STR/configs/digits-str.yaml", "--conv-type", "DenseConv"],
         {"er_sparse_init": 0.2, "sInit_value": -200.0, "st_decay": None, "arch": "resnet20"}),
        ("STR", ["--config", "STR/configs/digits-str.yaml", "--conv-type", "STRConv"],
         {"er_sparse_init": 0.2, "sInit_value": -8.0, "st_decay": 4e-3}),
        ("STR", ["--optimizer", "adam"], {"nesterov": False, "momentum": 0.9}),
        ("STR", ["--config", "STR/configs/largescale/resnet18-cifar-str-1.yaml", "--resnet-type",
                 "large"], {"arch": "resnet20"}),
        ("ER_DST", ["--no-sparse"], {"er_sparse_method": "ERK", "er_sparse_init": 0.5,
                                     "final_density": 0.05, "update_frequency": 100}),
        ("ER_DST", ["--is-prune", "False"], {"er_sparse_method": "balanced", "er_sparse_init": 0.2,
                                             "update_frequency": 100, "method": "GraNet"}),
        ("ER_SLT", ["--er-init-density", "1"], {"er_sparse_method": "uniform"}),
    ],
)  # fmt: skip
def test_what_is_switched_off_goes_back_to_its_default(
    script, argv, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    kind, configs = SCRIPTS[script]
    options = parse(kind, configs, argv)
    assert {field: getattr(options, field) for field in expected} == expected
    assert not [f for f in effects.idle(options) if getattr(options, f) != default(kind, f)]
    (tmp_path / "options.yaml").write_text(write_yaml(options))
    again = parse(kind, configs, ["--config", f"{tmp_path}/options.yaml"])
    assert dataclasses.replace(again, config=options.config) == options


# --- traps of the issue ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["--method", "DST"], ["--sparse-init", "ERK"], ["--init-density", "0.1"],
             ["--final-density", "0.1"], ["--growth", "random"], ["--prune-rate", "0.5"]]
)  # fmt: skip
def test_naming_what_is_sparse_without_sparse_is_said(argv):
    """mnist has no YAML file in ER_DST: without --sparse the network is dense, as published."""
    with pytest.raises(OptionError, match=f"^{argv[0]}: has no effect without --sparse$"):
        parse(DSTOptions, DST_CONFIGS, ["--data", "mnist", *argv])


def test_one_argument_changes_one_thing():
    for kind, configs in SCRIPTS.values():
        before = parse(kind, configs, [])
        assert before.set == "digits"
        assert before.config == str(configs / "digits.yaml")
        assert parse(kind, configs, ["--seed", "2"]) == dataclasses.replace(before, seed=2)
        assert parse(kind, configs, ["--epochs", "3"]) == dataclasses.replace(before, epochs=3)


def test_the_published_commands_run_as_written(monkeypatch):
    """An empty --threshold-list says itself that nothing is pruned."""
    monkeypatch.chdir(ROOT / "STR")
    for command in original_commands().values():
        assert parse(STROptions, STR_CONFIGS, command.split()).threshold_list == ()
    assert parse(CIFAROptions, SLT_CONFIGS, PUBLISHED).set == "cifar10"
    excused = ["--threshold-list", "--final_prune_epoch", "150"]
    assert parse(STROptions, STR_CONFIGS, excused).final_prune_epoch == 150
    for argv in (["--final_prune_epoch", "150"], ["--threshold-list", "--final_prune_epoch", "9"]):
        with pytest.raises(OptionError, match="--final-prune-epoch: has no effect without --thr"):
            parse(STROptions, STR_CONFIGS, argv)
    assert text(("a b", 1)) == "'a b' 1"
