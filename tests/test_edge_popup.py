"""Edge-popup: which entries are kept, what the scores learn, and that nothing else moves."""

import copy

import pytest
import torch
from selection_by_hand import by_hand
from torch import nn

from ER_SLT.edge_popup import (
    RANKINGS,
    SCORE_INITS,
    count,
    found_masks,
    popup,
    popup_layers,
    set_density,
)
from startsparse import models, selection
from startsparse.effective import agree
from startsparse.masks import active, attach_masks, density_table, draw_masks, sparse_layers


def network(biases=True):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=biases),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, bias=biases),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5, bias=biases),
    )


def sparse(biases=True, density=0.6, dtype=torch.float32, **options):
    model = network(biases)
    models.init_weights(model, "torch", 1)
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), 1, "bernoulli"))
    popup(model, 1, **options)
    return model.to(dtype)


def images(batch=4, dtype=torch.float32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 10, 10, generator=draw, dtype=dtype)


# Layers


@pytest.mark.parametrize("score_init", SCORE_INITS)
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.013, 0.3, 0.55, 1.0])
def test_exactly_k_entries_inside_the_random_mask(score_init, ranking, biases, density):
    model = sparse(biases, score_init=score_init, ranking=ranking)
    set_density(model, density)
    layers = popup_layers(model)
    assert list(layers) == ["0", "3", "6"]
    used = 0
    for layer in layers.values():
        weight, bias = layer.effective()
        masks = [m for m in layer.masks() if m is not None]
        assert set(torch.cat([m.flatten() for m in masks]).tolist()) <= {0.0, 1.0}
        here = int(sum(m.sum() for m in masks))
        size = layer.weight.numel() + (layer.bias.numel() if biases else 0)
        allowed = int(layer.weight_mask.sum()) + size - layer.weight.numel()
        if ranking == "layer":
            assert here == min(round(density * size), allowed)
        used += here
        assert (weight[~layer.weight_mask] == 0).all()
        assert torch.equal(weight, layer.weight * masks[0])
        assert torch.equal(layer.effective_weight(), weight)
        if biases:
            assert torch.equal(bias, layer.bias * masks[1])
            assert torch.equal(layer.effective()[1], bias)
        else:
            assert bias is None
    sizes, alloweds = zip(*((layer.size(), layer.allowed()) for layer in layers.values()))
    if ranking == "global":
        assert used == count(density, sum(sizes), sum(alloweds))


def test_the_largest_magnitudes_of_weights_and_biases_are_kept():
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer)
    attach_masks(model, {"0": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()})
    popup(model, 1)
    with torch.no_grad():
        model[0].weight_score.copy_(torch.tensor([[-5.0, 1.0, 0.0], [2.0, -2.0, 3.0]]))
        model[0].bias_score.copy_(torch.tensor([-2.0, 4.0]))
    order = ["0.weight 0", "0.bias 1", "0.weight 5", "0.weight 3", "0.weight 4", "0.bias 0"]
    order.append("0.weight 1")
    for keep in range(8):
        set_density(model, keep / 8)
        found = [
            f"{name} {i}"
            for name, mask in found_masks(model).items()
            for i in mask.flatten().nonzero().flatten().tolist()
        ]
        assert sorted(found) == sorted(order[:keep])


def test_counts():
    assert count(0.0, 10, 7) == 0
    assert count(0.34, 10, 7) == 3
    assert count(1.0, 10, 7) == 7


@pytest.mark.parametrize("biases", [False, True])
def test_gradients_against_autograd_of_the_surrogate(biases):
    model = sparse(biases, dtype=torch.float64)
    set_density(model, 0.3)
    layer = popup_layers(model)["3"]
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    upstream = torch.randn_like(layer(x))
    layer(x).backward(upstream)

    weight_mask, bias_mask = layer.masks()
    scores = [layer.weight_score] + [layer.bias_score] * biases
    free = [score.detach().clone().requires_grad_() for score in scores]
    frozen, masks = [layer.weight, layer.bias], [weight_mask, bias_mask]
    # The value of w m, and the derivative of w |s|.
    effective = [w * (m + s.abs() - s.abs().detach()) for w, m, s in zip(frozen, masks, free)]
    nn.functional.conv2d(x, *effective, stride=2).backward(upstream)
    for score, other in zip(scores, free):
        assert torch.allclose(score.grad, other.grad, rtol=1e-12, atol=1e-15)
        assert (score.grad != 0).any()
    assert (layer.weight_score.grad[~layer.weight_mask] == 0).all()
    assert (layer.weight_score.grad[layer.weight_mask & (weight_mask == 0)] != 0).all()
    assert layer.weight.grad is None


