"""ER_DST/main.py from end to end: names, what a run leaves behind, FLOPs, the published command."""

import dataclasses
import json

import pandas as pd
import pytest
import torch
import yaml
from data_files import write_tiny_imagenet
from dst_runs import PUBLISHED
from engine_runs import clock
from script_runs import ROOT, few_digits, same, weights

from ER_DST import main as script
from ER_DST.initializers import INITS
from ER_DST.options import SPARSE_INITS, DSTOptions
from ER_DST.topology import GROWTH, METHODS, PRUNE
from startsparse import data, models, ratios
from startsparse.commandline import from_flags, parse
from startsparse.masks import sparse_layers

DEMO = ["--config", str(ROOT / "ER_DST/configs/digits.yaml"), "--width", "4", "--epochs", "2"]
STATIC = [
    *("--sparse", "--sparse-init", "ERK", "--init-density", "0.5"),
    *("--model", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "128"),
]
MOVING = [*STATIC, "--update-frequency", "3"]
MLP = [*MOVING, "--final-density", "0.1"]
# 3072 -> 16 -> 16 -> 16 -> 10
SIZES = {"hidden.0": 49_152, "hidden.3": 256, "hidden.6": 256, "classifier": 160}


def parsed(*argv):
    return parse(DSTOptions, script.CONFIGS, argv)


def result(folder):
    return json.loads((folder / "summary.json").read_text())


# --- names ----------------------------------------------------------------------------------------


NAMES = {
    "--method": ("method", {name: name for name in METHODS}),
    "--sparse-init": (
        "er_sparse_method",
        {name: name for name in SPARSE_INITS} | ratios.ALIASES,
    ),
    "--model": ("arch", {name: name for name in models.MODELS}),
    "--data": ("set", {name: name for name in data.SETS} | {"tiny_imagenet": "tiny-imagenet"}),
    "--growth": ("growth", {name: name for name in GROWTH}),
    "--prune": ("prune", {name: name for name in PRUNE}),
    "--init-method": ("init", {name: name for name in INITS}),
    "--optimizer": ("optimizer", {"sgd": "sgd", "adam": "adam"}),
}


@pytest.mark.parametrize("spelling", [str, str.upper, str.title, lambda n: n.replace("_", "-")])
def test_every_name_is_taken_in_any_capitalisation(spelling):
    rows = max(len(names) for _, names in NAMES.values())
    for row in range(rows):
        argv, expected = [], {}
        for option, (field, names) in NAMES.items():
            name = list(names)[row % len(names)]
            argv += [option, spelling(name)]
            expected[field] = names[name]
        found = from_flags(DSTOptions, argv, DSTOptions())
        assert {field: getattr(found, field) for field in expected} == expected


@pytest.mark.parametrize(
    "model", ["vgg16", "vgg19", "resnet18", "resnet20", "resnet34", "resnet50", "mlp"]
)
@pytest.mark.parametrize("images", ["cifar10", "cifar100", "tiny_imagenet", "mnist", "digits"])
def test_every_network_is_planned_for_every_set(model, images):
    start = ["--sparse-init", "ERK", "--init-density", "0.5"]
    asked = parsed("--sparse", *start, "--model", model.upper(), "--data", images)
    shape = data.SHAPES[asked.set]
    with torch.device("meta"):
        planned, requested = script.plan(asked, shape)
        logits = planned.eval()(torch.zeros(2, shape.channels, shape.size, shape.size))
    assert logits.shape == (2, shape.classes)
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(planned).items()}
    total = sum(requested[name] * size for name, size in sizes.items())
    assert total == pytest.approx(0.5 * sum(sizes.values()))


# --- end to end -----------------------------------------------------------------------------------


def test_no_arguments_are_the_demo():
    shown = parsed()
    assert shown == parsed("--config", str(script.CONFIGS / "digits.yaml"))
    assert parsed("--seed", "2") == dataclasses.replace(shown, seed=2)
    assert (shown.arch, shown.set, shown.sparse, shown.method) == (
        "resnet20",
        "digits",
        True,
        "GraNet",
    )
    assert (shown.er_sparse_method, shown.er_sparse_init, shown.final_density) == (
        "balanced",
        0.2,
        0.05,
    )


