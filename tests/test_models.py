"""The networks: shapes, sizes, the order of their layers, and how their weights begin."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from startsparse.errors import OptionError
from startsparse.models import INITS, MODELS, RESNET_TYPES, build, fitting, init_weights

EVERY = [*fitting("images"), *RESNET_TYPES]  # those for other data have tests of their own
DISTINCT = [name for name in EVERY if name not in ("large", "res50")]  # two are aliases
SMALL = ["resnet20", "resnet18", "resnet50", "vgg11", "mlp", "small-dense", "small-dense-inc"]
IMAGENET = ["resnet18", "resnet50"]


def make(name, **options):
    """`build` for a name out of either table."""
    if name not in RESNET_TYPES:
        return build(name, **options)
    if name.startswith("small"):
        options.setdefault("width", 8)
    return build("resnet20", resnet_type=name, **options)


def count(model):
    return sum(p.numel() for p in model.parameters())


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def images(channels=3, size=32, batch=2):
    return torch.randn(
        batch, channels, size, size, generator=torch.Generator().manual_seed(batch + size)
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tests run in as many processes as there are cores; more threads only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Shapes


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 2), (3, 200)])
def test_output_shape_at_every_size(name, channels, classes):
    for size in (32, 37, 40, 64):
        if size == 32 or name == "mlp":  # the others take any size
            model = make(name, classes=classes, channels=channels, size=size).eval()
        with torch.no_grad():
            out = model(images(channels, size))
        assert out.shape == (2, classes)
        assert out.isfinite().all()


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "mlp"])
def test_digits_of_28_pixels_work_where_no_layer_forbids_it(name):
    out = make(name, classes=10, channels=1, size=28)(images(1, 28))
    assert out.shape == (2, 10)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_shape(name):
    model = build(name, classes=100, size=224, imagenet=True).eval()
    assert model.conv1.kernel_size == (7, 7)
    with torch.no_grad():
        assert model(images(size=64)).shape == (2, 100)


def test_mlp_takes_tables():
    model = build("mlp", classes=7, channels=54, size=1)
    assert model(torch.randn(4, 54)).shape == (4, 7)


def test_first_stage_sees_the_whole_image_and_the_last_an_eighth():
    shapes = []
    model = build("resnet18", classes=10, width=8).eval()
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    model(images())
    assert shapes == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]


# Parameters


def thin_count(blocks):
    """Option B: two more 1x1 convolutions with BatchNorm than the paper's option A."""
    stem = 16 * 3 * 9 + 32
    first = 2 * blocks * (16 * 16 * 9 + 32)
    second = (32 * 16 * 9 + 64) + (2 * blocks - 1) * (32 * 32 * 9 + 64) + (32 * 16 + 64)
    third = (64 * 32 * 9 + 128) + (2 * blocks - 1) * (64 * 64 * 9 + 128) + (64 * 32 + 128)
    return stem + first + second + third + (64 * 10 + 10)


def vgg_count(*blocks):
    """Convolutions without bias, two numbers a channel for BatchNorm, one linear layer."""
    total, inputs = 512 * 10 + 10, 3
    for outputs, convolutions in zip((64, 128, 256, 512, 512), blocks, strict=True):
        for _ in range(convolutions):
            total += outputs * inputs * 9 + 2 * outputs
            inputs = outputs
    return total


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", thin_count(3)),
        ("resnet20", 269_722 + 2_752),  # option A as published by others, and the two shortcuts
        ("resnet32", thin_count(5)),
        ("resnet56", thin_count(9)),
        ("resnet18", 11_173_962),
        ("large", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("res50", 23_520_842),
        ("vgg11", vgg_count(1, 1, 2, 2, 2)),
        ("vgg13", vgg_count(2, 2, 2, 2, 2)),
        ("vgg16", vgg_count(2, 2, 3, 3, 3)),
        ("vgg16", 14_728_266 - 4_224),  # the usual count, less one bias for each channel
        ("vgg19", vgg_count(2, 2, 4, 4, 4)),
        ("mlp", (3072 * 256 + 256) + 2 * (256 * 256 + 256) + 3 * 512 + (2560 + 10)),
    ],
)
def test_parameter_count(name, expected):
    assert count(make(name, classes=10)) == expected


