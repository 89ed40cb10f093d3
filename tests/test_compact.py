"""Compacted networks: the same function, in float64, from as few units as is promised."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from startsparse import models
from startsparse.errors import UserError
from startsparse.export.compact import compact, resize
from startsparse.masks import attach_masks, draw_masks, sparse_layers

NODES = 12


def network(arch, *, density, seed, imagenet=False):
    """A network in evaluation mode whose BatchNorms have seen data and have parameters; inputs."""
    torch.manual_seed(seed)
    size, channels, width, nodes = 32, 3, {"resnet50": 4, "mlp": 20}.get(arch, 6), 16
    graph = None
    if arch in ("gcn", "algorithmic"):
        size, channels, width = 1, 20, 16
    if arch == "gcn":
        nodes = NODES
        edges = torch.rand(nodes, nodes).triu(1) < 0.2
        graph = (edges | edges.T).double().to_sparse()
    if imagenet:
        size, width = 64, 0
    model = models.build(
        arch,
        classes=5,
        channels=channels,
        size=size,
        width=width,
        imagenet=imagenet,
        adjacency=graph,
    ).double()
    for layer in sparse_layers(model).values():
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    for norm in norms(model):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.weight.data[0] = 0  # a constant, whatever comes in
        norm.momentum = 0.7  # so that a few batches are enough
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), seed, "bernoulli"))
    inputs = torch.randn(nodes, channels, size, size, dtype=torch.float64)
    return model, inputs


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def settle(model, inputs):
    """Let the BatchNorms see data; then the masks go, zeros stay."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(inputs)
    for layer in sparse_layers(model).values():
        if hasattr(layer, "weight_mask"):
            del layer.weight_mask
    return model.eval()


def kill(model, share):
    """Cut a share of the units of every layer off on one side, some on both."""
    draw = torch.Generator().manual_seed(9)
    layers = list(sparse_layers(model).values())
    for layer in layers[1:]:
        layer.weight.data[:, torch.rand(layer.weight.shape[1], generator=draw) < share] = 0
    for layer in layers[:-1]:
        layer.weight.data[torch.rand(len(layer.weight), generator=draw) < share] = 0


def count(model):
    return sum(p.numel() for p in model.parameters())


@torch.inference_mode()
def assert_equal(one, other, inputs, *, tolerance=1e-9):
    expected, found = one(inputs), other(inputs)
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return expected


@pytest.mark.parametrize("arch", models.MODELS)
def test_outputs_are_those_of_the_whole_network(arch):
    model, inputs = network(arch, density=0.5, seed=1)
    kill(model, 0.3)
    settle(model, inputs)
    before = copy.deepcopy(model.state_dict())
    small = compact(model)
    logits = assert_equal(model, small, inputs)
    assert logits.std(0).max() > 1e-5 * logits.abs().max()  # the input matters
    assert count(small) < 0.98 * count(model)
    assert type(small) is type(model)
    assert not small.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again = compact(small)
    assert count(again) == count(small)
    assert_equal(model, again, inputs)


@pytest.mark.parametrize("arch", models.MODELS)
@pytest.mark.parametrize("density", [0.003, 0.03])
def test_very_sparse_networks(arch, density):
    for seed in (1, 2):
        model, inputs = network(arch, density=density, seed=seed)
        settle(model, inputs)
        with torch.inference_mode():
            expected = model(inputs)
            assert (compact(model)(inputs) - expected).abs().max() <= 1e-9 * (
                1 + expected.abs().max()
            )


