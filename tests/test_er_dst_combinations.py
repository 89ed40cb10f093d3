"""Every combination of methods, initial masks, growth and switches on a tiny network."""

import itertools
import json

import pytest
import torch
from dst_runs import (
    CPU,
    WEIGHTS,
    begin,
    counts,
    dead_units,
    masks,
    options,
    some_data,
    train,
)

from ER_DST import main as script
from ER_DST.initializers import INITS
from ER_DST.options import SPARSE_INITS
from ER_DST.topology import GROWTH, METHODS
from ER_DST.updates import phase
from startsparse import checkpoint, flops, ratios, training
from startsparse.masks import masked_weights, sparse_layers
from startsparse.ratios import layer_densities

JSON = {"hidden.0": 0.2, "hidden.3": 0.4, "hidden.6": 0.4, "classifier": 0.8}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folders with the ratio that each pruner finds, as a run leaves it for its continuation."""
    folders = {}
    for method in SPARSE_INITS:
        folders[method] = tmp_path_factory.mktemp(method)
        (folders[method] / "layers.json").write_text(json.dumps(JSON))
        asked = combined(folders, method)
        if asked.searches:
            _, requested, spent = script.network(asked, some_data(), CPU)
            (folders[method] / "ratios.json").write_text(json.dumps(requested))
            (folders[method] / "search.json").write_text(json.dumps({"flops": spent}))
    return folders


def combined(folders, sparse_init, **values):
    file = f"{folders[sparse_init]}/layers.json" if sparse_init == "network" else ""
    return options(
        er_sparse_method=sparse_init,
        er_sparsity_file=file,
        er_sampling="exact",
        imp_epochs=1,
        final_density=0.25,
        **values,
    )


@pytest.fixture
def quick(monkeypatch):
    """What does not differ between combinations is done once: no checkpoints, FLOPs counted."""
    found = flops.forward_flops(
        script.plan(options(), some_data().shape)[0], torch.zeros(1, 1, 4, 4)
    )
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    monkeypatch.setattr(flops, "forward_flops", lambda *_: found)


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_trains(found, quick, method, sparse_init):
    for growth, flow, within in itertools.product(GROWTH, (False, True), (False, True)):
        asked = combined(
            found,
            sparse_init,
            method=method,
            growth=growth,
            flow_preservation=flow,
            grow_within_init=within,
            epochs=1,
            update_frequency=3,
        )
        trainer = train(found[sparse_init], asked, check_update)
        assert [row["step"] for row in trainer.tables["topology"]] == [3]
        last, layers = counts(trainer.model), sparse_layers(trainer.model)
        first = {name: int(layers[name].initial_mask.sum()) for name in last}
        assert flow or sum(first.values()) == WEIGHTS // 2
        if flow:
            assert sum(last.values()) >= asked.requested * WEIGHTS
        elif method == "DST":
            assert last == first
        else:
            assert sum(last.values()) == WEIGHTS // 4
        for _, weight, mask in masked_weights(trainer.model):
            assert (weight[~mask] == 0).all()
            assert weight.isfinite().all()


def check_update(trainer, _, before):
    """What every update must leave behind."""
    row, asked = trainer.tables["topology"][-1], trainer.options
    assert row["density"] == sum(counts(trainer.model).values()) / WEIGHTS
    assert row["dead_units"] == dead_units(trainer.model)
    if asked.flow_preservation:
        assert row["dead_units"] == 0
    elif asked.grow_within_init:
        assert row["inside_initial"] == 1
    for name, weight, mask in masked_weights(trainer.model):
        assert (weight[~mask] == 0).all()
        assert (weight[mask & ~before[name]] == 0).all()


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
@pytest.mark.parametrize("flow", [False, True])
def test_a_mask_that_is_not_pruned_stays_as_drawn_whatever_the_method(
    found, quick, sparse_init, flow
):
    drawn = None
    for method, growth, within in itertools.product(METHODS, GROWTH, (False, True)):
        asked = combined(
            found,
            sparse_init,
            method=method,
            growth=growth,
            grow_within_init=within,
            flow_preservation=flow,
            is_prune=False,
            epochs=1,
        )
        trainer, whole = begin(found[sparse_init], asked)
        drawn = drawn or masks(trainer.model)
        assert all(torch.equal(m, drawn[n]) for n, m in masks(trainer.model).items())
        assert not whole.each_step
        assert (asked.requested, asked.prunes, asked.grows) == (0.5, False, False)
        assert whole == phase(combined(found, sparse_init, is_prune=False, epochs=1), 4)
    trainer.run_phases([whole])  # the phases are equal, so one training is every training
    assert all(torch.equal(m, drawn[n]) for n, m in masks(trainer.model).items())
    assert "topology" not in trainer.tables
    assert not (flow and dead_units(trainer.model))
    assert not any("initial_mask" in name for name in trainer.model.state_dict())


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_of_every_mask(found, init, sparse_init):
    seen = []
    for repaired in (False, True):
        asked = combined(found, sparse_init, init=init, ortho_repair=repaired)
        model, requested, _ = script.network(asked, some_data(), CPU, found[sparse_init])
        assert sum(counts(model).values()) == WEIGHTS // 2
        assert list(requested) == list(sparse_layers(model))
        for _, weight, mask in masked_weights(model):
            assert (weight[~mask] == 0).all()
            assert weight.isfinite().all()
        seen.append((masks(model), model.state_dict()))
    assert all(torch.equal(mask, seen[1][0][name]) for name, mask in seen[0][0].items())
    assert any(not torch.equal(value, seen[1][1][name]) for name, value in seen[0][1].items())


@pytest.mark.parametrize("flow", [False, True])
def test_initial_weights_are_scaled_by_the_densities_that_came_out(flow):
    asked = options(init="bimodal", er_sparse_init=0.2, flow_preservation=flow, is_prune=False)
    model, *_ = script.network(asked, some_data(), CPU)
    assert (dead_units(model) == 0) == flow
    for _, weight, mask in masked_weights(model):
        std = (len(weight) / int(mask.sum())) ** 0.5  # 1 / sqrt(fan_in * density)
        assert weight[mask].abs().tolist() == pytest.approx([std] * int(mask.sum()))


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
def test_the_mask_has_the_layer_densities_of_its_name(found, sparse_init):
    asked = combined(found, sparse_init)
    model, requested, _ = script.network(asked, some_data(), CPU, found[sparse_init])
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    realised = {name: count / sizes[name] for name, count in counts(model).items()}
    for name, density in requested.items():
        assert realised[name] * sizes[name] == pytest.approx(density * sizes[name], abs=1)
    if sparse_init in ratios.PROFILES or sparse_init == "pyramidal":
        shapes = [layer.weight.shape for layer in sparse_layers(model).values()]
        assert list(requested.values()) == layer_densities(sparse_init, shapes, 0.5).tolist()
    elif sparse_init == "network":
        shares = {name: density / JSON[name] for name, density in requested.items()}
        assert shares["hidden.0"] == pytest.approx(shares["hidden.3"]) == shares["hidden.6"]
        assert requested["classifier"] == 1.0


def test_snip_keeps_its_mask_and_er_snip_draws_its_ratio_anew(found):
    own, drawn = (
        script.network(combined(found, method), some_data(), CPU)[0]
        for method in ("snip", "ER_snip")
    )
    assert counts(own) == counts(drawn)
    assert any((mask != masks(drawn)[name]).any() for name, mask in masks(own).items())
    # SNIP looks at the weights and at a batch: the largest |w dL/dw| of the dense network.
    dense, *_ = script.network(options(sparse=False), some_data(), CPU)
    images, labels = next(iter(some_data().train.epoch(0)))
    dense.train()
    torch.nn.functional.cross_entropy(dense(images), labels).backward()
    slopes = {n: (m.weight * m.weight.grad).abs().detach() for n, m in sparse_layers(dense).items()}
    lowest = min(slopes[name][mask].min() for name, mask in masks(own).items())
    highest = max(slopes[name][~mask].max() for name, mask in masks(own).items())
    assert highest <= lowest * (1 + 1e-4)


def test_er_imp_trains_from_the_start_before_each_pruning(monkeypatch):
    begun, train_epoch = [], training.train_epoch

    def watch(model, *args, **kwargs):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        begun.append((kwargs["epoch"], state))
        train_epoch(model, *args, **kwargs)

    monkeypatch.setattr(training, "train_epoch", watch)
    asked = options(er_sparse_method="ER_imp", imp_epochs=2, final_density=0.2)
    model, requested, spent = script.network(asked, some_data(), CPU)
    dense, *_ = script.network(options(sparse=False), some_data(), CPU)
    first = dense.state_dict()
    assert [epoch for epoch, _ in begun] == list(range(8))  # 4 levels, each order of data once
    kept, by_hand = [], 0
    for _, state in begun[::2]:
        masks = {n.removesuffix("_mask"): m for n, m in state.items() if n.endswith("weight_mask")}
        kept.append(sum(int(mask.sum()) for mask in masks.values()))
        first_layer = int(masks["hidden.0.weight"].sum())
        by_hand += 2 * 64 * 2 * (3 * kept[-1] - first_layer)  # epochs, images, a multiply-add
        for name, value in first.items():
            assert torch.equal(state[name], value * masks.get(name, 1)), name
    assert spent == pytest.approx(by_hand, rel=1e-12)
    assert kept == [WEIGHTS, *(round(d * WEIGHTS) for d in (0.8, 0.64, 0.512))]
    # The search leaves no trace in the network itself but its ratio.
    for name, weight, mask in masked_weights(model):
        assert torch.equal(weight, first[f"{name}.weight"] * mask)
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    total = sum(requested[name] * size for name, size in sizes.items())
    assert total == pytest.approx(WEIGHTS / 2)
