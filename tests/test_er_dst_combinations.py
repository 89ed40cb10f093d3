"""Combinations of all options on a tiny network: five in full, any three of eight, all networks."""

import itertools
import json

import pytest
import torch
from dst_runs import (
    CPU,
    STEPS,
    WEIGHTS,
    begin,
    counts,
    dead_units,
    masks,
    options,
    random_data,
    some_data,
    train,
)

from ER_DST import main as script
from ER_DST.dynamic import phase
from ER_DST.initializers import INITS
from ER_DST.options import FLOW, SPARSE_INITS
from ER_DST.topology import GROWTH, METHODS
from startsparse import checkpoint, flops, ratios, training
from startsparse.data import SHAPES
from startsparse.masks import masked_weights, sparse_layers
from startsparse.method import PLAIN
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
    monkeypatch.setattr(checkpoint, "save_by_rank_0", lambda *_: None)
    monkeypatch.setattr(flops, "forward_flops", lambda *_: found)


# What a run begins with and learns by, dealt out to the combinations of the rest.
# Any len(INITS) in a row have every initialisation, and of the other two pairs in turn.
PAIRS = list(itertools.product(("sgd", "adam"), (False, True)))
BEGINNINGS = [
    {"init": init, "ortho_repair": ortho, "optimizer": optimizer}
    for turn in range(len(PAIRS))
    for number, init in enumerate(INITS, start=turn * (len(INITS) + 1))
    for optimizer, ortho in [PAIRS[number % len(PAIRS)]]
]


def combinations(method, sparse_init):
    """Options of all runs of a method and an initial mask."""
    start = 3 * list(METHODS).index(method) + SPARSE_INITS.index(sparse_init)
    for number, (growth, flow, within) in enumerate(
        itertools.product(GROWTH, ("False", "always"), (False, True))
    ):
        own = {"growth": growth, "flow_preservation": flow, "grow_within_init": within}
        yield own | BEGINNINGS[(start + number) % len(BEGINNINGS)]


def test_any_three_values_are_trained_together():
    trained = [
        {"method": method, "sparse_init": sparse_init, **own}
        for method, sparse_init in itertools.product(METHODS, SPARSE_INITS)
        for own in combinations(method, sparse_init)
    ]
    values = {name: {row[name] for row in trained} for name in trained[0]}
    assert [len(v) for v in values.values()] == [5, len(SPARSE_INITS), 3, 2, 2, len(INITS), 2, 2]
    for names in itertools.combinations(values, 3):
        met = {tuple(row[name] for name in names) for row in trained}
        assert met == set(itertools.product(*(values[name] for name in names)))


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_trains(found, quick, method, sparse_init):
    for own in combinations(method, sparse_init):
        asked = combined(found, sparse_init, method=method, epochs=1, update_frequency=3, **own)
        flow = asked.flow_preservation == "always"
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
    if asked.flow_preservation == "always":
        assert row["dead_units"] == 0
    elif asked.grow_within_init:
        assert row["inside_initial"] == 1
    for name, weight, mask in masked_weights(trainer.model):
        assert (weight[~mask] == 0).all()
        assert (weight[mask & ~before[name]] == 0).all()


@pytest.mark.parametrize("sparse_init", SPARSE_INITS)
@pytest.mark.parametrize("flow", FLOW)
def test_a_mask_that_is_not_pruned_stays_as_drawn_whatever_the_method(
    found, quick, sparse_init, flow
):
    number, drawn, within = SPARSE_INITS.index(sparse_init), None, (False, True)
    static = {"flow_preservation": flow, "is_prune": False, "epochs": 1}
    static |= BEGINNINGS[(3 * number + FLOW.index(flow)) % len(BEGINNINGS)]
    whole = phase(combined(found, sparse_init, **static), STEPS)
    assert whole.method is PLAIN
    for method, growth, inside in itertools.product(METHODS, GROWTH, within):
        own = {"method": method, "growth": growth, "grow_within_init": inside}
        asked = combined(found, sparse_init, **static, **own)
        assert phase(asked, STEPS) == whole
        assert (asked.requested, asked.prunes, asked.grows) == (0.5, False, False)
    # The phases are equal, so one training is every training; networks, for values of each option.
    for method, growth, inside in zip(METHODS, itertools.cycle(GROWTH), itertools.cycle(within)):
        own = {"method": method, "growth": growth, "grow_within_init": inside}
        asked = combined(found, sparse_init, **static, **own)
        trainer, _ = begin(found[sparse_init], asked)
        drawn = drawn or masks(trainer.model)
        assert all(torch.equal(m, drawn[n]) for n, m in masks(trainer.model).items())
    trainer.run_phases([whole])
    assert all(torch.equal(m, drawn[n]) for n, m in masks(trainer.model).items())
    assert "topology" not in trainer.tables
    assert flow == "False" or not dead_units(trainer.model)
    assert not any("initial_mask" in name for name in trainer.model.state_dict())


