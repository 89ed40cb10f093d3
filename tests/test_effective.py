"""A formula of a few lines, taken all the way: training, resume, sparse compute, export."""

import copy
import io
import json
import pickle

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from script_runs import Crash, crashing, few_digits, newest, same, weights
from torch import nn

from startsparse import checkpoint, data, effective, masks
from startsparse.effective import EffectiveLayer, effective_layers, plain_state, replace_layers
from startsparse.engine.lowering import UnsupportedError
from startsparse.engine.network import SparseForm
from startsparse.export import command, load
from startsparse.trainer import Trainer
from STR import main as script
from STR.conv_types import CONV_TYPES, ConvType

HARD = 0.1


class Gain(EffectiveLayer):
    """What is above a threshold, times a gain of each output that learns."""

    zeros_learn = False

    def set_up(self):
        self.gain = nn.Parameter(self.weight.new_ones(len(self.weight)))

    def effective(self):
        gain = self.gain.view(-1, *[1] * (self.weight.dim() - 1))
        return self.weight * (self.weight.abs() > HARD) * gain, self.bias


class Straight(EffectiveLayer):
    """What is above a threshold, with a gradient to all, as in binary networks."""

    zeros_learn = True
    entrywise = True

    def effective(self):
        hard = self.weight * (self.weight.abs() > HARD)
        return self.weight + (hard - self.weight).detach(), self.bias


FORMULAS = [Gain, Straight]


# From a script to an exported file

ARGV = "--arch resnet20 --width 4 --epochs 2 --batch-size 32 --er-sparse-init 0.5 --lr 0.05"


@pytest.fixture
def train(monkeypatch, tmp_path, no_pictures):
    """Run STR/main.py with ConvMask of a formula; the run folder, and the trainer that tested."""
    monkeypatch.setitem(data.SETS, "digits", few_digits(64, 20))
    test, seen = Trainer.test, []
    monkeypatch.setattr(Trainer, "test", lambda trainer: seen.append(trainer) or test(trainer))

    def train(formula, *argv, where="a"):
        monkeypatch.setitem(CONV_TYPES, "ConvMask", ConvType(True, formula))
        folders = ["--log-dir", f"{tmp_path / where}/runs", "--result-dir", f"{tmp_path / where}"]
        script.main([*ARGV.split(), *argv, *folders])
        return newest(tmp_path / where), seen[-1]

    return train


@pytest.mark.parametrize("formula", FORMULAS)
def test_from_training_to_export(formula, train, monkeypatch):
    argv = ["--sparse-compute", "on", "--save-every", "1"]
    folder, trainer = train(formula, *argv)

    # Killed after a checkpoint within the first epoch, and the last one within the second.
    for count in (1, 3):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Trainer, "save", crashing("after", count))
            train(formula, *argv, where=f"parts{count}")
        assert same(folder, train(formula, *argv, "--resume", "auto", where=f"parts{count}")[0])

    # Densities and FLOPs by hand, from the tested checkpoint.
    state, table = weights(folder, "best.pt"), pd.read_csv(folder / "density.csv")
    table = table.set_index("layer")
    assert set(table["computes"][:-1]) == {"sparse"}
    layers = masks.sparse_layers(trainer.model)
    kept = {n: (state[f"{n}.weight"].abs() > HARD) & state[f"{n}.weight_mask"] for n in layers}
    assert table["kept"][:-1].to_dict() == {name: int(x.sum()) for name, x in kept.items()}
    inside = sum(int(state[f"{name}.weight_mask"].sum()) for name in layers)
    assert 0 < table.loc["total", "kept"] < 0.97 * inside
    sides = dict.fromkeys(layers, 1) | {"conv1": 32}
    sides |= {n: 32 // 2 ** int(n[7]) for n in layers if n.startswith("stages.")}
    summary = json.loads((folder / "summary.json").read_text())
    flops = {name: 2 * sides[name] ** 2 * int(x.sum()) for name, x in kept.items()}
    assert summary["inference_flops"] == pytest.approx(sum(flops.values()), rel=1e-12)

    # Export and back.
    trainer.load_selected()
    model, test = trainer.model.eval(), trainer.data.test
    with torch.inference_mode():
        images = torch.cat([images for images, _ in test.epoch(0)])
        labels = torch.cat([labels for _, labels in test.epoch(0)])
        logits = model(images)
    for format in ("safetensors", "csr"):
        command.main([str(folder), "--repeats", "0", "--format", format])
        (path,) = (folder / "export").glob(f"*.{format}*" if format == "csr" else "network.safe*")
        with torch.inference_mode():
            found = load(path)(images)
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
        accuracy = (found.argmax(1) == labels).double().mean().item()
        assert accuracy == pytest.approx(summary["test_accuracy"], abs=1e-12)


# The sparse form

SHAPE = 3, 6, 6


def plain_network(biases=True):
    model = nn.Sequential(
        *(nn.Conv2d(3, 20, 3, padding=1, bias=biases), nn.BatchNorm2d(20), nn.ReLU()),
        *(nn.Conv2d(20, 8, 3, stride=2, padding=1, bias=biases), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10, bias=biases)),
    )
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 4
    return model.double().to(memory_format=torch.channels_last)


