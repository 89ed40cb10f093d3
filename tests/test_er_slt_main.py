"""ER_SLT/main.py from end to end: what a run keeps fixed, what it finds, what its tickets say."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from data_files import write_cifar10
from engine_runs import clock
from script_runs import ROOT, few_digits, weights
from slt_runs import (
    DEMO,
    MLP,
    PUBLISHED,
    asked,
    is_inside,
    random_masks,
    result,
    slt,
    ticket,
    used,
)

from ER_SLT import main as script
from ER_SLT.edge_popup import RANKINGS, SCORE_INITS, found_masks, popup_layers
from ER_SLT.initializers import INITS
from ER_SLT.levels import densities, overlap, score_statistics
from ER_SLT.options import SLTOptions
from ER_SLT.ticket import SHUFFLES
from startsparse.commandline import parse
from startsparse.errors import OptionError
from startsparse.masks import density_table
from startsparse.trainer import Trainer

FROZEN = ("weight", "bias", "weight_mask")


def fixed(model):
    """The bytes that training must not touch."""
    return {
        name: tensor.clone().numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[2] in FROZEN
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, cut short, with everything that can be asked for; what was fixed at its start."""
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        run_phases = Trainer.run_phases

        def watch(trainer, phases):
            begun.append((trainer.model, fixed(trainer.model)))
            run_phases(trainer, phases)

        patch.setattr(Trainer, "run_phases", watch)
        patch.setitem(script.data.SETS, "digits", few_digits(500, 360))  # all that test
        extra = ["--initBias", "kn-nonzero-bias", "--shuffle", "--save-model"]
        folder = slt(tmp_path_factory.mktemp("demo"), *DEMO, *extra)
    return folder, *begun[0]


def test_the_demo_leaves_what_a_run_leaves(demo):
    folder, model, _ = demo
    levels = [f"levels/level-{level}" for level in (1, 2, 3)]
    for name in (
        *("options.yaml", "environment.json", "log.txt", "epochs.csv", "levels.csv", "density.csv"),
        *("random_mask.csv", "layers.json", "curves.png", "shuffles.csv", "ticket.safetensors"),
        *(f"{level}.{kind}" for level in levels for kind in ("safetensors", "csv", "pt")),
    ):
        assert (folder / name).stat().st_size > 0
    found = result(folder)
    assert found["requested"] == 0.2
    assert found["density"] == density_table(model).iloc[-1]["density"]
    assert found["density"] == pytest.approx(0.2, abs=0.003)  # biases count, too
    assert 0.3 < found["training_flops_share"] < 0.5
    row = pd.read_csv(folder.parents[3] / "results.csv").iloc[0]
    assert row["test_accuracy"] == found["test_accuracy"]
    assert row["shuffled_mask_accuracy"] == found["shuffled_mask_accuracy"]
    assert row["sparsity"] == 0.2
    assert len(weights(folder, "levels/level-2.pt")) == len(model.state_dict())
    random_mask = pd.read_csv(folder / "random_mask.csv").iloc[-1]
    assert random_mask["requested"] == 0.5
    assert random_mask["density"] == pytest.approx(0.5, abs=0.01)


def test_weights_biases_and_random_masks_never_change(demo):
    folder, model, before = demo
    after = fixed(model)
    assert before == after
    assert {name.rpartition(".")[2] for name in before} == set(FROZEN)
    for name in ("checkpoint.pt", "best.pt", "levels/level-1.pt"):
        saved = weights(folder, name)
        assert all(saved[n].contiguous().numpy().tobytes() == old for n, old in before.items())


def test_every_level_keeps_exactly_k_entries_inside_the_random_mask(demo):
    folder, _, _ = demo
    options = parse(SLTOptions, script.CONFIGS, ["--config", f"{folder}/options.yaml"])
    drawn = random_masks(options)
    for level, density in enumerate(densities(options), 1):
        found = ticket(folder, level)
        assert used(found, "layer") == asked(found, density, "layer")
        assert is_inside(found)
        assert all(torch.equal(mask, drawn[name]) for name, mask in found.er_masks.items())
        assert found.description["level"] == level
    last = ticket(folder)
    assert all(torch.equal(mask, found.found[name]) for name, mask in last.found.items())
    assert last.description == found.description