def test_gradients_against_finite_differences():
    model = sparse(dtype=torch.float64)
    set_density(model, 0.4)
    layer = popup_layers(model)["6"]
    assert isinstance(layer, nn.Linear)
    x = torch.randn(3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    weight, bias = (tensor.detach() for tensor in layer.effective())

    def loss(weight):
        return nn.functional.linear(x, weight, bias).square().sum()

    draw, step = torch.Generator().manual_seed(5), 1e-6
    for place in torch.randperm(weight.numel(), generator=draw)[:40]:
        at = divmod(int(place), 96)
        nudge = torch.zeros_like(weight)
        nudge[at] = step * layer.weight[at] * layer.weight_score[at].detach().sign()
        slope = (loss(weight + nudge) - loss(weight - nudge)) / (2 * step)
        assert layer.weight_score.grad[at] == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


def test_a_zero_score_has_a_gradient():
    layer = nn.Sequential(nn.Linear(4, 3))
    popup(layer, 1)
    with torch.no_grad():
        layer[0].weight_score.zero_()
    layer(torch.ones(2, 4)).square().sum().backward()
    assert (layer[0].weight_score.grad != 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_training_changes_nothing_but_scores(optimizer, ranking):
    model = sparse(ranking=ranking)
    set_density(model, 0.3)
    fixed = {
        name: value.clone().numpy().tobytes()
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] in ("weight", "bias", "weight_mask")
    }
    before = found_masks(model)
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, weight_decay=0.1, fused=True),
        "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    }
    step = makers[optimizer](model.parameters())
    for i in range(5):
        step.zero_grad()
        model(images(seed=i)).square().mean().backward()
        step.step()
    state = model.state_dict()
    assert len(fixed) == 9
    assert all(state[name].numpy().tobytes() == old for name, old in fixed.items())
    found = found_masks(model)
    assert any(not torch.equal(found[name], before[name]) for name in found)
    total = sum(layer.size() for layer in popup_layers(model).values())
    assert sum(int(mask.sum()) for mask in found.values()) == pytest.approx(0.3 * total, abs=2)
    for layer in popup_layers(model).values():
        assert (layer.weight_score[~layer.weight_mask] == 0).all()
        assert (layer.weight_score[layer.weight_mask] != 0).all()


def test_global_ranking_is_the_ranking_of_all_scores():
    model = sparse(ranking="global")
    with torch.no_grad():  # ties between layers
        for layer in popup_layers(model).values():
            for score in (layer.weight_score, layer.bias_score):
                score.mul_(20).round_().div_(20)
    set_density(model, 0.25)
    parts, inside = [], []
    for layer in popup_layers(model).values():
        parts += [layer.weight_score.detach().abs(), layer.bias_score.detach().abs()]
        inside += [layer.weight_mask, None]
    total = sum(part.numel() for part in parts)
    expected = by_hand(parts, inside, round(0.25 * total))
    assert all(torch.equal(a, b.bool()) for a, b in zip(found_masks(model).values(), expected))


def test_global_ranking_follows_the_scores_in_the_forward_pass():
    model = sparse(ranking="global").eval()
    set_density(model, 0.4)
    counts = [int(layer.keep) for layer in popup_layers(model).values()]
    with torch.no_grad():
        model[6].weight_score.mul_(1e9)
    model(images())
    after = [int(layer.keep) for layer in popup_layers(model).values()]
    assert sum(after) == sum(counts)
    assert after[2] == model[6].weight_mask.sum() > counts[2]
    agree(model)
    assert [int(layer.keep) for layer in popup_layers(model).values()] == after


# All layers together, as on a GPU


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setattr(selection, "one_by_one", lambda _: False)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_all_layers_together_are_those_one_by_one(ranking, biases, dtype, format, request):
    def pass_through():
        model = sparse(biases, ranking=ranking).to(dtype, memory_format=format)
        set_density(model, 0.3)
        with torch.no_grad():
            for layer in popup_layers(model).values():
                for score in [layer.weight_score, layer.bias_score][: 1 + biases]:
                    score.mul_(5 * score.numel() ** 0.5).round_()  # ties, 0 and -0
        output = model(images(dtype=dtype))
        output.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return [output, *gradients, *found_masks(model).values(), *model.state_dict().values()]

    one_by_one = pass_through()
    request.getfixturevalue("together")
    all_at_once = pass_through()
    assert len(one_by_one) > 15
    for one, other in zip(one_by_one, all_at_once, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_layers_hold_nothing_when_the_forward_pass_ends(together):
    model = sparse()
    layer, held = model[3], []
    hook = model[4].register_forward_hook(lambda *_: held.append(layer.held[0]))
    model(images())
    assert torch.equal(held[0], layer.effective_weight())
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 3, 10, 11))  # fits the convolutions, but not the linear layer
    assert len(held) == 2
    assert all(layer.held is None for layer in popup_layers(model).values())
    hook.remove()
    copy.deepcopy(model)(images())


