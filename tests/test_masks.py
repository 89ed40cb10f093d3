"""Masks: counts, independence, where they live, and that weights stay inside them."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from script_runs import newest
from torch import nn

from ER_DST import main as dst_main
from ER_SLT import main as slt_main
from startsparse import masks
from startsparse.masks import (
    attach_masks,
    density_table,
    draw_masks,
    keep_inside,
    mask_gradients,
    masked_weights,
    round_to_total,
)
from STR import main as str_main


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


@pytest.fixture
def sparse():
    model = tiny()
    model(torch.zeros(2, 3, 9, 9))
    shapes = {name: layer.weight.shape for name, layer in masks.sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.5, 0.3, 0.2], seed=3, sampling="exact"))
    return model


layer_sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)


@given(layer_sizes, st.floats(0.001, 0.9), st.integers(0, 99))
def test_exact_sampling_has_the_exact_total(shapes, p, seed):
    named = {f"l{i}": s for i, s in enumerate(shapes)}
    drawn = draw_masks(named, [p] * len(shapes), seed, "exact")
    sizes = [math.prod(s) for s in shapes]
    assert sum(int(m.sum()) for m in drawn.values()) == round(p * sum(sizes))
    for mask, size in zip(drawn.values(), sizes):
        assert abs(int(mask.sum()) - p * size) < 1


@given(layer_sizes, st.floats(0.001, 0.9), st.integers(0, 9999))
def test_bernoulli_total_is_within_four_sigma(shapes, p, seed):
    drawn = draw_masks(
        {f"l{i}": s for i, s in enumerate(shapes)}, [p] * len(shapes), seed, "bernoulli"
    )
    total = sum(mask.numel() for mask in drawn.values())
    kept = sum(int(mask.sum()) for mask in drawn.values())
    assert abs(kept - p * total) <= 4 * math.sqrt(p * (1 - p) * total) + 1


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_bernoulli_mean_and_spread(p):
    counts = [
        int(draw_masks({"w": (200, 500)}, [p], seed, "bernoulli")["w"].sum()) for seed in range(40)
    ]
    sigma = math.sqrt(p * (1 - p) * 100_000)
    assert abs(np.mean(counts) - p * 100_000) < 4 * sigma / math.sqrt(40)
    assert 0.6 * sigma < np.std(counts) < 1.5 * sigma  # exact sampling would not spread


@pytest.mark.parametrize("sampling", masks.SAMPLINGS)
def test_density_zero_and_one(sampling):
    drawn = draw_masks({"a": (30, 30), "b": (30, 30)}, [0.0, 1.0], 1, sampling)
    assert drawn["a"].sum() == 0
    assert drawn["b"].all()


@pytest.mark.parametrize("sampling", masks.SAMPLINGS)
def test_a_layers_draw_depends_on_seed_and_name_only(sampling):
    one = draw_masks({"a": (50, 50), "b": (50, 50)}, [0.3, 0.3], 1, sampling)
    alone = draw_masks({"b": (50, 50)}, [0.3], 1, sampling)
    other = draw_masks({"b": (50, 50)}, [0.3], 2, sampling)
    assert torch.equal(one["b"], alone["b"])
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(alone["b"], other["b"])


def test_every_position_is_equally_likely():
    total = sum(draw_masks({"w": (4, 5)}, [0.4], s, "exact")["w"].double() for s in range(2000))
    assert (total - 800).abs().max() < 5 * math.sqrt(2000 * 0.4 * 0.6)


@given(st.lists(st.floats(0, 50), min_size=1, max_size=12))
def test_round_to_total(expected):
    counts = round_to_total(expected)
    assert counts.sum() == round(sum(expected))
    assert all(math.floor(e) <= c <= math.floor(e) + 1 for c, e in zip(counts, expected))


def test_weights_start_inside_and_names_are_in_forward_order(sparse):
    names = [name for name, _, _ in masked_weights(sparse)]
    assert names == ["0", "3", "5"]
    for _, weight, mask in masked_weights(sparse):
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    ],
)
def test_steps_with_masked_gradients_stay_inside(sparse, optimizer):
    optimizer = optimizer(sparse.parameters())
    pairs = [(w, m) for _, w, m in masked_weights(sparse)]
    before = [w.clone() for w, _ in pairs]
    for step in range(5):
        x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        sparse(x).square().sum().backward()
        mask_gradients([w.grad for w, _ in pairs], [m for _, m in pairs])
        optimizer.step()
        optimizer.zero_grad()
        for weight, mask in pairs:
            assert (weight[~mask] == 0).all()
            for value in optimizer.state[weight].values():
                if value is not None and value.shape == weight.shape:
                    assert (value[~mask] == 0).all()
    assert all((w != b)[m].any() for (w, m), b in zip(pairs, before))


def test_keep_inside_after_a_mask_shrinks(sparse):
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9)
    sparse(torch.randn(4, 3, 9, 9)).square().sum().backward()
    optimizer.step()
    for _, _, mask in masked_weights(sparse):
        mask.logical_and_(torch.rand(mask.shape) < 0.5)
    keep_inside(sparse, optimizer)
    for _, weight, mask in masked_weights(sparse):
        assert (weight[~mask] == 0).all()
        assert (optimizer.state[weight]["momentum_buffer"][~mask] == 0).all()


def same_masks(one, other):
    pairs = list(zip(masked_weights(one), masked_weights(other)))
    assert len(pairs) == 3
    return all(torch.equal(a[2], b[2]) for a, b in pairs)


def test_masks_survive_deepcopy_save_and_load(sparse, tmp_path):
    clone = copy.deepcopy(sparse)
    assert same_masks(sparse, clone)
    assert next(masked_weights(clone))[2] is not next(masked_weights(sparse))[2]

    torch.save(sparse.state_dict(), tmp_path / "x.pt")
    for _, _, mask in masked_weights(clone):
        mask.zero_()
    held = [mask for _, _, mask in masked_weights(clone)]
    clone.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert same_masks(sparse, clone)
    # Loaded in place: whoever holds a mask sees the change.
    assert all(a is b for a, (_, _, b) in zip(held, masked_weights(clone)))


def test_masks_follow_to_and_memory_format(sparse):
    clone = copy.deepcopy(sparse).to(torch.float64).to(memory_format=torch.channels_last)
    assert same_masks(sparse, clone)
    for _, weight, mask in masked_weights(clone):
        assert mask.dtype == torch.bool
        assert mask.stride() == weight.stride()
    meta = copy.deepcopy(sparse).to("meta")
    assert all(mask.device.type == "meta" for _, _, mask in masked_weights(meta))


def test_masks_are_replicated_by_data_parallel(sparse):
    # What DataParallel copies per module and then fills with the device's own parameters/buffers.
    replicas = [module._replicate_for_data_parallel() for module in sparse.modules()]
    assert sum("weight_mask" in replica._buffers for replica in replicas) == 3
    assert torch.equal(
        nn.DataParallel(sparse)(torch.ones(2, 3, 9, 9)), sparse(torch.ones(2, 3, 9, 9))
    )


@pytest.mark.gpu(2)
def test_masks_are_on_every_gpu(sparse):
    for replica in nn.parallel.replicate(sparse.cuda(0), [0, 1]):
        assert same_masks(copy.deepcopy(sparse).cpu(), replica.cpu())


def test_density_table_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Flatten(), nn.Linear(3, 2))
    attach_masks(model, {"0": torch.tensor([[1, 0], [1, 0], [0, 0]]).bool().view(3, 2, 1, 1)})
    table = density_table(model, {"0": 0.5}).set_index("layer")
    assert table.loc["0"].to_dict() == {
        "shape": "3x2x1x1",
        "weights": 6,
        "requested": 0.5,
        "kept": 2,
        "density": pytest.approx(1 / 3),
        "dead_outputs": 1,
        "dead_inputs": 1,
    }
    assert table.loc["2", "density"] == 1
    assert table.loc["total", "kept"] == 8
    assert table.loc["total", "requested"] == pytest.approx((3 + 6) / 12)
    lines = masks.warnings(table.reset_index())
    assert lines == [
        "units without an incoming edge: 0 1",
        "units without an outgoing edge: 0 1",
    ]


def test_a_layer_that_expects_less_than_one_weight_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach_masks(model, {"1": torch.zeros(4, 4, dtype=torch.bool)})
    lines = masks.warnings(density_table(model, {"0": 1.0, "1": 0.01}))
    assert len(lines) == 1
    assert lines[0].startswith("1: 0.16 weights expected, 0 kept of 16")


def layers_with(*counts):
    """Linear layers of 100 weights, masked but for the last, with so many in their masks."""
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(len(counts) + 1)))
    kept = {str(i): (torch.arange(100) < n).view(10, 10) for i, n in enumerate(counts)}
    attach_masks(model, kept)
    return model


@pytest.mark.parametrize(
    ("counts", "requested", "said"),
    [
        ((50, 50), (0.5, 0.5, 1), ""),
        ((60, 40), (0.5, 0.5, 1), ""),  # of all weights it is none
        ((51, 51), (0.5, 0.5, 1), ""),  # 2 of 200
        ((52, 51), (0.5, 0.5, 1), "1.5 % more weights than density 0.6667 asks for; 0 +4.0 %"),
        ((50, 44), (0.5, 0.5, 1), "3.0 % fewer weights than density 0.6667 asks for; 1 -12.0 %"),
        ((9, 0), (0.1, 0.02, 1), "2.7 % fewer weights than density 0.3733 asks for; 1 -100.0 %"),
        ((0, 0), (0.0, 0.0, 1), ""),
    ],
)
def test_a_density_that_is_missed_by_more_than_a_hundredth_is_said(counts, requested, said):
    asked = {str(i): density for i, density in enumerate(requested)}
    assert masks.deviation(layers_with(*counts), asked) == (said and f"the mask has {said}")


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.floats(0.02, 1),
    st.sampled_from(masks.SAMPLINGS),
    st.integers(0, 99),
)
def test_what_is_said_of_a_draw_is_what_was_drawn(widths, density, sampling, seed):
    model = nn.Sequential(*(nn.Linear(20, width) for width in widths))
    shapes = {str(i): (width, 20) for i, width in enumerate(widths)}
    attach_masks(model, draw_masks(shapes, [density] * len(widths), seed, sampling))
    said = masks.deviation(model, dict.fromkeys(shapes, density))
    total = density_table(model).iloc[-1]
    missed = total["kept"] / (density * total["weights"]) - 1
    assert bool(said) == (abs(missed) > 0.01 + 1e-9)
    if sampling == "exact":
        assert abs(total["kept"] - density * total["weights"]) <= 0.5 + 1e-9


def main_of(script, tmp_path, *argv):
    """A run of a small network on digits; its folder."""
    folders = ["--log-dir", f"{tmp_path}/runs", "--result-dir", f"{tmp_path}"]
    small = ["--width", "4", "--epochs", "1", "--batch-size", "256"]
    own = {
        "STR": [str_main.main, "--arch", "mlp", "--er-sparse-init", "0.05"],
        "ER_DST": [dst_main.main, "--sparse", "--model", "mlp", "--init-density", "0.05"],
        "ER_SLT": [
            *(slt_main.main, "--model", "mlp", "--dataset", "digits", "--er-init-density", "0.05"),
            *("--sparsity", "0.02", "--levels", "1"),
        ],
    }
    own["ER_DST"] += [] if "--is-prune" in argv else ["--final-density", "0.02"]
    main, *flags = own[script]
    main([*flags, *small, *folders, *argv])
    return newest(tmp_path)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("script", ["STR", "ER_DST", "ER_SLT"])
def test_every_script_says_how_far_the_first_mask_is_off(script, tmp_path, capsys):
    """About 620 of 12,400 weights are drawn: give or take 4 %."""
    name = "random_mask.csv" if script == "ER_SLT" else "density.csv"
    drawn = []
    for seed in (1, 2, 3):
        static = ["--is-prune", "False"] if script == "ER_DST" else []
        main_of(script, tmp_path / str(seed), "--seed", str(seed), *static)
        said = [line for line in capsys.readouterr().out.splitlines() if "er-sampling" in line]
        total = pd.read_csv(newest(tmp_path / str(seed)) / name).iloc[-1]
        missed = 100 * (total["density"] / total["requested"] - 1)
        drawn.append(abs(missed) > 1)
        assert len(said) == drawn[-1]
        if said:
            more = "more" if missed > 0 else "fewer"
            start = f"warning: the mask has {abs(missed):.1f} % {more} weights than density 0.05 "
            assert said[0].startswith(start)
            assert said[0].endswith("; --er-sampling exact draws as many as asked for")
    assert any(drawn)
    main_of(script, tmp_path / "exact", "--er-sampling", "exact")
    assert "the mask has" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_of_a_mask_that_was_pruned_nothing_is_said_when_its_run_goes_on(tmp_path, capsys):
    folder = main_of("ER_DST", tmp_path, "--er-sampling", "exact")
    (folder / "summary.json").unlink()
    dst_main.main(["--resume", str(folder), "--result-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "resumed at epoch 2" in said
    assert "the mask has" not in said