def network(formula, biases=True):
    """In float64, with masks of density 0.5."""
    model = plain_network(biases)
    shapes = {name: layer.weight.shape for name, layer in masks.sparse_layers(model).items()}
    masks.attach_masks(model, masks.draw_masks(shapes, [0.5] * len(shapes), 1, "bernoulli"))
    replace_layers(model, formula)
    return model


@pytest.mark.parametrize("without", [[], ["3"]])
@pytest.mark.parametrize("formula", FORMULAS)
def test_sparse_form_is_the_masked_network(formula, without):
    masked, model = network(formula), network(formula)
    form = SparseForm(model, SHAPE)
    form.compute_sparsely(set(form.layers) - set(without))
    assert form.layers.keys() == masks.sparse_layers(model).keys()
    optimizers = [
        torch.optim.Adam(x.parameters(), 1e-2, weight_decay=1e-3) for x in (masked, model)
    ]
    images = torch.randn(19, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    labels = torch.arange(19) % 10
    before = copy.deepcopy(masked.state_dict())
    for i in range(6):
        form.enter(optimizers[1])
        losses = []
        for net, forward, optimizer in zip((masked, model), (masked, form), optimizers):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            pairs = [(w.grad, mask) for _, w, mask in masks.masked_weights(net)]
            masks.mask_gradients([g for g, _ in pairs], [mask for _, mask in pairs])
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        if i % 3 == 2:
            form.leave(optimizers[1])
    for (name, one), other in zip(masked.state_dict().items(), model.state_dict().values()):
        assert (one.double() - other.double()).abs().max() < 1e-9, name
        assert name.endswith("mask") or not torch.equal(one, before[name]), name
    masked.eval(), model.eval()
    with form.within(), torch.inference_mode():
        for few in (1, 19):
            assert (form(images[:few]) - masked(images[:few])).abs().max() < 1e-9


# Layers


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "settings",
    [
        {"groups": 2},
        {"dilation": 2, "padding": 2},
        {"padding": "same", "kernel_size": (3, 5)},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"bias": False, "padding": (1, 0)},
    ],
)
def test_convolutions_of_every_kind(formula, settings):
    plain = nn.Conv2d(4, 6, **{"kernel_size": 3} | settings)
    model = nn.Sequential(copy.deepcopy(plain))
    replace_layers(model, formula)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        plain.weight[plain.weight.abs() <= HARD] = 0
        assert (plain.weight == 0).any()
        assert torch.equal(model(x), plain(x))
    assert repr(plain).partition("(")[2] == repr(model[0]).partition("(")[2]