NETWORKS = ("vgg16", "vgg19", "resnet18", "resnet20", "resnet34", "resnet50", "mlp")
IMAGES = ("cifar10", "cifar100", "tiny-imagenet", "mnist", "digits")


@pytest.mark.parametrize("number", range(len(NETWORKS) * len(IMAGES)))
def test_every_network_trains_on_examples_like_every_set(tmp_path, monkeypatch, number):
    """Narrow ones, for two steps with an update between, with masks and methods in turn."""
    monkeypatch.setattr(checkpoint, "save_by_rank_0", lambda *_: None)
    own = [name for name in SPARSE_INITS if name != "network"]
    arch, images = NETWORKS[number % len(NETWORKS)], IMAGES[number % len(IMAGES)]
    asked = options(
        arch=arch,
        width=4,
        set=images,
        er_sparse_method=own[number % len(own)],
        imp_epochs=1,
        method=list(METHODS)[number // len(NETWORKS)],
        final_density=0.25,
        growth=list(GROWTH)[number % 3],
        flow_preservation=("False", "always")[number % 2],
        epochs=1,
        update_frequency=1,
    )
    shape = SHAPES[images]
    trainer = train(tmp_path, asked, dataset=random_data(shape, split=[8, 2, 2], batch_size=4))
    row = trainer.tables["topology"][-1]
    assert row["step"] == 1
    assert row["dropped"] > 0
    assert asked.flow_preservation == "False" or not row["dead_units"]
    assert 0.2 < row["density"] < 0.6
    for _, weight, mask in masked_weights(trainer.model):
        assert (weight[~mask] == 0).all()
        assert weight.isfinite().all()
    assert trainer.model(torch.zeros(2, *shape.input[1:])).shape == (2, shape.classes)


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


@pytest.mark.parametrize("flow", FLOW)
def test_initial_weights_are_scaled_by_the_densities_that_came_out(flow):
    asked = options(init="bimodal", er_sparse_init=0.2, flow_preservation=flow, is_prune=False)
    model, *_ = script.network(asked, some_data(), CPU)
    assert (dead_units(model) == 0) == (flow != "False")
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

    def watch(learner, *args, **kwargs):
        state = {name: value.clone() for name, value in learner.model.state_dict().items()}
        begun.append((kwargs["epoch"], state))
        train_epoch(learner, *args, **kwargs)

    monkeypatch.setattr(training, "train_epoch", watch)
    asked = options(er_sparse_method="ER_imp", imp_epochs=2, final_density=0.2)
    model, requested, spent = script.network(asked, some_data(), CPU)
    dense, *_ = script.network(options(sparse=False), some_data(), CPU)
    first = dense.state_dict()
    assert [epoch for epoch, _ in begun] == list(range(6))  # 3 levels, each order of data once
    kept, by_hand = [], 0
    for _, state in begun[::2]:
        masks = {n.removesuffix("_mask"): m for n, m in state.items() if n.endswith("weight_mask")}
        kept.append(sum(int(mask.sum()) for mask in masks.values()))
        first_layer = int(masks["hidden.0.weight"].sum())
        by_hand += 2 * 64 * 2 * (3 * kept[-1] - first_layer)  # epochs, images, a multiply-add
        for name, value in first.items():
            assert torch.equal(state[name], value * masks.get(name, 1)), name
    assert spent == pytest.approx(by_hand, rel=1e-12)
    assert kept == [WEIGHTS, *(round(d * WEIGHTS) for d in (0.8, 0.64))]
    # The search leaves no trace in the network itself but its ratio.
    for name, weight, mask in masked_weights(model):
        assert torch.equal(weight, first[f"{name}.weight"] * mask)
    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model).items()}
    total = sum(requested[name] * size for name, size in sizes.items())
    assert total == pytest.approx(WEIGHTS / 2)
