"""The experiment on tables: masks, levels, resets, what is measured, the program."""

import itertools
import re

import pandas as pd
import pytest
import torch

from startsparse import plots, processes, tabular
from startsparse.errors import OptionError, UserError
from startsparse.masks import masked_weights
from startsparse.tabular import TabularOptions, program, report, tables

TINY = TabularOptions(
    densities=(0.5, 0.3, 0.1), seeds=(1, 2), width=16, epochs=1, final_epochs=2, batch_size=128,
    sparse_compute="off",
)  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return tables.load("breast-cancer")


def changed(**fields):
    return TabularOptions(**{**vars(TINY), **fields})


def masks_of(member):
    return [mask.clone() for _, _, mask in masked_weights(member.model)]


def test_the_published_setting():
    options = TabularOptions()
    assert (options.width, options.optimizer, options.lr, options.batch_size) == (
        256,
        "adam",
        0.01,
        64,
    )
    assert (options.epochs, options.final_epochs, len(options.seeds)) == (10, 20, 5)
    assert options.levels() == [1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005]
    options.starts = (0.3,)  # no network has more
    assert options.levels() == [0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005]


def test_networks_of_a_seed_begin_alike(table):
    dense, sparse, other = (
        tabular.make_member(table, TINY, start, False, False, seed)
        for start, seed in ((1.0, 1), (0.5, 1), (0.5, 2))
    )
    assert sum(p.numel() for p in dense.model.parameters() if p.dim() == 2) == 16 * (
        30 + 16 + 16 + 2
    )
    for (_, w, m), (_, v, n) in zip(masked_weights(dense.model), masked_weights(sparse.model)):
        assert m.all() and torch.equal(w * n, v)
        assert n.float().mean() == pytest.approx(0.5, abs=0.5 / n.numel())
    assert torch.equal(dense.train.features, sparse.train.features)
    assert not torch.equal(dense.train.features, other.train.features)


@pytest.mark.parametrize("method", ["uniform", "ERK", "balanced", "pyramidal"])
def test_any_ratio(table, method):
    member = tabular.make_member(table, changed(er_sparse_method=method), 0.5, False, False, 1)
    masks = masks_of(member)
    kept, all_ = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    assert kept == round(0.5 * all_)
    shares = [m.float().mean().item() for m in masks]
    assert (max(shares) - min(shares) < 0.02) == (method == "uniform")


@pytest.fixture(scope="module")
def outcome(table):
    options = changed(flow_preservation=(False, True), starts=(1.0, 0.3))
    members = tabular.make_members(table, options)
    return members, tabular.run(members, options)


def test_there_is_a_row_for_each_network_and_density(outcome):
    members, rows = outcome
    assert len(members) == 2 * 2 * 2 * 2
    found = list(rows[["start", "reset", "flow", "seed", "requested"]].itertuples(index=False))
    wanted = [
        (start, reset, flow, seed, density)
        for start, levels in ((1.0, (1.0, 0.5, 0.3, 0.1)), (0.3, (0.3, 0.1)))
        for density in levels
        for reset, flow, seed in itertools.product((False, True), (False, True), (1, 2))
    ]
    assert sorted(map(tuple, found)) == sorted(wanted)


def test_densities_are_exact_without_flow_preservation(outcome):
    _, rows = outcome
    weights = 16 * (30 + 16 + 16 + 2)
    plain = rows[~rows["flow"]]
    kept = (plain["density"] * weights).round().astype(int)
    assert kept.tolist() == [round(density * weights) for density in plain["requested"]]
    kept_with_flow = rows[rows["flow"]]
    assert (kept_with_flow["density"] >= kept_with_flow["requested"] - 0.5 / weights).all()
    assert (kept_with_flow[["dead_outputs", "dead_inputs"]] == 0).all(axis=None)
    assert (plain.loc[plain["requested"] < 0.5, "dead_inputs"] > 0).any()


def test_masks_shrink_but_for_repairs(outcome):
    members, _ = outcome
    for member in members:
        masks = member.first_masks
        for high, low in itertools.pairwise(sorted(masks, reverse=True)):
            grown = masks[low] & ~masks[high]
            assert masks[low].sum() < masks[high].sum()
            assert not grown.any() or member.flow
        assert all((w[~m] == 0).all() for _, w, m in masked_weights(member.model))


def test_accuracies_are_those_of_the_parts(outcome, table):
    members, rows = outcome
    last = rows[rows["requested"] == 0.1].reset_index(drop=True)
    for member, row in zip(members, last.itertuples()):
        parts = tables.split(table, member.seed)
        member.model.eval()
        for (features, labels), found in (
            (parts.valid, row.valid_accuracy),
            (parts.test, row.test_accuracy),
        ):
            hits = (member.model(features).argmax(1) == labels).double().mean()
            assert found == pytest.approx(hits.item())
        assert row.majority == pytest.approx(0.63, abs=0.01)