class Doubled(nn.Conv2d):
    """A layer with a forward pass, a size and a parameter of its own."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.scale * super().forward(F.pad(x, (2, 0, 2, 0)))


def test_a_layer_with_a_forward_pass_of_its_own_keeps_it():
    model, x = nn.Sequential(Doubled(4)), torch.randn(2, 4, 6, 6)
    plain = copy.deepcopy(model)
    replace_layers(model, Gain)
    with torch.no_grad():
        model[0].gain.fill_(2)
        plain.load_state_dict(plain_state(model))
        assert (plain[0].weight.abs() > 2 * HARD).any()
        assert torch.equal(model(x), plain(x))
        assert model(x).shape == x.shape
    assert isinstance(model[0], Doubled)
    with pytest.raises(UnsupportedError, match="0: GainDoubled has no sparse form"):
        SparseForm(model, (4, 6, 6))


def test_layers_stay_the_same_objects():
    """With hooks, masks, and in both places of a network that has a layer twice."""
    layer = nn.Linear(5, 5)
    masks.attach_masks(layer, {"": torch.rand(5, 5) < 0.5})
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(5, 2))
    weight, mask = layer.weight, layer.weight_mask
    assert list(replace_layers(model, Gain, dense=["3"])) == ["0"]
    assert model[0] is model[2] is layer
    assert layer.weight is weight
    assert layer.weight_mask is mask
    assert type(model[3]) is nn.Linear
    model(torch.ones(1, 5))
    assert called == [1, 1]
    state = plain_state(model)
    assert torch.equal(state["0.weight"], layer.effective_weight())
    assert torch.equal(state["2.weight"], layer.effective_weight())
    with pytest.raises(TypeError, match="'0' has a formula already: Gain"):
        replace_layers(model, Straight)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(again):
    model, x = network(Gain), torch.randn(2, *SHAPE, dtype=torch.float64)
    other = again(model)
    assert type(other[0]) is type(model[0])
    assert torch.equal(model(x), other(x))
    with torch.no_grad():
        other[0].gain.zero_()
    assert model[0].gain.all()


def test_one_graph_for_torch_compile():
    model = network(Gain).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert torch.allclose(compiled(x), model(x), rtol=1e-12)


class Alike(Straight):
    """Layers that together keep as many weights as one of them says."""

    def set_up(self):
        self.register_buffer("order", torch.zeros(()))

    @classmethod
    @torch.no_grad()
    def agree(cls, layers):
        for number, layer in enumerate(layers, 1):
            layer.order.fill_(number)


def test_what_layers_decide_together_is_decided_before_each_use():
    model = network(Alike)

    def forget():
        for layer in effective_layers(model).values():
            layer.order.zero_()

    for use in (model, lambda _: plain_state(model), SparseForm(model, SHAPE)):
        forget()
        use(torch.randn(2, *SHAPE, dtype=torch.float64))
        assert [int(layer.order) for layer in effective_layers(model).values()] == [1, 2, 3]


class Together(Straight):
    """A formula that computes all layers at once."""

    calls = 0

    @classmethod
    def effective_of_all(cls, layers):
        cls.calls += 1
        return [(2 * layer.effective()[0], layer.bias) for layer in layers]


class NotHere(Alike):
    """One that does so elsewhere."""

    @classmethod
    def effective_of_all(cls, layers):
        return None


def test_a_formula_may_compute_all_layers_at_once():
    model, plain = network(Together).eval(), network(Straight).eval()
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for layer in masks.sparse_layers(plain).values():
            layer.effective = (lambda m: lambda: (2 * Straight.effective(m)[0], m.bias))(layer)
        Together.calls = 0
        assert torch.equal(model(x), plain(x))
    assert Together.calls == 1
    assert all(layer.held is None for layer in effective_layers(model).values())


def test_a_formula_that_computes_layers_one_by_one_here_still_agrees():
    model = network(NotHere)
    model(torch.randn(2, *SHAPE, dtype=torch.float64))
    assert [int(layer.order) for layer in effective_layers(model).values()] == [1, 2, 3]


# The plain network


@pytest.mark.parametrize("biases", [True, False])
def test_plain_state_is_that_of_a_plain_network(biases):
    model, plain = network(Gain, biases).eval(), plain_network(biases).eval()
    model[1].weight = model[1].bias = None
    model[0].register_buffer("beside", torch.ones(3))
    with torch.no_grad():
        for layer in effective_layers(model).values():
            layer.gain.uniform_(0.5, 2)
    state = plain_state(model)
    plain.load_state_dict(state)  # no name more and none less
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    assert torch.equal(plain(x), model(x))
    assert not any(tensor.requires_grad for tensor in state.values())


def test_masked_layers_beside_a_formula_have_their_masked_weights():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    masks.attach_masks(model, {"0": torch.rand(6, 6) < 0.5})
    replace_layers(model, Gain, dense=["0"])
    with torch.no_grad():
        model[0].weight += 1  # a weight that is not inside yet
    model[0].register_buffer("beside", torch.ones(3))
    state = plain_state(model)
    assert torch.equal(state["0.weight"], model[0].weight * model[0].weight_mask)
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_file_tells_which_layers_have_a_formula(tmp_path):
    model = network(Gain)
    path = tmp_path / "a.pt"
    checkpoint.save_by_rank_0(path, {"model": model.state_dict()})
    checkpoint.save_by_rank_0(path, checkpoint.load(path))  # as the best epoch is kept
    assert effective.formulas(checkpoint.load(path)["model"]) == dict.fromkeys("037", "Gain")
    assert effective.formulas(plain_state(model)) == {}
    stored = io.BytesIO()
    torch.save(nn.Linear(2, 2).state_dict(), stored)
    stored.seek(0)
    assert effective.formulas(torch.load(stored)) == {}


# Mistakes


def test_a_formula_without_a_part():
    with pytest.raises(TypeError, match="Half: an EffectiveLayer says zeros_learn = True or"):

        class Half(EffectiveLayer):
            def effective(self):
                return self.weight, self.bias

    with pytest.raises(TypeError, match=r"Other: an EffectiveLayer has effective\(self\)"):

        class Other(EffectiveLayer):
            zeros_learn = True


@pytest.mark.parametrize("masks_first", [True, False])
def test_a_formula_that_leaves_its_mask(masks_first):
    class Shifted(EffectiveLayer):
        zeros_learn = True

        def effective(self):
            return self.weight + 1, self.bias

    model = nn.Sequential(nn.Linear(4, 4))
    steps = [
        lambda: masks.attach_masks(model, {"0": torch.eye(4) > 0}),
        lambda: replace_layers(model, Shifted),
    ]
    first, then = steps if masks_first else steps[::-1]
    first()
    with pytest.raises(TypeError, match=r"Shifted.effective: weights outside the mask are not 0"):
        then()


def test_a_formula_with_another_shape():
    class Wrong(EffectiveLayer):
        zeros_learn = False

        def effective(self):
            return self.weight, self.weight.sum(1)[:, None]

    with pytest.raises(TypeError, match=r"Wrong.effective: a bias of \(3,\) becomes \(3, 1\)"):
        replace_layers(nn.Linear(4, 3), Wrong)
    with pytest.raises(TypeError, match=r"Wrong.effective: a bias of None becomes \(3, 1\)"):
        replace_layers(nn.Linear(4, 3, bias=False), Wrong)
