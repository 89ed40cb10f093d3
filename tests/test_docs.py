"""Markdown: commands are understood, options and links exist, figures of costs are recomputed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from option_names import SCRIPTS, shown_names
from PIL import Image

import ER_DST.main
import STR.main
from ER_SLT.options import CIFAROptions
from startsparse import flops, recipe, report, sweep, tabular
from startsparse.commandline import from_flags, parse
from startsparse.data import SHAPES
from startsparse.export.command import ExportOptions
from startsparse.fields import names, normal, opposites
from startsparse.masks import sparse_layers
from startsparse.models import build
from startsparse.ratios import layer_densities
from STR import run_imp

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS[1:], ROOT / "benchmarks/README.md"]
REPRODUCE = (ROOT / "docs/reproduce.md").read_text()


def commands():
    """(script package or "", command line) of every fenced block."""
    for path in DOCS:
        for block in re.findall(r"^```\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            folder = ""
            for line in block.splitlines():
                if line.startswith("cd "):
                    folder = line.split()[1]
                elif line.startswith("python "):
                    yield folder, line
                elif line.startswith("torchrun --nproc-per-node "):
                    yield folder, f"python {line.split(maxsplit=3)[3]}"


COMMANDS = list(commands())
MODULES = {  # python -m -> its options, and their defaults
    "startsparse.tabular": (tabular.TabularOptions, tabular.TabularOptions()),
    "startsparse.report": (report.ReportOptions, report.ReportOptions("results.csv")),
    "startsparse.export": (ExportOptions, ExportOptions("run")),
    "startsparse.sweep": (sweep.SweepOptions, sweep.SweepOptions()),
}


def test_there_are_commands():
    assert {folder for folder, _ in COMMANDS} == {"", *SCRIPTS}


@pytest.mark.parametrize(("folder", "command"), COMMANDS)
def test_every_command_is_understood(folder, command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT / folder)
    program, *argv = shlex.split(command)[1:]
    if "DIR" in argv:  # images of one's own
        for path in (tmp_path / "train" / name / "x.png" for name in ("cat", "dog")):
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(path)
        argv[argv.index("DIR")] = str(tmp_path)
    if program == "-m":
        module = argv.pop(0)
        kind, default = MODULES[module]
        if module == "startsparse.sweep":
            assert sweep.main([argv[0], "--dry-run", *argv[1:]]) == 0
            return
        options = from_flags(kind, argv, default)
        if module == "startsparse.tabular":
            options.check()
    elif program == "run_imp.py":
        assert run_imp.main(["--dry-run", *argv]) == 0
        said = capsys.readouterr().out
        if command in REPRODUCE and (not argv or "--dry-run" in argv):  # what the text says of it
            assert f"{int(said.split()[-2]):,} epochs" in REPRODUCE
    else:
        assert program in ("main.py", "cifar_main.py")
        assert (ROOT / folder / program).exists()
        kind, configs = SCRIPTS[folder]
        options = parse(CIFAROptions if program == "cifar_main.py" else kind, configs, argv)
        shape = recipe.expected_shape(options)
        with torch.device("meta"):
            if folder == "ER_SLT":
                recipe.build(options, shape)
            elif "--er-sparsity-file" not in argv:  # the run that it names is not there
                {"STR": STR.main, "ER_DST": ER_DST.main}[folder].plan(options, shape)


def test_every_option_exists():
    kinds = [*(kind for kind, _ in SCRIPTS.values()), run_imp.SweepOptions]
    known = {normal(name) for name in ("help", "l2")}
    for kind in kinds:
        known |= {*shown_names(kind)[0], *names(kind), *opposites(kind)}
    for kind, _ in MODULES.values():
        known |= {*map(normal, kind.__dataclass_fields__), *shown_names(kind)[0]}
    for path in DOCS:
        spans = re.findall(
            r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        )
        for option in re.findall(r"--([A-Za-z][\w-]*)", " ".join(spans)):
            assert normal(option) in known, f"{path.name}: --{option}"


# --- links ----------------------------------------------------------------------------------------


def anchors(path):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(path):
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(page)):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page):
    """In code spans: files of the repository, and modules that python -m starts."""
    spans = " ".join(re.findall(r"`([^`\n]+)`", without_code(page)))
    folders = "startsparse|STR|ER_DST|ER_SLT|results|benchmarks|docs|tests"
    for name in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", spans):
        assert (ROOT / name).exists() or name == "results/results.csv", name
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        known = module in ("pytest", "venv", "pip", "mypy")
        assert known or path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


# --- costs ----------------------------------------------------------------------------------------


def rows(heading):
    """Cells of the table of reproduce.md whose first line begins so; empty first cells repeat."""
    lines = REPRODUCE.split(f"\n{heading}", 1)[1].splitlines()[2:]
    found, first = [], ""
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        first = cells[0] or first
        found.append([first, *cells[1:]])
    return found


def network(name):
    """FLOPs and weight shapes of the layers of, say, "resnet18 on cifar10"."""
    arch, name = name.split(" on ")
    shape = SHAPES[name]
    with torch.device("meta"):
        model = build(
            arch,
            classes=shape.classes,
            channels=shape.channels,
            size=shape.size,
            imagenet=name == "imagenet",
        )
        forward = flops.forward_flops(model, torch.zeros(shape.input))
    return forward, [tuple(layer.weight.shape) for layer in sparse_layers(model).values()]


def cost(forward, densities):
    """3 sum_l p_l F_l - p_1 F_1, as the text says."""
    parts = [p * f for p, f in zip(densities, forward.values(), strict=True)]
    return 3 * sum(parts) - parts[0]


def test_weights_and_flops_of_the_networks():
    found = rows("| network | weights |")
    assert len(found) == 4
    for name, weights, per_example in found:
        forward, shapes = network(name)
        assert int(weights.replace(",", "")) == sum(torch.Size(s).numel() for s in shapes)
        dense = cost(forward, [1.0] * len(shapes))
        assert dense == flops.training(forward, dict.fromkeys(forward, 1.0))
        assert float(per_example) == pytest.approx(dense, rel=5e-4)


def test_shares_of_random_masks():
    found = rows("| network | ratio |")
    assert len(found) == 8
    for name, ratio, *shares in found:
        forward, shapes = network(name)
        dense = cost(forward, [1.0] * len(shapes))
        for density, share in zip((0.5, 0.3, 0.2, 0.1, 0.05, 0.01, 0.001), shares, strict=True):
            expected = cost(forward, layer_densities(ratio, shapes, density)) / dense
            assert float(share) == pytest.approx(expected, abs=5.1e-4)


def test_shares_of_tickets():
    forward, shapes = network("resnet18 on cifar10")
    dense = cost(forward, [1.0] * len(shapes))

    def share(mask, used):
        scores = (mask - used) * sum(forward.values())
        return (cost(forward, [used] * len(shapes)) + scores) / dense

    for mask, ticket, annealed, straight in ([float(c) for c in row] for row in rows("| mask |")):
        levels = [0.6 * (ticket / 0.6) ** (level / 5) for level in range(1, 6)]
        levels = [min(mask, level) for level in levels]
        assert straight == pytest.approx(share(mask, ticket), abs=5.1e-4)
        expected = sum(share(mask, level) for level in levels) / 5
        assert annealed == pytest.approx(expected, abs=5.1e-4)


def test_shares_of_dynamic_training():
    """72,000 steps, an update every 1,000, which prunes to the cubic schedule until step 49,500."""
    forward, shapes = network("vgg16 on cifar10")
    dense = cost(forward, [1.0] * len(shapes))
    found = rows("| start | end |")
    assert len(found) == 4
    for start, final, alike, most in found:
        ratio, initial = start.split()
        first, final = float(initial), float(final)
        whole = cost(forward, layer_densities(ratio, shapes, first)) / dense
        spent, density, before = 0.0, first, 0
        for step in sorted([*range(1000, 72_000, 1000), 49_500, 72_000]):
            spent += (step - before) / 72_000 * density / first
            density = final + (first - final) * max(0.0, 1 - step / 49_500) ** 3
            before = step
        assert float(most) == pytest.approx(whole, abs=1.1e-3)  # rounded up
        assert float(most) >= whole
        assert float(alike) == pytest.approx(spent * whole, abs=5.1e-4)


def test_costs_of_tables_graphs_and_pairs():
    """A row of 16 features; a whole graph; all 5,000 steps on 70 % of 1,770 pairs."""
    with torch.device("meta"):
        mlp = build("mlp", classes=2, channels=16, size=1)
        row = flops.forward_flops(mlp, torch.zeros(1, 16, 1, 1))
    found = [cost(row, [1.0] * 4)]
    for name in ("cora", "citeseer", "pubmed"):
        shape = SHAPES[name]
        weights = (shape.channels * 16, 16 * shape.classes)
        found.append(sum(2 * shape.nodes * n * times for n, times in zip(weights, (2, 3))))
    pairs, shapes = network("algorithmic on modular-addition")
    found.append(5000 * 1239 * cost(pairs, [1.0] * len(shapes)))
    for value in found:
        mantissa, exponent = f"{value:.2e}".split("e+")
        assert f"{mantissa}e{int(exponent)}" in REPRODUCE


def test_totals_of_the_text():
    """Dense FLOPs of whole trainings, 45,000 examples an epoch, and the share of the sweep."""
    resnet, shapes = network("resnet18 on cifar10")
    dense = cost(resnet, [1.0] * len(shapes))
    vgg, layers = network("vgg16 on cifar10")
    totals = [45_000 * epochs * dense for epochs in (160, 500, 2410, 100)]
    totals.append(45_000 * 160 * cost(vgg, [1.0] * len(layers)))
    for total in totals:
        mantissa, exponent = f"{total:.3e}".split("e+")
        assert f"{mantissa}e{exponent}" in REPRODUCE.replace("\n", " ")
    levels = [0.3 * 0.8**level for level in range(15)]
    alike = (150 * sum(levels) + 160 * 0.01) / 2410 / 0.3
    balanced = cost(resnet, layer_densities("balanced", shapes, 0.3)) / dense
    assert f"if alike {alike * balanced:.3f}, at most {balanced:.3f}" in " ".join(REPRODUCE.split())
