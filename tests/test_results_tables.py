"""The numbers in the prose: each is recomputed from the committed table that it comes from."""

import re
import runpy
import shlex
import statistics
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread
from scipy.stats import t

from startsparse import report

ROOT = Path(__file__).parents[1]
RESULTS = " ".join((ROOT / "results/README.md").read_text().split())
SPARSE = "docs/sparse-compute.md"


def cells(path, heading):
    """Rows of the Markdown table whose first line begins so; empty first cells repeat."""
    lines = (ROOT / path).read_text().split(f"\n{heading}", 1)[1].splitlines()[2:]
    rows, first = [], ""
    for line in lines:
        if not line.startswith("|"):
            break
        row = [cell.strip() for cell in line.split("|")[1:-1]]
        first = row[0] or first
        rows.append([first, *row[1:]])
    return rows


def runs(path, **where):
    table = pd.read_csv(ROOT / path, dtype={"flow_preservation": str, "rewind": str})
    for name, value in where.items():
        table = table[table[name] == value]
    return table


def mean(values, scale=100, digits=1, bare=False):
    """``mean ± half`` of a 95 % interval by Student's t; ``bare``: without where all are equal."""
    values = [scale * float(value) for value in values]
    n = len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if bare and half == 0 else f"{text} ± {half:.{digits}f}"


def test_iterative_pruning():
    expected = []
    for start, density in [("dense", 1.0), *((r, d) for r in RATIOS for d in (0.5, 0.2))]:
        at = {"er_sparse_method": "balanced" if start == "dense" else start}
        at["er_sparse_init"] = density
        row = [start if start == "dense" else f"{start} {density:g}"]
        for rewind in ("weights", "none"):
            table = runs("results/imp-digits/levels.csv", rewind=rewind, **at)
            for level in (0.05, 0.02, 0.01):
                row.append(mean(table[table["requested"] == level]["test_accuracy"]))
        expected.append(row)
    assert cells("results/README.md", "| start | IMP, density 0.05") == expected


RATIOS = ("balanced", "ERK", "uniform", "pyramidal")


def test_dynamic_sparse_training():
    expected = []
    for epochs, methods in ((12, ("GraNet", "GMP", *STILL)), (60, STILL)):
        for name in methods:
            row = [name + ", 60 epochs" * (epochs == 60)]
            for ratio in ("ERK", "pyramidal", "balanced"):
                for flow in ("False", "always"):
                    at = {"name": name, "er_sparse_method": ratio, "flow_preservation": flow}
                    table = runs("results/dst-digits/results.csv", epochs=epochs, **at)
                    row.append(mean(table["test_accuracy"]) if len(table) else "")
            expected.append(row)
    assert cells("results/README.md", "| method | ERK | ERK, flow") == expected


STILL = ("DST-gradient", "DST-random", "static")


def test_strong_lottery_tickets():
    expected = []
    for start in (1.0, 0.8, 0.5, 0.3):
        row = ["dense" if start == 1 else f"ER {start:g}"]
        for anneal in (True, False):
            for density in (0.2, 0.1, 0.05):
                at = {"er_sparse_init": start, "anneal": anneal, "sparsity": density}
                row.append(mean(runs("results/slt-digits/results.csv", **at)["test_accuracy"]))
        expected.append(row)
    assert cells("results/README.md", "| start | annealed to 0.2") == expected


def test_tables():
    expected = []
    for name in ("breast-cancer", "digits"):
        for start in (1.0, 0.5, 0.2):
            row = [name.replace("-", " "), "dense" if start == 1 else f"ER {start:g}"]
            table = runs("results/tabular/results.csv", table=name, start=start, reset=True)
            for flow, levels in ((False, (start, 0.05, 0.02, 0.01, 0.005)), (True, (0.005,))):
                for level in levels:
                    these = table[(table["flow"] == flow) & (table["requested"] == level)]
                    row.append(mean(these["test_accuracy"]))
            row[-1] += f" ({these['density'].mean():.4f})"
            expected.append(row)
    assert cells("results/README.md", "| table | start | own density") == expected


def test_karate_club():
    expected = []
    for name in ("uniform", "balanced", "ERK"):
        table = runs("results/graph/results.csv", expt_setup=name)
        levels = [table[table["requested"] == level] for level in (0.5, 0.2, 0.1)]
        expected.append([name, *(mean(level["test_accuracy"]) for level in levels)])
    pruned = [
        mean(runs("results/graph/results.csv", expt_setup=f"{start},IMP")["test_accuracy"])
        for start in ("dense", "balanced")
    ]
    assert len(set(pruned)) == 1  # one row stands for both
    expected.append(["IMP from dense, or from balanced 0.5", "", "", pruned[0]])
    assert cells("results/README.md", "| mask | density 0.5 | 0.2") == expected
    dense = mean(runs("results/graph/results.csv", expt_setup="dense")["test_accuracy"])
    assert f"Dense: {dense}." in RESULTS