def test_a_part_of_the_network_computes_by_itself(together):
    model = sparse().eval()
    set_density(model, 0.3)
    part = model[:3]
    model(images())
    with torch.no_grad():
        model[0].weight_score.mul_(torch.linspace(0, 1, 27).view(3, 3, 3))
    assert torch.equal(part(images()), model[:3](images()))
    assert torch.equal(model[0](images()), model[0]._conv_forward(images(), *model[0].effective()))


def test_a_copy_of_the_numbers_in_a_thread_without_inference_mode(together):
    """As replicas of DataParallel evaluate."""
    model = sparse(ranking="global").eval()
    set_density(model, 0.3)
    expected = model(images())
    with torch.inference_mode():
        for layer in popup_layers(model).values():
            layer.keep = layer.keep.clone()
    with torch.no_grad():
        assert torch.equal(model(images()), expected)


# Models


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "mlp"])
def test_popup_keeps_tensors_and_drops_affine_parameters(arch):
    model = models.build(arch, classes=10)
    plain = {name: (layer.weight, layer.bias) for name, layer in sparse_layers(model).items()}
    popup(model, 1)
    layers = popup_layers(model)
    assert list(layers) == list(plain)
    for name, layer in layers.items():
        assert layer.weight is plain[name][0]
        assert layer.bias is plain[name][1]
        assert not layer.weight.requires_grad
        assert int(layer.keep) == layer.size()
    learn = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learn == {n for n, _ in model.named_parameters() if n.endswith("_score")}
    assert any(name.endswith("running_var") for name in model.state_dict())
    # A weight that was drawn as exactly 0 does not count as kept.
    assert density_table(model).iloc[-1]["density"] == pytest.approx(1, abs=1e-6)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_with_everything_kept_the_network_is_the_plain_one():
    model = network().eval()
    plain = copy.deepcopy(model)
    popup(model, 1)
    assert torch.equal(model(images()), plain(images()))


@pytest.mark.parametrize("score_init", SCORE_INITS)
def test_scores_come_from_seed_and_name(score_init):
    one, same, other = network(), network(), network()
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        popup(model, seed, score_init)
    for name, layer in popup_layers(one).items():
        twin, stranger = popup_layers(same)[name], popup_layers(other)[name]
        assert torch.equal(layer.weight_score, twin.weight_score)
        assert torch.equal(layer.bias_score, twin.bias_score)
        assert not torch.equal(layer.weight_score, stranger.weight_score)
        size = layer.weight_score.abs()
        if score_init == "constant":
            assert size.min() >= 0.5
            assert 0.50009 < size.max() <= 0.50011
        else:
            bound = layer.weight[0].numel() ** -0.5
            assert 0.9 * bound < size.max() <= bound
            assert abs(layer.weight_score.mean()) < 5 * bound / (3 * size.numel()) ** 0.5


def test_density_table_and_kept_count_the_found_weights():
    model = sparse()
    set_density(model, 0.2)
    found = found_masks(model)
    for name, layer in popup_layers(model).items():
        assert torch.equal(active(layer), found[f"{name}.weight"])
    total = density_table(model).iloc[-1]["kept"]
    assert total == sum(int(m.sum()) for n, m in found.items() if n.endswith("weight"))


def test_state_dict_holds_all_there_is():
    model = sparse(ranking="global")
    set_density(model, 0.2)
    other = sparse(ranking="global", score_init="constant")
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), other.eval()(images()))
    assert [int(x.keep) for x in popup_layers(other).values()] == [
        int(x.keep) for x in popup_layers(model).values()
    ]


def test_memory_format_does_not_matter():
    model = sparse(score_init="constant").eval()
    with torch.no_grad():
        model[0].weight_score.fill_(1).mul_(model[0].weight_mask)  # ties
    set_density(model, 0.3)
    found = found_masks(model)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert all(torch.equal(found[name], mask) for name, mask in found_masks(last).items())
    assert torch.allclose(last(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_replicas_of_data_parallel_compute_the_same(ranking):
    model = sparse(ranking=ranking)
    set_density(model, 0.3)
    # What DataParallel copies per module and then fills with the device's own tensors.
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1.0)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer.clone()
    with torch.no_grad():
        model[3].weight_score.mul_(1.5)
    replicas[model[3]].weight_score = model[3].weight_score * 1.0
    output = replicas[model](images())
    output.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    straight = model(images())
    straight.square().sum().backward()
    assert torch.equal(output, straight)
    assert len(gradients) == 6
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(gradients, (p for p in model.parameters() if p.requires_grad))
    )


def test_one_graph_for_torch_compile_at_any_density():
    model = sparse(ranking="global").eval()
    set_density(model, 0.3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
    set_density(model, 0.2)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