@pytest.mark.parametrize(("name", "expected"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_imagenet_parameter_count(name, expected):
    assert count(build(name, classes=1000, imagenet=True)) == expected


@pytest.mark.parametrize("name", EVERY)
def test_only_the_classifier_has_a_bias_after_batch_norm(name):
    found = layers(make(name, classes=5))
    *inner, last = found.values()
    assert isinstance(last, nn.Linear)
    assert last.out_features == 5
    assert last.bias is not None
    assert all(m.bias is None for m in inner if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_vgg_pools_four_times_and_averages_what_is_left(size):
    """Configuration A of Simonyan and Zisserman's table 1, layer by layer, but for the end."""
    model = build("vgg11", classes=10, size=size, width=4).eval()
    weights = {n: m.weight for n, m in layers(model).items()}
    convolutions = iter([w for w in weights.values() if w.dim() == 4])
    images = x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    for block in ("64", "M 128", "M 256 256", "M 512 512", "M 512 512"):
        for step in block.split():
            if step == "M":
                x = F.max_pool2d(x, 2, 2)
            else:  # with BatchNorm as it begins: mean 0, variance 1
                x = F.relu(F.conv2d(x, next(convolutions), padding=1) / (1 + 1e-5) ** 0.5)
    assert x.shape == (2, 32, size // 16, size // 16)
    expected = F.linear(x.mean((2, 3)), model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(images), expected)


# Widths


def out_channels(model):
    return [m.out_channels for m in layers(model).values() if isinstance(m, nn.Conv2d)]


def test_small_dense_has_one_width():
    model = make("small-dense", classes=10, width=24)
    assert set(out_channels(model)) == {24}
    assert model.fc.in_features == 24
    # the layout of ResNet18: 17 convolutions and a projection wherever the image is halved
    assert len(out_channels(model)) == 17 + 3


def test_small_dense_inc_doubles():
    model = make("small-dense-inc", classes=10, width=6)
    assert sorted(set(out_channels(model))) == [6, 12, 24, 48]
    assert model.fc.in_features == 48
    assert len(out_channels(model)) == 17 + 3


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet20", [5, 10, 20]),
        ("resnet34", [5, 10, 20, 40]),
        ("large", [5, 10, 20, 40]),
        ("resnet50", [5, 10, 20, 40, 80, 160]),
        ("vgg16", [5, 10, 20, 40]),
    ],
)
def test_width_scales_every_stage(name, widths):
    assert sorted(set(out_channels(make(name, classes=10, width=5)))) == widths


def test_width_of_the_mlp():
    model = build("mlp", classes=3, channels=10, size=1, width=12)
    shapes = [tuple(m.weight.shape) for m in layers(model).values()]
    assert shapes == [(12, 10), (12, 12), (12, 12), (3, 12)]


def test_own_width_is_the_same_as_no_width():
    for name, own in [("resnet20", 16), ("resnet18", 64), ("vgg11", 64), ("mlp", 256)]:
        assert count(build(name, classes=10, width=own)) == count(build(name, classes=10))


# Order and calls


@pytest.mark.parametrize("name", [*EVERY, *(f"imagenet-{n}" for n in IMAGENET)])
def test_layers_run_in_the_order_of_named_modules(name):
    if name.startswith("imagenet-"):
        model = build(name.removeprefix("imagenet-"), classes=10, imagenet=True)
    else:
        model = make(name, classes=10, **({} if name in ("res50", "large") else {"width": 8}))
    ran = []
    for layer, module in layers(model).items():
        module.register_forward_hook(lambda _m, _i, _o, layer=layer: ran.append(layer))
    with torch.no_grad():
        model.eval()(images())
    assert ran == list(layers(model))


@pytest.mark.parametrize("name", SMALL)
def test_layers_swapped_in_place_are_the_ones_that_run(name):
    ran = []

    class Blind(nn.Module):
        """Has no weight of its own that a model could reach past it."""

        def __init__(self, name, layer):
            super().__init__()
            self.name, self.call = name, layer.forward

        def forward(self, x):
            ran.append(self.name)
            return self.call(x)

    model = make(name, classes=4, width=8).eval()
    with torch.no_grad():
        expected, names = model(images()), list(layers(model))
        for layer in names:
            model.set_submodule(layer, Blind(layer, model.get_submodule(layer)))
        assert torch.equal(model(images()), expected)
    assert ran == names


# Training and saving


@pytest.mark.parametrize("name", DISTINCT)
def test_gradients_reach_every_parameter(name):
    model = make(name, classes=10, width=16)
    init_weights(model, "kaiming_normal", 0)
    loss = F.cross_entropy(model(images(batch=8)), torch.arange(8))
    loss.backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        assert value.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", SMALL)
def test_a_copy_and_a_reloaded_state_give_the_same_outputs(name):
    model = make(name, classes=10, width=8)
    model(images())  # running statistics that are not the first ones
    model.eval()
    twin = make(name, classes=10, width=8).eval()
    with torch.no_grad():
        expected = model(images())
        assert not torch.equal(twin(images()), expected)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(images()), expected)
        assert torch.equal(copy.deepcopy(model)(images()), expected)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same_outputs(name):
    model = make(name, classes=10, width=8).eval()
    with torch.no_grad():
        expected = model(images(size=37) if name != "mlp" else images())
        model.to(memory_format=torch.channels_last)
        x = (images(size=37) if name != "mlp" else images()).to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# Initial weights


class Net(nn.Sequential):
    """A convolution and a linear layer; more layers may stand between them."""

    def __init__(self, **between):
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(8, 64, 3),
                bn=nn.BatchNorm2d(64),
                **between,
                fc=nn.Linear(300, 200),
            )
        )