def test_prune_repair_reset(table):
    """One step of each, seen from outside."""
    for reset, flow in itertools.product((False, True), (False, True)):
        member = tabular.make_member(table, TINY, 0.5, reset, flow, 1)
        start = {k: v.clone() for k, v in member.model.state_dict().items()}
        draw = torch.Generator().manual_seed(3)
        for parameter in member.model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=draw))
        for _, weight, mask in masked_weights(member.model):
            weight.data.mul_(mask)
        sizes = torch.cat([w[m].abs() for _, w, m in masked_weights(member.model)])
        trained = {k: v.clone() for k, v in member.model.state_dict().items()}
        tabular.change_masks(member, 0.1, 2)
        lowest = sizes.sort(descending=True).values[round(0.1 * 1024) - 1]
        state = member.model.state_dict()
        for name, _, mask in masked_weights(member.model):
            weight = trained[f"{name}.weight"]
            if not flow:
                assert torch.equal(mask, weight.abs() >= lowest)
            assert mask.any(1).all() or not flow
            # a repaired edge has the initial weight after a reset, and 0 without
            left = weight.where(weight.abs() >= lowest, 0)
            expected = member.initial[f"{name}.weight"] if reset else left
            assert torch.equal(state[f"{name}.weight"], expected * mask)
            expected = start if reset else trained
            assert torch.equal(state[f"{name}.bias"], expected[f"{name}.bias"])


def test_a_start_is_left_as_it_was_drawn(table):
    member = tabular.make_member(table, TINY, 0.5, True, False, 1)
    before = {k: v.clone() for k, v in member.model.state_dict().items()}
    tabular.change_masks(member, 0.5, 0)
    assert all(torch.equal(before[k], v) for k, v in member.model.state_dict().items())


@pytest.mark.parametrize("other", [{"loop": "loop"}, {"sparse_compute": "on"}])
def test_however_it_is_computed_the_table_is_the_same(table, other):
    options = changed(starts=(1.0, 0.5), reset=(True,), optimizer="sgd", lr=0.02)
    rows = [
        tabular.run(tabular.make_members(table, options), options)
        for options in (options, changed(**{**vars(options), **other}))
    ]
    pd.testing.assert_frame_equal(*rows, atol=0.011)  # one row of the test set, at most
    assert rows[0]["density"].tolist() == rows[1]["density"].tolist()


def test_connected():
    def masks(*shapes):
        return [torch.ones(*shape, dtype=torch.bool) for shape in shapes]

    whole = masks((3, 2), (4, 3), (2, 4))
    assert tabular.connected(whole)
    for layer in range(3):
        cut = [mask.clone() for mask in whole]
        cut[layer][:] = False
        assert not tabular.connected(cut)
    apart = masks((3, 2), (4, 3), (2, 4))
    apart[0][1:] = False  # only unit 0 hears the input
    apart[1][:, 0] = False  # and nobody hears unit 0
    assert all(mask.any() for mask in apart)
    assert not tabular.connected(apart)
    apart[1][2, 0] = True
    assert tabular.connected(apart)


def rows(accuracies, **fields):
    base = {
        "start": 0.5, "reset": True, "flow": False, "requested": 0.1, "density": 0.1,
        "majority": 0.6, "cut": False, "empty_layers": "",
    }  # fmt: skip
    return pd.DataFrame(
        [{**base, "seed": i, "test_accuracy": a, **fields} for i, a in enumerate(accuracies)]
    )


def test_the_table_says_mean_interval_density_and_cuts():
    results = pd.concat([
        rows([0.90, 0.94]),
        rows([0.9, 0.6], start=1.0, requested=0.005, density=0.0105),
        rows([0.6], start=1.0, requested=0.005, density=0.0105, cut=True, empty_layers="hidden.3"),
    ])  # fmt: skip
    lines = report.markdown(results).splitlines()
    assert lines[0] == "| start | reset | flow | 0.1 | 0.005 |"
    # Student's t for two runs: 12.7062 standard deviations / sqrt(2)
    assert lines[2] == "| ER 0.5 | yes | no | 92.0 ± 25.4 |  |"
    assert lines[3] == "| dense | yes | no |  | 70.0 ± 43.0 (at 0.0105, 1 of 3 cut) |"
    assert report.collapses(results) == [
        "dense, reset, flow preservation off, density 0.005: 2 of 3 networks are at the majority "
        "class or below, 1 without a path from input to output; empty layers: hidden.3"
    ]