def test_the_demo_leaves_a_whole_run(run_dst, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_dst(*DEMO)
    assert folder.parts[-3:] == ("digits", "resnet20-GraNet-balanced-0.2-0.05", "seed-1")
    files = "options.yaml environment.json log.txt epochs.csv density.csv topology.csv layers.json"
    for name in (*files.split(), "curves.png", "best.pt", "checkpoint.pt"):
        assert (folder / name).stat().st_size > 0
    summary, layers = result(folder), json.loads((folder / "layers.json").read_text())
    total = summary["weights"]
    assert (summary["requested"], summary["kept"]) == (0.05, round(0.05 * total))
    assert summary["density"] == summary["kept"] / total
    assert summary["epoch"] == 2  # the pruning ends in it
    table = pd.read_csv(folder / "density.csv").set_index("layer")
    assert table.loc["total", "kept"] == summary["kept"]
    assert list(layers) == list(table.index[:-1])
    assert [row["density"] for row in layers.values()] == pytest.approx(list(table["density"][:-1]))

    topology = pd.read_csv(folder / "topology.csv")
    columns = "step epoch drop_fraction density dropped grown ever_active inside_initial dead_units"
    per_layer = [f"{what}/{name}" for name in layers for what in ("dropped", "grown")]
    assert list(topology.columns) == columns.split() + per_layer
    # 21 steps an epoch; 110/160 of 42 steps is 28.875
    assert list(topology["step"]) == [10, 20, 29, 30, 40]
    density = [0.05 + 0.15 * max(0, 1 - step / 29) ** 3 for step in topology["step"]]
    kept = [round(d * total) / total for d in density]
    assert list(topology["density"]) == pytest.approx(kept, abs=1e-12)
    assert list(topology["epoch"]) == [1, 1, 2, 2, 2]
    for what in ("dropped", "grown"):
        parts = topology[[f"{what}/{name}" for name in layers]].sum(axis=1)
        assert list(topology[what]) == list(parts)
    assert topology["ever_active"].is_monotonic_increasing
    assert (topology["dead_units"] > 0).any()

    board = EventAccumulator(str(folder / "tensorboard/topology"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(topology.columns) - {"epoch"}
    for name in ("density", "ever_active", "grown/fc"):
        events = board.Scalars(name)
        assert [event.step for event in events] == [10, 20, 29, 30, 40]
        assert [event.value for event in events] == pytest.approx(list(topology[name]), rel=1e-6)

    for which in ("inference", "training"):
        assert 0.05 < summary[f"{which}_flops_share"] < 1
        assert summary[f"{which}_flops"] > 0
    results = pd.read_csv(folder.parents[3] / "results.csv").iloc[0]
    assert results["training_flops_share"] == summary["training_flops_share"]
    said = capsys.readouterr().out
    assert "requested density    0.0500" in said
    assert f"weights kept         {summary['kept']:,} of {total:,}" in said


def hand_share(densities):
    """FLOPs of an mlp against dense, forward, and forward and backward: a weight is a product."""
    forward = sum(densities[name] * size for name, size in SIZES.items())
    # three products per weight, but for the gradient of the images
    both = 3 * forward - densities["hidden.0"] * SIZES["hidden.0"]
    total = sum(SIZES.values())
    return forward / total, both / (3 * total - SIZES["hidden.0"])


def densities_of(folder):
    return {
        n: row["density"] for n, row in json.loads((folder / "layers.json").read_text()).items()
    }


@pytest.mark.usefixtures("no_pictures")
def test_flops_of_a_static_mask_by_hand(run_dst):
    folder = run_dst(*STATIC, "--is-prune", "False", "--epochs", "2")
    summary, (forward, both) = result(folder), hand_share(densities_of(folder))
    assert summary["inference_flops_share"] == pytest.approx(forward)
    assert summary["training_flops_share"] == pytest.approx(both)
    total = sum(SIZES.values())
    assert summary["inference_flops"] == pytest.approx(2 * forward * total)
    # 1293 images, of which the last of 11 batches has 13
    images = 2 * 1293
    dense = 2 * (3 * total - SIZES["hidden.0"])
    assert summary["training_flops"] == pytest.approx(images * both * dense)
    assert not (folder / "topology.csv").exists()
    assert summary["requested"] == 0.5


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("growth", ["random", "gradient", "momentum"])
def test_flops_of_moving_masks_by_hand(run_dst, growth):
    argv = [*MOVING, "--method", "DST", "--growth", growth, "--epochs", "2"]
    folder = run_dst(*argv)
    densities = densities_of(folder)  # of each layer, always
    forward, both = hand_share(densities)
    outside = sum((1 - densities[name]) * size for name, size in SIZES.items())
    total = sum(SIZES.values())
    dense = outside / (3 * total - SIZES["hidden.0"])  # the rest of the weight gradients
    # 22 steps, updates before 3, 6, ... 21
    share = {"random": 0, "gradient": 7 / 22, "momentum": 1}[growth]
    summary = result(folder)
    assert len(pd.read_csv(folder / "topology.csv")) == 7
    assert summary["inference_flops_share"] == pytest.approx(forward)
    assert summary["training_flops_share"] == pytest.approx(both + share * dense)


@pytest.mark.usefixtures("no_pictures")
def test_without_sparse_the_network_is_dense(run_dst):
    argv = ["--model", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "128"]
    folder = run_dst(*argv, "--no-sparse")
    summary = result(folder)
    assert (summary["density"], summary["requested"]) == (1.0, 1.0)
    assert (summary["inference_flops_share"], summary["training_flops_share"]) == (1.0, 1.0)
    assert not any(name.endswith("mask") for name in weights(folder))
    assert not (folder / "topology.csv").exists()
    assert folder.parent.name == "mlp-dense"


@pytest.mark.usefixtures("no_pictures")
def test_one_seed_is_one_run_and_another_seed_another(run_dst):
    argv = [*MLP, "--growth", "random", "--flow-preservation", "always"]
    one, again = (run_dst(*argv, where=where) for where in "ab")
    other = run_dst(*argv, "--seed", "2", where="c")
    assert same(one, again)
    assert not torch.equal(*(weights(f)["hidden.0.weight_mask"] for f in (one, other)))


@pytest.mark.usefixtures("no_pictures")
def test_evaluate_reproduces_the_accuracies_and_searches_no_ratio(run_dst, capsys, monkeypatch):
    folder = run_dst(*MLP, "--sparse-init", "ER_snip", "--growth", "momentum")
    before, summary = (folder / "topology.csv").read_bytes(), result(folder)
    monkeypatch.setattr(script, "pruner_ratio", lambda *_: pytest.fail("searched again"))
    run_dst("--evaluate", "--resume", str(folder))
    said = capsys.readouterr().out.splitlines()
    assert f"valid accuracy {100 * summary['valid_accuracy']:.2f} %" in said
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in said
    assert (folder / "topology.csv").read_bytes() == before


@pytest.mark.usefixtures("no_pictures")
def test_the_test_set_is_used_once(run_dst, monkeypatch):
    seen, evaluate = [], script.Trainer.evaluate

    def watch(trainer, batches):
        seen.append("test" if batches is trainer.data.test else "valid")
        return evaluate(trainer, batches)

    monkeypatch.setattr(script.Trainer, "evaluate", watch)
    run_dst(*MLP, "--epochs", "3", "--sparse-init", "ER_imp", "--imp-epochs", "1")
    assert seen == ["valid"] * 3 + ["test"]


@pytest.mark.usefixtures("no_pictures")
def test_er_imp_prunes_here_and_its_ratio_can_be_read_from_the_run(run_dst, tmp_path, capsys):
    static = [*STATIC, "--is-prune", "False", "--er-sampling", "exact"]
    imp = run_dst(*static, "--sparse-init", "ER_imp", "--imp-epochs", "1", where="imp")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ER_imp")]
    assert [line.split()[-1] for line in said] == ["0.8000", "0.6400", "0.5000"]
    asked = json.loads((imp / "ratios.json").read_text())
    densities, total = densities_of(imp), sum(SIZES.values())
    assert sum(asked[name] * size for name, size in SIZES.items()) == pytest.approx(total / 2)
    for name, size in SIZES.items():
        assert densities[name] * size == pytest.approx(asked[name] * size, abs=1)
    assert asked["hidden.0"] < min(asked[name] for name in list(SIZES)[1:])  # the largest layer

    search = json.loads((imp / "search.json").read_text())["flops"]
    assert result(imp)["search_flops"] == search > result(imp)["training_flops"]
    summary = f"FLOPs of the search  {search:.4g} before training"
    assert summary in (imp / "log.txt").read_text()

    # A run that has found a ratio gives that one, though its network is another.
    changed = {name: {"density": density / 2} for name, density in densities.items()}
    changed["classifier"]["density"] = 0.01
    (imp / "layers.json").write_text(json.dumps(changed))
    layers = {name: row["density"] for name, row in changed.items()}
    ratios_of = {imp: asked, imp / "best.pt": densities, imp / "layers.json": layers}
    for source, ratio in ratios_of.items():
        again = parsed(*static, "--sparse-init", "ER_imp", "--ratios-from", str(source))
        assert not again.searches
        _, requested = script.plan(again, data.SHAPES["digits"])
        share = requested["hidden.3"] / requested["classifier"]
        assert share == pytest.approx(ratio["hidden.3"] / ratio["classifier"], rel=1e-6)
        if source != imp / "layers.json":
            assert requested == pytest.approx(ratio, rel=1e-6)
    (tmp_path / "mine.json").write_text(json.dumps(dict.fromkeys(SIZES, 0.1) | {"hidden.0": 0.05}))
    mine = ["--sparse-init", "ER_synflow", "--ratios-from", str(tmp_path / "mine.json")]
    folder = run_dst(*static, *mine, "--init-density", "0.2", where="mine")
    found = densities_of(folder)
    rest = [found[name] for name in list(SIZES)[1:]]
    assert rest == pytest.approx([2 * found["hidden.0"]] * 3, rel=0.02)
    assert result(folder)["kept"] == round(0.2 * total)


def test_ratios_from_a_network_of_other_layers_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"conv1": 0.5}')
    argv = [*MLP, "--sparse-init", "network", "--ratios-from", str(tmp_path / "other.json")]
    message = r"^--ratios-from: .*other\.json: the density of 'hidden\.0' is missing$"
    with pytest.raises(script.OptionError, match=message):
        script.main(argv)


@pytest.mark.usefixtures("no_pictures")
def test_tiny_imagenet_in_the_true_format(run_dst, tmp_path, monkeypatch):
    small = write_tiny_imagenet(tmp_path / "data")
    monkeypatch.setitem(data.SETS, "tiny-imagenet", small.loader)
    where = ["--data", "tiny_imagenet", "--data-dir", str(tmp_path / "data"), "-b", "4"]
    folder = run_dst(*MLP, *where, "--valid-split", "0.2", "--update-frequency", "1")
    assert result(folder)["weights"] == 64 * 64 * 3 * 16 + 2 * 256 + 3 * 16
    assert result(folder)["density"] == pytest.approx(0.1, abs=1e-5)
    assert folder.parts[-3] == "tiny-imagenet"


# --- the published command ------------------------------------------------------------------------


def test_the_published_command_means_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT / "ER_DST")
    asked = parsed(*PUBLISHED.split())
    expected = {
        "sparse": True,
        "method": "GraNet",
        "prune_rate": 0.5,
        "optimizer": "sgd",
        "er_sparse_method": "balanced",
        "er_sparse_init": 0.01,
        "final_density": 0.001,
        "update_frequency": 1000,
        "weight_decay": 0.0005,
        "lr": 0.1,
        "epochs": 160,
        "arch": "vgg16",
        "set": "cifar10",
        "prune": "magnitude",
        "init": "default",
        "is_prune": True,
        "flow_preservation": "True",
        "ortho_repair": False,
        "seed": 1,
        # and what the command does not say
        "growth": "gradient",
        "batch_size": 100,
        "momentum": 0.9,
        "nesterov": True,
        "lr_policy": "multistep",
        "valid_split": 0.1,
        "augment": True,
        "padding": "reflect",
        "prune_end": 110,
        "init_prune_epoch": 0,
    }
    assert {name: getattr(asked, name) for name in expected} == expected


def test_the_published_command_finishes_on_digits(run_dst, monkeypatch, capsys):
    """Its initial mask has no dead unit; pruning, which nothing repairs, leaves some."""
    monkeypatch.chdir(ROOT / "ER_DST")
    monkeypatch.setitem(data.SETS, "digits", few_digits(420, 20))
    clock(monkeypatch, dense=2.0, sparse=1.0)  # each thing is tried once
    folder = run_dst(*PUBLISHED.split(), "--data", "digits", "--epochs", "2")
    summary, topology = result(folder), pd.read_csv(folder / "topology.csv")
    batch_size = yaml.safe_load((folder / "options.yaml").read_text())["batch_size"]
    assert (summary["requested"], summary["weights"]) == (0.001, 14_715_584)
    steps = len(pd.read_csv(folder / "epochs.csv")) * -(
        -378 // batch_size
    )  # a tenth of 420 validates
    assert list(topology["step"]) == [round(110 / 160 * steps)]
    dead = int(pd.read_csv(folder / "density.csv")[["dead_outputs", "dead_inputs"]].iloc[-1].sum())
    assert list(topology["dead_units"]) == [dead]
    assert dead > 0
    assert summary["kept"] == round(0.001 * 14_715_584)
    said = capsys.readouterr().out
    assert "units without an" not in said
    assert "the mask moves once" in said