FAN = {"conv": (8 * 9, 64 * 9), "fc": (300, 200)}


@pytest.mark.parametrize("layer", ["conv", "fc"])
@pytest.mark.parametrize("how", ["kaiming_normal", "kaiming_uniform", "xavier_normal", "torch"])
def test_moments(how, layer):
    fan_in, fan_out = FAN[layer]
    std = {
        "kaiming_normal": math.sqrt(2 / fan_in),
        "kaiming_uniform": math.sqrt(2 / fan_in),
        "xavier_normal": math.sqrt(2 / (fan_in + fan_out)),
        "torch": 1 / math.sqrt(3 * fan_in),
    }[how]
    net = Net()
    init_weights(net, how, 3)
    weight = net.get_submodule(layer).weight.detach().double()
    n = weight.numel()
    # five standard errors; those of the std are the normal's, the larger of the two kinds
    assert abs(weight.mean()) < 5 * std / math.sqrt(n)
    assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * n)
    # a uniform ends at sqrt(3) std and a normal of this many values goes well beyond
    largest = float(weight.abs().max() / std)
    if how in ("kaiming_uniform", "torch"):
        assert 1.7 < largest <= math.sqrt(3) + 1e-6
    else:
        assert largest > 3


def test_orthogonal():
    net = Net()
    init_weights(net, "orthogonal", 3)
    for weight in (net.conv.weight.detach().flatten(1), net.fc.weight.detach()):
        assert weight.shape[0] < weight.shape[1]
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", INITS)
def test_biases_and_batch_norm(how):
    net = Net()
    net(torch.randn(2, 8, 5, 302))  # moves the running statistics
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(7)
    init_weights(net, how, 0)
    for layer, (fan_in, _) in FAN.items():
        bias = net.get_submodule(layer).bias
        if how == "torch":
            bound = 1 / math.sqrt(fan_in)
            assert 0.8 * bound < bias.abs().max() <= bound
            assert bias.min() < 0 < bias.max()
        else:
            assert (bias == 0).all()
    assert (net.bn.weight == 1).all()
    assert (net.bn.bias == 0).all()
    assert (net.bn.running_mean == 0).all()
    assert (net.bn.running_var == 1).all()
    assert net.bn.num_batches_tracked == 0


@pytest.mark.parametrize("how", INITS)
def test_a_layer_does_not_depend_on_the_others(how):
    one, other = Net(), Net(more=nn.Conv2d(64, 64, 3), bn2=nn.BatchNorm2d(64))
    init_weights(one, how, 5)
    init_weights(other, how, 5)
    for layer in FAN:
        for kind in ("weight", "bias"):
            name = f"{layer}.{kind}"
            assert torch.equal(one.get_parameter(name), other.get_parameter(name)), name


@pytest.mark.parametrize("how", INITS)
def test_same_seed_same_bits_another_seed_another_draw(how):
    one, same, other = Net(), Net(), Net()
    init_weights(one, how, 5)
    init_weights(same, how, 5)
    init_weights(other, how, 6)
    for name, value in one.named_parameters():
        assert torch.equal(value, same.get_parameter(name)), name
    for layer in FAN:
        assert not torch.equal(one.get_submodule(layer).weight, other.get_submodule(layer).weight)


@pytest.mark.parametrize("how", INITS)
def test_number_of_threads_changes_no_bit(how):
    one, other = Net(), Net()
    before = torch.get_num_threads()
    for threads, net in ((1, one), (2, other)):
        torch.set_num_threads(threads)
        init_weights(net, how, 0)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for name, value in one.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name