@pytest.mark.parametrize("arch", models.MODELS)
def test_whole_dead_layers(arch):
    names = list(sparse_layers(network(arch, density=1, seed=1)[0]))
    for name in {names[0], names[1], names[len(names) // 2], names[-1]}:
        model, inputs = network(arch, density=0.5, seed=3)
        model.get_submodule(name).weight.data.zero_()
        settle(model, inputs)
        small = compact(model)
        with torch.inference_mode():
            expected = model(inputs)
            assert (small(inputs) - expected).abs().max() <= 1e-9 * (1 + expected.abs().max())
        if arch in ("mlp", "algorithmic", "gcn") and name not in (names[0], names[-1]):
            # Nothing gets through, so of all layers one unit is left.
            widths = [len(layer.weight) for layer in sparse_layers(small).values()]
            assert widths == [1] * (len(names) - 1) + [5]


def test_dead_branches_of_a_residual_network_go():
    model, inputs = network("resnet20", density=1, seed=1)
    model.stages[1][1].conv2.weight.data.zero_()
    model.stages[2][2].conv1.weight.data.zero_()
    settle(model, inputs)
    small = compact(model)
    assert_equal(model, small, inputs)
    for block in (small.stages[1][1], small.stages[2][2]):
        assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (
            1,
            1,
            1,
        )
    assert small.stages[1][0].conv1.out_channels > 6


def test_a_channel_of_a_residual_stream_goes_when_it_is_dead_in_all_branches():
    def stream(cut):
        model, inputs = network("resnet20", density=1, seed=1)
        makers = [model.conv1, *(block.conv2 for block in model.stages[0])]
        for norm in [model.bn1, *(block.bn2 for block in model.stages[0])]:
            norm.bias.data[:3] = -1  # so that ReLU makes a zero of nothing
            norm.weight.data[:3] = 1
        for layer in makers[: len(makers) - 1 + cut]:
            layer.weight.data[1] = 0
        settle(model, inputs)
        small = compact(model)
        assert_equal(model, small, inputs)
        return small.conv1.out_channels

    assert stream(cut=False) - stream(cut=True) == 1


def test_imagenets_network():
    model, inputs = network("resnet18", density=0.05, seed=1, imagenet=True)
    kill(model, 0.5)
    settle(model, inputs[:2])
    small = compact(model)
    assert_equal(model, small, inputs[:2])
    assert count(small) < 0.5 * count(model)


class Pair(nn.Module):
    """Two convolutions with BatchNorm and ReLU between them."""

    def __init__(self, kernel, padding):
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.two = nn.Conv2d(7, 4, kernel, padding=padding, bias=False)
        self.end = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.two(F.relu_(self.norm(self.one(x)))))
        return self.end(x.mean((2, 3)))


@pytest.mark.parametrize(("kernel", "padding", "left"), [(1, 0, 3), (3, 0, 3), (3, 1, 4)])
def test_constants_before_a_convolution(kernel, padding, left):
    """Zeros go; other constants go into the bias, or into one unit where there is padding."""
    torch.manual_seed(1)
    model = Pair(kernel, padding).double().eval()
    nn.init.normal_(model.norm.running_mean)
    model.norm.bias.data = torch.tensor([0.5, -4, 2, 1, 0, 0, 0], dtype=torch.float64)
    model.norm.running_mean[:4] = 0
    model.one.weight.data[:4] = 0
    small = compact(model)
    inputs = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    assert_equal(model, small, inputs)
    assert (small.one.out_channels, small.norm.num_features, small.two.in_channels) == (left,) * 3
    assert (small.two.bias is None) == bool(padding)
    assert small.two.weight.shape == (4, left, kernel, kernel)


def test_what_only_dead_units_feed_goes_too():
    model, inputs = network("mlp", density=1, seed=1)
    layers = list(sparse_layers(model).values())
    layers[-1].weight.data[:, 5:] = 0  # units of the third layer that nothing reads
    layers[2].weight.data[:5, 3:] = 0  # so only three of the second are read
    layers[1].weight.data[:3, 7:] = 0
    layers[0].weight.data[2] = 0  # and one of the first is a constant
    settle(model, inputs)
    small = compact(model)
    assert_equal(model, small, inputs)
    assert [len(layer.weight) for layer in sparse_layers(small).values()] == [5, 2, 4, 5]


def test_a_constant_of_the_nodes_of_a_graph_is_none_of_their_neighbours():
    model, inputs = network("gcn", density=1, seed=1)
    resize(model.hidden, model.hidden.weight.data, torch.ones(16, dtype=torch.float64))
    model.hidden.weight.data[:4] = 0  # 1 at each node, but the sum over neighbours differs
    model.hidden.bias.data[:2] = 0
    settle(model, inputs)
    small = compact(model)
    assert_equal(model, small, inputs)
    assert small.hidden.out_features == 14


def test_batchnorm_without_parameters():
    torch.manual_seed(1)
    model = Pair(1, 0).double().eval()
    model.norm = nn.BatchNorm2d(7, affine=False).double().eval()
    nn.init.normal_(model.norm.running_mean, mean=-1)
    model.one.weight.data[:4] = 0
    small = compact(model)
    assert_equal(model, small, torch.randn(5, 2, 6, 6, dtype=torch.float64))
    assert small.norm.num_features == small.one.out_channels == 3


class AroundTheInput(nn.Module):
    """Its channels are those of the input: none of them can go."""

    def __init__(self):
        super().__init__()
        self.conv, self.end = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.end(F.relu(self.conv(x) + x)).mean((2, 3))


def test_what_is_added_to_the_input_stays():
    torch.manual_seed(1)
    model = AroundTheInput().double().eval()
    model.conv.weight.data[2] = 0
    model.conv.weight.data[:, 1:3] = 0
    model.end.weight.data[:, 1:3] = 0
    small = compact(model)
    assert_equal(model, small, torch.randn(3, 4, 5, 5, dtype=torch.float64))
    assert small.conv.weight.shape == (4, 4, 3, 3)


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(2, 4, 3), what
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.end = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.conv(x)
        if self.what == "softmax":
            return x.softmax(1)
        if self.what == "groups":
            return self.grouped(x)
        if self.what == "pixels":
            return self.end(x.flatten(1))
        if self.what == "mean":
            return x.mean(1)
        if self.what == "channels":
            return x[:, ::2]
        if self.what == "number":
            return x + 1
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("softmax", "it is not known what softmax"),
        ("groups", "grouped: groups or padding"),
        ("pixels", "end: 4 maps, 64 inputs"),
        ("mean", "a mean over something other"),
        ("channels", "a slice of something other"),
        ("number", "an addition of something other"),
        ("if", "the network cannot be traced"),
    ],
)
def test_what_is_not_known_is_named(what, message):
    with pytest.raises(UserError, match=f"^--compact: .*{message}") as error:
        compact(Odd(what))
    assert "\n" not in str(error.value)