def test_levels_csv(demo):
    folder, model, _ = demo
    levels, epochs = pd.read_csv(folder / "levels.csv"), pd.read_csv(folder / "epochs.csv")
    assert levels["level"].tolist() == [1, 2, 3]
    assert levels["requested"].tolist() == pytest.approx(
        [0.6 / 3 ** (1 / 3), 0.6 / 3 ** (2 / 3), 0.2]
    )
    assert epochs["phase"].tolist() == [f"level {level}" for level in (1, 1, 2, 2, 3, 3)]
    for row in levels.itertuples():
        found = ticket(folder, row.level)
        table = pd.read_csv(folder / f"levels/level-{row.level}.csv").iloc[-1]
        kinds = {"weight": 0, "bias": 0}
        for name, mask in found.found.items():
            kinds[name.rpartition(".")[2]] += int(mask.sum())
        assert row.kept == table["kept"] == kinds["weight"]
        assert row.kept_biases == kinds["bias"] > 0
        assert row.density == table["density"] == row.kept / table["weights"]
        assert row.density == pytest.approx(row.requested, abs=0.005)
        assert row.dead_units == table["dead_outputs"] + table["dead_inputs"]
        candidates = epochs[epochs["phase"] == f"level {row.level}"]
        assert row.valid_accuracy == candidates["valid_accuracy"].max()
        assert row.epoch in candidates["epoch"].tolist()
        assert found.description["test_accuracy"] == row.test_accuracy
        if row.level > 1:
            assert row.overlap == overlap(found.found, ticket(folder, row.level - 1).found)
            assert 0.5 < row.overlap <= 1
    assert levels["overlap"].isna().tolist() == [True, False, False]
    assert levels["kept"].is_monotonic_decreasing
    assert (levels["score_min"] <= levels["score_mean"]).all()
    assert (levels["score_mean"] <= levels["score_max"]).all()
    statistics = score_statistics(model)
    assert levels.iloc[-1][list(statistics)].tolist() == list(statistics.values())
    assert result(folder)["test_accuracy"] == levels["test_accuracy"].iloc[-1]


def test_score_statistics_and_overlap_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    script.masks.attach_masks(model, {"0": torch.tensor([[True, True], [True, False]])})
    script.popup(model, 1)
    with torch.no_grad():
        model[0].weight_score.copy_(torch.tensor([[-3.0, 1.0], [0.0, 0.0]]))
        model[0].bias_score.copy_(torch.tensor([2.0, -4.0]))
    found = score_statistics(model)
    assert (found["score_mean"], found["score_min"], found["score_max"]) == (2.0, 0.0, 4.0)
    assert found["score_std"] == pytest.approx(2.5**0.5)
    script.set_density(model, 0.5)
    three = found_masks(model)  # of six entries: -3, 2, -4
    script.set_density(model, 1 / 6)
    one = found_masks(model)
    assert overlap(one, three) == overlap(three, one) == 1
    other = {name: ~mask for name, mask in three.items()}
    assert overlap(other, three) == 0
    with torch.no_grad():
        model[0].weight_score[0, 1] = 5.0
    script.set_density(model, 2 / 6)
    assert overlap(found_masks(model), three) == 0.5


def test_tensorboard_shows_levels_and_densities(demo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = demo
    board = EventAccumulator(str(folder / "tensorboard/levels"))
    board.Reload()
    levels = pd.read_csv(folder / "levels.csv")
    for name in ("density", "test_accuracy", "score_std", "dead_units"):
        events = board.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx(levels[name].tolist(), rel=1e-6)
    assert len(board.Scalars("overlap")) == 2
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"valid_accuracy", "density", *json.loads((folder / "layers.json").read_text())} <= tags