MASKS = ("uniform", "ERK", "balanced", "pyramidal")
FROM_DENSER = {
    "IMP from dense": "IMP-dense",
    "IMP from balanced 0.5": "IMP-balanced-0.5",
    "GraNet from balanced 0.5": "GraNet-balanced-0.5",
}


def cifar10(name, column="test_accuracy"):
    """A column of a setting of results/cifar10-jpeg, by seed."""
    return runs("results/cifar10-jpeg/results.csv", name=name).set_index("seed")[column]


def test_random_masks_on_cifar10():
    dense, expected = cifar10("E1-vgg11-dense"), []
    for ratio in ("ERK", "balanced", "uniform"):
        masks = [cifar10(f"E1-vgg11-{ratio}-{density}") for density in (0.5, 0.2, 0.1, 0.05, 0.02)]
        expected.append([ratio, *map(mean, masks)])
        expected.append([f"{ratio}, minus dense", *(mean(mask - dense) for mask in masks)])
    assert cells("results/README.md", "| random mask | 0.5 | 0.2") == expected
    assert f"Dense: {mean(dense)}." in RESULTS
    points = [mean(dense - cifar10(f"E1-vgg11-ERK-{d}"), digits=0).split()[0] for d in (0.5, 0.05)]
    text = "by {} point at 0.5 and {} at 0.05 with ERK".format(*points)
    assert text in " ".join((ROOT / "README.md").read_text().split())
    for density in (0.1, 0.05, 0.02):
        ahead = cifar10(f"E1-vgg11-balanced-{density}") - cifar10(f"E1-vgg11-ERK-{density}")
        assert f"{mean(ahead)} at {density}" in RESULTS
    shares = [
        cifar10(f"E1-vgg11-{ratio}-0.05", "training_flops_share").mean()
        for ratio in ("balanced", "ERK")
    ]
    assert "{:.2f} of dense training at 0.05, where ERK takes {:.2f}".format(*shares) in RESULTS
    costs = [
        cifar10(name, "cpu_seconds").mean()
        for name in ("E1-vgg11-dense", "E1-vgg11-ERK-0.2", "E1-vgg11-ERK-0.02")
    ]
    assert (
        "{:.0f} CPU seconds, ERK masks of 0.2 and 0.02 {:.0f} and {:.0f}".format(*costs) in RESULTS
    )


def test_the_tables_of_cifar10_are_of_its_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    module = runpy.run_path(str(ROOT / "results/cifar10.py"))
    folder = ROOT / "results/cifar10-jpeg"
    text = module["text"](module["read"](), pd.read_csv(folder / "curves.csv"))
    assert text == (folder / "table.md").read_text()


def citation(set_, name, requested):
    """Test accuracies of a setting of results/citation, by seed."""
    table = runs("results/citation/results.csv", set=set_, name=name, requested=requested)
    return table.set_index("seed")["test_accuracy"]


def test_citation_graphs():
    expected = []
    for name in MASKS:
        cells_of = (citation(s, name, d) for s in ("cora", "citeseer") for d in (0.5, 0.2, 0.1))
        expected.append([name, *map(mean, cells_of)])
    for text, name in FROM_DENSER.items():
        cora, citeseer = (mean(citation(s, name, 0.1)) for s in ("cora", "citeseer"))
        expected.append([text, "", "", cora, "", "", citeseer])
    assert cells("results/README.md", "| mask | Cora, 0.5 | 0.2") == expected
    dense = [mean(citation(s, "dense", 1)) for s in ("cora", "citeseer")]
    assert "Dense: Cora {}, Citeseer {}.".format(*dense) in RESULTS


def lost(set_, name, requested):
    """Half of the 95 % interval, and mean, of the difference from dense, paired by seed."""
    found = 100 * (citation(set_, name, requested) - citation(set_, "dense", 1))
    assert len(found) == 5 and found.notna().all()
    return t.ppf(0.975, 4) * found.std() / 5**0.5, found.mean()