def test_pictures(outcome, tmp_path, table):
    members, found = outcome
    figure = report.accuracy_plot(found)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["no reset", "reset", "no reset, flow preserved", "reset, flow preserved"]
    means = found[~found["flow"] & ~found["reset"] & (found["start"] == 1)]
    wanted = 100 * means.groupby("requested")["test_accuracy"].mean().sort_index(ascending=False)
    drawn = figure.axes[0].containers[0].lines[0].get_ydata()
    assert drawn.tolist() == pytest.approx(wanted.tolist())
    figure = report.mask_picture(members[0].first_masks, table.feature_names)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "mean radius"
    assert figure.axes[0].images[0].get_array().shape == (30, 16)
    plots.save(figure, tmp_path / "a/b.png")
    assert (tmp_path / "a/b.png").read_bytes().startswith(b"\x89PNG")


ARGV = [
    "--seeds", "1", "2", "--width", "8", "--epochs", "1", "--final-epochs", "1",
    "--densities", "0.2", "--reset", "False", "True", "--sparse-compute", "on",
]  # fmt: skip


def test_the_program(tmp_path, capsys):
    wine = tmp_path / "wine.csv"
    draw = torch.Generator().manual_seed(0)
    lines = torch.randn(60, 3, generator=draw).tolist()
    wine.write_text("a,b,c,kind\n" + "\n".join(f"{a},{b},{c},{int(a > b)}" for a, b, c in lines))
    program.main(
        [*ARGV, "--tables", "breast-cancer", str(wine), "--label", "kind",
         "--result-dir", str(tmp_path / "out")]
    )  # fmt: skip
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert len(results) == 2 * 2 * 2 * (3 + 2)  # tables, resets, seeds; densities of both starts
    assert set(results["table"]) == {"breast-cancer", str(wine)}
    markdown = (tmp_path / "out/table.md").read_text()
    assert markdown in capsys.readouterr().out
    assert re.search(r"^\| breast-cancer \| ER 0.5 \| no \| no \|  \| \d\d.\d ± ", markdown, re.M)
    assert (tmp_path / "out/plot.png").stat().st_size > 5000


def test_results_of_other_options_are_not_overwritten(tmp_path, monkeypatch):
    assert "results" not in TabularOptions().result_dir  # where the committed ones are
    monkeypatch.setattr(program.experiment, "run", lambda *_: rows([0.9, 0.8]).assign(seed=[1, 2]))
    where = ["--result-dir", str(tmp_path / "out")]
    program.main(where)
    first = (tmp_path / "out/results.csv").read_bytes()
    monkeypatch.setattr(program.experiment, "run", lambda *_: rows([0.7, 0.6]).assign(seed=[1, 2]))
    with pytest.raises(OptionError, match=r"^--result-dir: .*results\.csv is of a run with --lr "):
        program.main([*where, "--lr", "0.1"])
    assert (tmp_path / "out/results.csv").read_bytes() == first
    program.main([*where, "--data", str(tmp_path)])  # where the data lies changes nothing
    assert (tmp_path / "out/results.csv").read_bytes() != first
    assert str(tmp_path) not in (tmp_path / "out/options.yaml").read_text()
    (tmp_path / "out/options.yaml").unlink()
    with pytest.raises(OptionError, match=r"results\.csv is of unknown origin"):
        program.main(where)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(tables, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(OptionError, match=r"^--result-dir: cannot write .*file"):
        program.main(["--result-dir", str(blocked)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tables", "iris"], "--tables: 'iris' is none of"),
        (["--seeds"], "--seeds: needs at least one value"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 is named twice"),
        (["--starts", "0.5", ".5"], "--starts: 0.5 is named twice"),
        (["--starts", "1.5"], "--starts: 1.5 should be above 0 and at most 1"),
        (["--densities", "0"], "--densities: 0.0 should be above 0 and at most 1"),
        (["--lr", "0"], "--lr: 0.0 should be above 0"),
        (["--batch-size", "1"], "--batch-size: 1 should be at least 2"),
        (["--state", "XX", "--tables", "ACSIncome"], "--state: 'XX' is none of"),
        (["--learning-rate", "1"], "--learning-rate: unknown option"),
    ],
)
def test_bad_options(flags, message, tmp_path):
    with pytest.raises(OptionError, match=f"^{message}"):
        program.main([*flags, "--result-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.csv: cannot be read"):
        program.main(["--tables", "none.csv", "--label", "a", "--result-dir", str(tmp_path)])


def test_the_device_of_this_process(monkeypatch):
    """Without GPUs, and as if there were two."""

    def device(name):
        return str(TabularOptions(device=name).torch_device())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device("auto") == device("cpu") == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"^--device: there is no {name} here; take cpu$"):
            device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (device("auto"), device("cuda"), device("cpu")) == ("cuda:0", "cuda:0", "cpu")
    assert device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="^--device: there is no GPU 2 here; name one of 0 to 1$"):
        device("cuda:2")
    for rank, expected in ((1, "cuda:1"), (2, "cuda:0")):  # of torchrun
        monkeypatch.setattr(processes._world, "local_rank", rank)
        assert (device("auto"), device("cuda:1")) == (expected, "cuda:1")