def test_shuffles_are_tested_and_written_down(demo):
    folder, _, _ = demo
    table = pd.read_csv(folder / "shuffles.csv")
    kinds = [what for what in SHUFFLES for _ in range(5)]
    assert table["shuffled"].tolist() == kinds
    assert table["number"].tolist() == [1, 2, 3, 4, 5] * 2
    assert table["test_accuracy"].between(0, 1).all()
    assert table["test_loss"].nunique() == 10
    found, means = result(folder), table.groupby("shuffled")["test_accuracy"].mean()
    assert found["shuffled_mask_accuracy"] == means["mask"]
    assert found["shuffled_mask_and_weights_accuracy"] == means["mask+weights"]


# --- tickets --------------------------------------------------------------------------------------


def said(out: str) -> float:
    """The accuracy that --evaluate found, which should be that of the ticket to the last digit."""
    return float(re.search(r"test accuracy .* % \((.*), as the ticket says\)", out)[1])


def test_a_ticket_alone_reproduces_its_accuracy_in_a_fresh_process(demo, tmp_path):
    folder, _, _ = demo
    shutil.copy(folder / "ticket.safetensors", tmp_path / "mine")
    done = subprocess.run(
        [sys.executable, ROOT / "ER_SLT/cifar_main.py", "--evaluate", "mine"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert said(done.stdout) == result(folder)["test_accuracy"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_ticket_of_any_level_and_a_run_folder_can_be_evaluated(demo, capsys):
    folder, _, _ = demo
    levels = pd.read_csv(folder / "levels.csv")["test_accuracy"]
    for path, accuracy in ((folder / "levels/level-1.safetensors", levels[0]), (folder, levels[2])):
        script.main(["--evaluate", str(path)])
        assert said(capsys.readouterr().out) == accuracy


def test_another_accuracy_is_told_from_that_of_the_ticket(demo, capsys, monkeypatch):
    monkeypatch.setitem(script.data.SETS, "digits", few_digits(64, 20))
    script.main(["--evaluate", str(demo[0])])
    told = result(demo[0])["test_accuracy"]
    assert f", but {told!r} is what the ticket says)" in capsys.readouterr().out


def test_a_ticket_is_evaluated_as_it_was_found(demo):
    folder, _, _ = demo
    here = ["--evaluate", str(folder)]
    script.main([*here, "--dataset", "digits", "--width", "4", "--save-every", "3"])
    with pytest.raises(OptionError, match=r"--sparsity: 0.1, but the ticket .* was found with 0.2"):
        script.main([*here, "--sparsity", "0.1"])
    with pytest.raises(
        OptionError, match=r"--initBias: kn-zero-bias, but the ticket .* with kn-non"
    ):
        script.main([*here, "--initBias", "kn-zero-bias"])


COMBINATIONS = [
    *((how, "kaiming", "layer") for how in INITS),
    *(
        ("ortho-nonzero-bias", score_init, ranking)
        for score_init, ranking in itertools.product(SCORE_INITS, RANKINGS)
        if (score_init, ranking) != ("kaiming", "layer")
    ),
]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("how", "score_init", "ranking"), COMBINATIONS)
def test_every_initialisation_and_ranking(run_slt, capsys, how, score_init, ranking):
    flag = {"layer": "--per-layer", "global": "--global"}[ranking]
    argv = ["--initBias", how, "--score-init", score_init]
    if INITS[how][1] not in ("none", "signed"):
        argv += ["--bfac", "0.5"]
    folder = run_slt(*MLP, *argv, flag, "--scale-fan")
    for level, density in enumerate((0.6 / 3**0.5, 0.2), 1):
        found = ticket(folder, level)
        assert used(found, ranking) == asked(found, density, ranking)
        assert is_inside(found)
        # Some images are told apart by chance alone; two epochs are not nothing, either.
        assert found.description["test_accuracy"] > 0.05
    capsys.readouterr()
    script.main(["--evaluate", str(folder)])
    assert said(capsys.readouterr().out) == result(folder)["test_accuracy"]


def test_scale_fan_is_by_the_density_of_the_last_level():
    weights = []
    for more in ([], ["--scale-fan", "--sparsity", "0.1", "--sparsity-start", "0.5"]):
        options = parse(SLTOptions, script.CONFIGS, [*MLP, *more])
        model, requested = script.plan(options, script.data.SHAPES["digits"])
        script.er.attach_er_masks(model, requested, options)
        script.pop_up(model, options)
        weights.append(list(popup_layers(model).values())[1].weight)
    assert torch.allclose(weights[1], weights[0] * 10**0.5)  # and not by that of the mask, 0.5


def test_scores_go_on_from_level_to_level(run_slt, monkeypatch):
    seen, start = [], Trainer._start

    def watch(trainer, *args):
        state = {n: t.clone() for n, t in trainer.model.state_dict().items()}
        start(trainer, *args)
        seen.append(state)

    monkeypatch.setattr(Trainer, "_start", watch)
    folder = run_slt(*MLP, "--save-every", "1", "--valid-split", "0.3", "--save-model")
    begun, selected = seen[0], weights(folder, "levels/level-1.pt")
    last = pd.read_csv(folder / "levels.csv")["epoch"][0] == 2
    scores = [name for name in begun if name.endswith("_score")]
    assert all(torch.equal(begun[name], selected[name]) for name in scores) == last
    assert any(begun[name] != selected[name] for name in begun if name.endswith("keep"))


# --- random masks that are too small --------------------------------------------------------------


def test_layers_that_are_short_are_named_before_training(run_slt, capsys):
    ratio = ["--er-sparse-method", "pyramidal", "--er-init-density", "0.3", "--sparsity", "0.3"]
    folder = run_slt(*MLP, "--epochs", "1", "--levels", "1", *ratio)
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("warning: --sparsity"))
    assert place < next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    inside = {name: int(mask.sum()) for name, mask in ticket(folder).er_masks.items()}
    for name, size in {"hidden.3": 256, "hidden.6": 256, "classifier": 160}.items():
        assert f" {name} {inside[name]} of {round(0.3 * size)}" in lines[place]
    assert "hidden.0" not in lines[place]
    reached = float(lines[place].rpartition("is ")[2])
    kept = sum(used(ticket(folder), "layer").values())
    assert reached == pytest.approx(kept / 49_824, abs=1e-6)
    assert result(folder)["density"] == pytest.approx(reached, abs=1e-6)
    assert reached < 0.3
    run_slt(*MLP, "--epochs", "1", "--levels", "1", *ratio, "--global")
    assert "warning: --sparsity" not in capsys.readouterr().out


# --- the published command, other data ------------------------------------------------------------


def test_the_published_command_finishes(run_slt, monkeypatch):
    monkeypatch.setitem(script.data.SETS, "digits", few_digits(16, 8))
    clock(monkeypatch, dense=2.0, sparse=1.0)  # each thing is tried once
    folder = run_slt(*PUBLISHED, "--dataset", "DIGITS", "--epochs", "1", "--levels", "2")
    assert folder.parts[-3:] == ("digits", "runs-strong-tick-anneal-lr-0.1-2", "seed-2")
    size = (folder / "ticket.safetensors").stat().st_size
    assert size < 4 * 2**20
    levels = pd.read_csv(folder / "levels.csv")
    assert levels["requested"].tolist() == [0.2, 0.2]
    assert levels["density"].tolist() == pytest.approx([0.2, 0.2], abs=1e-6)
    assert (folder / "levels/level-2.pt").exists()


def test_a_small_cifar_in_the_true_format(run_slt, tmp_path, monkeypatch, capsys):
    small = write_cifar10(tmp_path / "data")
    monkeypatch.setitem(script.data.SETS, "cifar10", small.loader)
    where = ["--data", str(tmp_path / "data")]
    folder = run_slt(*MLP, "--dataset", "CIFAR10", *where, "-b", "8", "--valid-split", "0.2")
    script.main(["--evaluate", str(folder), *where])
    assert said(capsys.readouterr().out) == result(folder)["test_accuracy"]