@pytest.mark.parametrize("how", INITS)
def test_layers_of_one_shape_differ(how):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    init_weights(net, how, 0)
    assert not torch.equal(net[0].weight, net[1].weight)


@pytest.mark.parametrize("how", INITS)
def test_global_random_state_is_neither_read_nor_moved(how):
    one, same = Net(), Net()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    init_weights(one, how, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    init_weights(same, how, 0)
    assert torch.equal(one.conv.weight, same.conv.weight)


def test_subclasses_layouts_and_precisions_get_the_same_draw():
    class Conv(nn.Conv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.threshold = nn.Parameter(torch.full((1,), -3.0))

    class Dense(nn.Linear):
        pass

    plain, special, last, half, double = Net(), Net(), Net(), Net().bfloat16(), Net().double()
    special.conv, special.fc = Conv(8, 64, 3), Dense(300, 200)
    last.to(memory_format=torch.channels_last)
    for net in (plain, special, last, half, double):
        init_weights(net, "kaiming_normal", 4)
    for layer in FAN:
        weight = plain.get_submodule(layer).weight
        assert torch.equal(special.get_submodule(layer).weight, weight)
        assert torch.equal(last.get_submodule(layer).weight, weight)
        assert torch.equal(half.get_submodule(layer).weight, weight.bfloat16())
        assert torch.equal(double.get_submodule(layer).weight, weight.double())
    assert special.conv.threshold == -3
    assert last.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "mlp", "small-dense"])
def test_every_weight_of_a_model_is_drawn(name):
    one, same = make(name, classes=10, width=8), make(name, classes=10, width=8)
    one(images())
    for model in (one, same):
        init_weights(model, "kaiming_normal", 0)
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key


# Messages


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"arch": "resnet19"}, ["--arch: ", "'resnet19'", "choose from", *MODELS]),
        ({"arch": "ResNet18"}, ["--arch: ", "'ResNet18'"]),
        (
            {"resnet_type": "tiny", "option": "--kind"},
            ["--kind: ", "'tiny'", "choose from", *RESNET_TYPES],
        ),
        ({"width": -1}, ["--width: -1"]),
        (
            {"resnet_type": "small-dense"},
            ["--width: small-dense needs it (channels of every stage)"],
        ),
        ({"resnet_type": "small-dense-inc"}, ["--width: small-dense-inc needs it"]),
        ({"arch": "vgg16", "size": 15}, ["--arch: vgg16", "16 pixels", "15"]),
        ({"arch": "resnet34", "imagenet": True}, ["--arch: ", "choose from resnet18, resnet50"]),
        ({"arch": "vgg16", "imagenet": True}, ["--arch: ", "choose from resnet18, resnet50"]),
        (
            {"resnet_type": "small-dense", "width": 8, "imagenet": True, "option": "--kind"},
            ["--kind: ", "choose from large, res50"],
        ),
        ({"width": 32, "imagenet": True}, ["--width: "]),
        ({"channels": 1, "imagenet": True}, ["--arch: ", "colour", "1 channel"]),
    ],
)
def test_messages_are_one_line_that_names_the_option(options, parts):
    with pytest.raises(OptionError) as error:
        build(**{"arch": "resnet18", "classes": 10, **options})
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("--")
    for part in parts:
        assert part in message


def test_unknown_init():
    with pytest.raises(OptionError, match=r"^--init: .*'zeros'; choose from kaiming_normal, .*"):
        init_weights(Net(), "zeros", 0)


def test_resnet_type_replaces_arch():
    assert RESNET_TYPES["large"] is MODELS["resnet18"].build
    assert RESNET_TYPES["res50"] is MODELS["resnet50"].build
    for kind, parameters in [("large", 11_689_512), ("res50", 25_557_032)]:
        model = build("vgg16", classes=1000, resnet_type=kind, imagenet=True)
        assert count(model) == parameters


@pytest.mark.parametrize("width", range(1, 9))
def test_narrow_networks_train_on_odd_batches_in_channels_last(width):
    """Strided 1x1 convolutions of under 8 channels corrupt memory here, in oneDNN (Projection)."""
    model = build("resnet20", classes=10, width=width)
    model.to(memory_format=torch.channels_last)
    for batch in (13, 7, 5):
        images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
        model(images).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert {m.stride for m in strided} == {(1, 1)}
