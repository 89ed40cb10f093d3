"""Layers with an effective weight in the sparse form: soft thresholds and edge-popup."""

import copy
from functools import partial
from unittest.mock import patch

import engine_runs
import pytest
import torch
import torch.nn.functional as F
from engine_runs import clock, equal_states, optimizer_of, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ER_SLT.edge_popup import popup, set_density
from startsparse.effective import replace_layers
from startsparse.engine import choice, winograd
from startsparse.engine.choice import choose
from startsparse.engine.compaction import CompactedProduct, nonzero
from startsparse.engine.entries import Window
from startsparse.engine.layers import Product
from startsparse.engine.maps import Space, to_map
from startsparse.engine.network import SparseForm
from startsparse.masks import active, attach_masks, draw_masks, masked_weights, sparse_layers
from STR.thresholds import SoftThresholded

SHAPE = 3, 6, 6
KINDS = ("soft", "soft in a mask", "popup", "popup in a mask", "popup in a mask, global")


LEARNED = {"soft": "weight", "popu": "weight_score"}


def network(kind, biases=True, dtype=torch.float64):
    """Its second convolution has several blocks of input channels, its third several phases."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 40, 3, padding=1, bias=biases), nn.BatchNorm2d(40), nn.ReLU()),
        *(nn.Conv2d(40, 8, 3, padding=1, bias=biases), nn.ReLU()),
        *(nn.Conv2d(8, 9, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 10, bias=biases)),
    )
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 6 + 0.01
    if "mask" in kind:
        shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
        attach_masks(model, draw_masks(shapes, [0.5] * len(shapes), 1, "bernoulli"))
    masks = {name: mask for name, _, mask in masked_weights(model)}
    if "soft" in kind:
        replace_layers(model, SoftThresholded, -2.5, "sigmoid")
        attach_masks(model, masks)
    else:
        popup(model, 1, ranking="global" if "global" in kind else "layer")
        set_density(model, 0.3)
    return model.to(dtype, memory_format=torch.channels_last)


batch = partial(engine_runs.batch, shape=SHAPE)
sparse_form = partial(engine_runs.sparse_form, shape=SHAPE)


def optimizer_state(optimizer):
    """Number of the parameter -> its state; a copy."""
    return copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_those_of_the_masked_network(kind, optimizer):
    for biases, without in ((True, ()), (False, ()), (True, ("0", "10"))):
        masked, sparse = network(kind, biases), network(kind, biases)
        before = copy.deepcopy(masked.state_dict())
        one, other = optimizer_of(masked, optimizer), optimizer_of(sparse, optimizer)
        form = sparse_form(sparse, without)
        images, labels = batch()
        for i in range(10):
            form.enter(other)
            losses = [
                step(forward, model, optimizer, images, labels)
                for forward, model, optimizer in ((masked, masked, one), (form, sparse, other))
            ]
            assert losses[0] == pytest.approx(losses[1], rel=1e-10)
            if i % 4 == 3:  # and go on in the sparse form
                form.leave(other)
        form.leave(other)
        equal_states(masked, sparse, 1e-9)
        states = optimizer_state(one), optimizer_state(other)
        assert states[0].keys() == states[1].keys()
        for number, state in states[0].items():
            for key, tensor in state.items():
                assert (tensor - states[1][number][key]).abs().max() <= 1e-9
        for name, tensor in masked.state_dict().items():
            if name.endswith(("threshold_logit", "score")):
                assert not torch.equal(tensor, before[name]), name
        masked.eval(), sparse.eval()
        with form.within(), torch.inference_mode():
            for few in (1, 19):  # of one image all is computed otherwise
                assert (form(images[:few]) - masked(images[:few])).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_entering_and_leaving_changes_nothing_and_stores_only_what_is_inside(kind):
    model = network(kind)
    optimizer = optimizer_of(model, "adam")
    step(model, model, optimizer, *batch())
    model(batch()[0])  # what global ranking keeps of each layer is a buffer
    parameters = dict(model.named_parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    inside = sum(
        int(layer.weight_mask.sum()) if "mask" in kind else layer.weight.numel()
        for layer in sparse_layers(model).values()
    )
    form = sparse_form(model)
    form.enter(optimizer)
    learned = [getattr(layer, LEARNED[kind[:4]]) for layer in form_layers(form)]
    assert sum(vector.numel() for vector in learned) == inside
    assert sum(layer.weight.numel() for layer in form_layers(form)) == inside
    assert all(p.data.numel() == 0 for p in parameters.values() if p.dim() > 1)
    form(batch()[0]).sum().backward()
    assert all(vector.grad.shape == vector.shape for vector in learned)
    form.leave(optimizer)
    after = model.state_dict(), optimizer.state_dict()
    assert list(before[0]) == list(after[0])
    for name, tensor in before[0].items():
        if not name.rpartition(".")[2].startswith(("running", "num_batches")):
            assert torch.equal(tensor, after[0][name]), name
        assert tensor.stride() == after[0][name].stride()
        if kind.startswith("popup") and name.endswith(".weight"):
            assert torch.equal(tensor.signbit(), after[0][name].signbit()), name
    for number, state in before[1]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, after[1]["state"][number][key])
    assert before[1]["param_groups"] == after[1]["param_groups"]
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


def form_layers(form):
    return [form.model.get_submodule(name) for name in form.layers]


@pytest.mark.parametrize("kind", ["soft in a mask", "popup in a mask"])
def test_a_second_forward_pass_leaves_the_gradients_of_the_first(kind):
    """With another batch and another pattern in between."""
    model = network(kind)
    form = sparse_form(model)
    images, labels = batch()
    with form.within():
        learning = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(F.cross_entropy(form(images), labels), learning)
        loss = F.cross_entropy(form(images), labels)
        for layer in form_layers(form):
            if kind == "soft in a mask":
                layer.threshold_logit.data.fill_(5)
            else:
                layer.weight_score.data.reciprocal_()
        form(images[:3])
        found = torch.autograd.grad(loss, learning)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_single_images_after_the_weights_have_changed(kind, mode):
    model = network(kind).eval()
    form = sparse_form(model, without=["3"])
    images, _ = batch(1)
    with form.within():
        with mode():
            before = form(images)
            assert torch.equal(form(images), before)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(1.5 * parameter.flip(0))
        with mode():
            after = form(images)
    with torch.no_grad():
        assert (after - model(images)).abs().max() < 1e-10
    assert (after - before).abs().max() > 1e-3


# Compaction


@settings(max_examples=80)
@given(
    channels=st.tuples(st.integers(1, 12), st.sampled_from([1, 5, 40])),
    stride=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    zeros=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    images=st.sampled_from([1, 17]),
    break_even=st.sampled_from([0.01, 0.4, 2.0]),
    seed=st.integers(0, 9),
)
def test_compacted_lists_and_products(channels, stride, density, zeros, images, break_even, seed):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(*channels, 3, 3, generator=draw) < density
    window, space = Window((3, 3), (stride, stride), (1, 1)), Space(channels[1], 5, 4)
    output = window.output(space, channels[0])
    space.border, output.border = window.border_in(space, output), window.border_out(space, output)
    plain = Product(window, space, output)
    plain.set_mask(mask)
    weight = torch.randn(mask.shape, generator=draw, dtype=torch.float64) * mask
    weight[torch.rand(mask.shape, generator=draw) < zeros] = 0
    plain.values = nn.Parameter(weight.reshape(-1)[plain.flat])
    x = to_map(torch.randn(images, *shape_of(space), generator=draw, dtype=torch.float64), space)
    d_y = to_map(
        torch.randn(images, *shape_of(output), generator=draw, dtype=torch.float64), output
    )
    y, saved = plain.forward(x, images)
    (d_x,), (d_values,) = plain.backward(saved, d_y, [None])
    d_weight = torch.zeros(mask.numel(), dtype=torch.float64)
    d_weight[plain.flat] = d_values

    for zeros_learn in (True, False):
        product = CompactedProduct(window, space, output, zeros_learn)
        with patch.object(winograd, "break_even", lambda *_: break_even if stride == 1 else 2):
            product.set_mask(mask)
        assert torch.equal(product.flat, mask.flatten().nonzero().flatten())
        values = product.values = weight.reshape(-1)[product.flat].requires_grad_()
        for part in (product.entries, *product.transposed):
            lists = list(zip(part.first.tolist(), part.first[1:].tolist()))
            part.for_stride(7)
            entries = [
                [(part.offset[e].item(), part.order[e].item()) for e in range(*bounds)]
                for bounds in lists
            ]
            expected = [[e for e in ones if values[e[1]] != 0] for ones in entries]
            found = nonzero(part, values.detach(), 7)
            assert found.first.tolist() == [
                sum(map(len, expected[:i])) for i in range(len(lists) + 1)
            ]
            left = [entry for ones in expected for entry in ones]
            assert list(zip(found.offset.tolist(), found.order.tolist())) == left
            assert torch.equal(found.values, values.detach()[found.order])
        mine, saved = product.forward(x, images)
        most_are_used = stride == 1 and int(values.count_nonzero()) >= break_even * mask.numel()
        assert isinstance(saved[2], winograd.Tiled) == most_are_used
        close(output.inside(mine), output.inside(y))
        (mine,), (d_mine,) = product.backward(saved, d_y, [None])
        close(space.inside(mine), space.inside(d_x))
        right = d_weight[product.flat]
        close(d_mine, right if zeros_learn else right * (values != 0))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def shape_of(space):
    return space.channels, space.height, space.width


def test_results_do_not_depend_on_the_number_of_threads():
    found = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        model = network("popup in a mask", dtype=torch.float32)
        form = sparse_form(model)
        images, labels = batch(dtype=torch.float32)
        with form.within():
            learning = [p for p in model.parameters() if p.requires_grad]
            found.append(torch.autograd.grad(F.cross_entropy(form(images), labels), learning))
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others))


# Which layers compute sparsely


def test_the_choice_goes_by_the_effective_density(monkeypatch):
    clock(monkeypatch, 1.0, 0.5)
    model = network("soft", dtype=torch.float32)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.threshold_logit.fill_(-9)
    form = SparseForm(model, SHAPE)
    monkeypatch.setattr(CompactedProduct, "set_mask", lambda *_: pytest.fail("listed"))
    images = batch(32, torch.float32)[0]
    assert choose(form, images, classes=10) == choice.Choice({}, frozenset(), None)
    monkeypatch.undo()
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.threshold_logit.fill_(-1.5)
    assert 0.2 < active(model[3]).float().mean() < 0.4
    all_are_chosen(form, monkeypatch)


def test_the_choice_leaves_edge_popup_as_it_was(monkeypatch):
    model = network("popup in a mask, global", dtype=torch.float32)
    all_are_chosen(SparseForm(model, SHAPE), monkeypatch)


def all_are_chosen(form, monkeypatch):
    clock(monkeypatch, 1.0, 0.5)
    model, before = form.model, copy.deepcopy(form.model.state_dict())
    found = choose(form, batch(32, torch.float32)[0], classes=10)
    assert found.layers == pytest.approx(dict.fromkeys(form.layers, 2.0))
    assert found.computes == set(sparse_layers(model))
    assert all(layer.weight.dim() > 1 for layer in sparse_layers(model).values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in model.parameters())