def test_where_citation_graphs_fall_below_dense():
    """The highest density whose interval lies below 0; and what pruning to 0.1 costs."""
    expected = []
    for set_ in ("cora", "citeseer"):
        row = [set_.capitalize()]
        for name in MASKS:
            losses = {density: lost(set_, name, density) for density in (0.5, 0.2, 0.1)}
            density = next(d for d, (half, mean_) in losses.items() if mean_ + half < 0)
            half, mean_ = losses[density]
            row.append(f"{density:g} ({mean_:.1f} ± {half:.1f})")
        expected.append(row)
    assert cells("results/README.md", "| below dense from | uniform") == expected
    for set_ in ("cora", "citeseer"):
        for name in FROM_DENSER.values():
            half, mean_ = lost(set_, name, 0.1)
            assert abs(mean_) < half
            assert f"{mean_:.1f} ± {half:.1f}" in RESULTS
    worst = {name: [-lost(s, name, 0.1)[1] for s in ("cora", "citeseer")] for name in MASKS}
    assert {f"{loss:.0f}" for loss in worst["balanced"]} == {"7"}
    thin = worst["uniform"] + worst["pyramidal"]
    assert "balanced ones lose 7 points" in RESULTS
    assert f"and a single one, {min(thin):.0f} to {max(thin):.0f}." in RESULTS
    for set_ in ("cora", "citeseer"):  # every ratio is below at 0.2
        for name in MASKS:
            half, mean_ = lost(set_, name, 0.2)
            assert mean_ + half < 0


def test_words_that_citation_networks_do_not_use():
    table = pd.read_csv(ROOT / "results/citation/dead_words.csv")
    table[["set", "name"]] = table["run"].str.extract(r"/0\.1/(\w+)/([^/]+)/")
    table["share"] = 100 * table["dead_words"] / table["set"].map({"cora": 1433, "citeseer": 3703})
    share = table.groupby(["name", "set"])["share"].mean()
    pruned = pd.concat([share["IMP-dense"], share["GraNet-balanced-0.5"]])
    balanced = share["balanced"]
    text = (
        "leave {:.0f} to {:.0f} % of the words without a weight, IMP from dense and GraNet {:.0f}"
    )
    ends = [balanced.min(), balanced.max(), pruned.min(), pruned.max()]
    assert (text + " to {:.0f} % (").format(*ends) in RESULTS


def test_longer_training_of_citation_graphs():
    values = {}
    for set_ in ("cora", "citeseer"):
        for name in ("balanced", "dense"):
            at = {"set": set_, "name": f"{name}-5000"}
            table = runs("results/citation/longer/results.csv", **at).set_index("seed")
            values[set_, name] = table["test_accuracy"]
            assert len(table) == 5 and mean(table["test_accuracy"]) in RESULTS
        half = report.half_width(difference := values[set_, "balanced"] - values[set_, "dense"])
        assert f"{100 * difference.mean():.1f} ± {100 * half:.1f}" in RESULTS


def test_modular_addition():
    """Steps of single seeds are in no table: those that all share are read off the mean curves."""
    curves = pd.read_csv(ROOT / "results/algorithmic/curves.csv")
    shared = 0
    for density, training, validation, accuracy in cells("results/README.md", "| density | steps"):
        table = runs("results/algorithmic/results.csv", er_sparse_init=float(density))
        assert accuracy == mean(table["test_accuracy"], bare=True).removesuffix(".0")
        curve = curves[curves["er_sparse_init"] == float(density)].set_index("epoch")
        learnt = 20 * curve.index[curve["train_accuracy"] >= 0.999][0]
        if "±" not in training:
            shared += 1
            assert int(training) == learnt
        steps, half = (float(part) for part in f"{training} ± 0".split(" ± ")[:2])
        assert abs(steps - learnt) <= half
        if validation == "none":
            assert curve["valid_accuracy"].max() < 0.9 / 5  # not one of five
    assert shared == 3


def test_soft_thresholds():
    expected = []
    for conv, start in (("STRConv", "dense"), ("STRConvER", "ER 0.3")):
        for decay in (0.004, 0.008):
            table = runs("results/str-digits/results.csv", conv_type=conv, st_decay=decay)
            density = mean(table["density"], scale=1, digits=3)
            accuracy = f"{mean(table['test_accuracy'], digits=2)} %"
            expected.append([f"{start} (`{conv}`)", f"{decay}", density, accuracy])
    assert cells("results/README.md", "| start | weight decay of s") == expected


def test_ranges_of_the_text():
    """From the smallest to the largest, as the text rounds them."""
    table = runs("results/dst-digits/results.csv", epochs=12, flow_preservation="False")
    share = 100 * table.groupby(["name", "er_sparse_method"])["training_flops_share"].mean()
    static, pruned = share["static"], pd.concat([share["GraNet"], share["GMP"]])
    ends = [static["ERK"], static["balanced"], pruned.min(), pruned.max()]
    text = "for {:.0f} to {:.0f} % of the FLOPs of dense training (GraNet and GMP: {:.0f} to {:.0f}"
    assert text.format(*ends) in RESULTS
    text = "for {:.0f} to {:.0f} % of the FLOPs of dense training."
    assert text.format(*ends) in " ".join((ROOT / "README.md").read_text().split())

    dead = pd.read_csv(ROOT / "results/dst-digits/dead_units.csv")
    dead["units"] = dead["dead_outputs"] + dead["dead_inputs"]
    dead = dead[dead["run"].str.contains("/(?:ERK|balanced)-False-12/")]
    ends = [dead[dead["run"].str.contains(f"DST-{growth}")]["units"] for growth in GROWTHS]
    text = (
        "it ends with {} to {} dead units from ERK and balanced masks, random growth with {} to {}"
    )
    assert text.format(*(end for units in ends for end in (units.min(), units.max()))) in RESULTS

    shuffled = runs("results/slt-digits/results.csv")
    ends = shuffled[["shuffled_mask_accuracy", "shuffled_mask_and_weights_accuracy"]].to_numpy()
    assert f"are at chance ({100 * ends.min():.0f} to {100 * ends.max():.0f} %)" in RESULTS
    lowest = shuffled.loc[shuffled["test_accuracy"].idxmin()]
    assert (lowest["er_sparse_init"], lowest["anneal"], lowest["sparsity"]) == (0.3, True, 0.1)
    assert f"lowest single seed has {100 * lowest['test_accuracy']:.1f} % (ER 0.3, annea" in RESULTS


GROWTHS = ("gradient", "random")


# --- sparse compute -------------------------------------------------------------------------------

NETWORKS = {"ResNet18": "resnet18", "VGG16": "vgg16", "MLP": "mlp"}


def times_faster(network, density, form):
    table = runs("benchmarks/sparse_compute.csv", network=network, density=density, form=form)
    (value,) = table["times_faster"]
    return value


def test_training_steps():
    found = cells(SPARSE, "| network, batch | density")
    assert len(found) == 9
    for name, density, *times in found:
        network = NETWORKS[re.match(r"\w+", name)[0]]
        for form, value in zip(("masked", "SparseProp", "sparse"), times, strict=True):
            assert value == f"{times_faster(network, float(density), form):.2f}"


def test_inference():
    found = cells(SPARSE, "| network | 1 image | 64 images |")
    assert [name for name, *_ in found] == list(NETWORKS)
    for name, *times in found:
        for count, value in zip((1, 64), times, strict=True):
            assert value == f"{times_faster(NETWORKS[name], 0.05, f'inference {count}'):.1f}"


def test_training_steps_of_the_first_page():
    times = [f"{times_faster('resnet18', d, 'sparse'):.1f}" for d in (0.2, 0.1, 0.05, 0.01)]
    text = "{}, {}, {} and {} times faster than the dense one at density 0.2, 0.1, 0.05 and 0.01"
    assert text.format(*times) in " ".join((ROOT / "README.md").read_text().split())


# --- committed tables -----------------------------------------------------------------------------


REPORTED = [
    path
    for path in sorted(ROOT.glob("results/*/run.sh"))
    if "startsparse.report" in path.read_text()
]


@pytest.mark.parametrize("script", REPORTED, ids=lambda path: path.parent.name)
def test_table_md_is_what_its_command_prints(script, monkeypatch, capsys):
    command = script.read_text().replace("\\\n", " ")
    command = re.search(r"^python -m startsparse\.report (.*?)(\||$)", command, re.M)[1]
    command = re.sub(r"--(plot|curves|band) \S+", "", command)
    monkeypatch.chdir(ROOT / "STR")
    monkeypatch.setattr(sys, "argv", ["report", *shlex.split(command)])
    report.main()
    assert capsys.readouterr().out == (script.parent / "table.md").read_text()


def test_the_picture_of_the_first_page_is_drawn_from_the_tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))  # as for a program that lies there
    runpy.run_path(str(ROOT / "results/picture.py"))["draw"](tmp_path / "picture.png")
    drawn, committed = (imread(path) for path in (tmp_path / "picture.png", ROOT / PICTURE))
    assert drawn.shape == committed.shape


PICTURE = "results/picture.png"
