"""Shared by the tests of ER_DST: a tiny data set and network, trained in this process."""

import dataclasses
from functools import partial
from pathlib import Path

import torch

from ER_DST import main as script
from ER_DST.dynamic import phase
from ER_DST.options import DSTOptions
from startsparse import flops
from startsparse.data import Batches, Data, Shape
from startsparse.masks import masked_weights
from startsparse.method import Method
from startsparse.phases import Phase
from startsparse.trainer import Trainer

CPU = torch.device("cpu")
SHAPE = Shape(classes=4, channels=1, size=4)
STEPS = 4  # of an epoch

# 16 -> 8 -> 8 -> 8 -> 4: 128 + 64 + 64 + 32 weights
SMALL = {"arch": "mlp", "width": 8, "epochs": 2, "update_frequency": 2, "sparse": True}
WEIGHTS = 288


# The command of the original README, word by word.
PUBLISHED = (
    "--sparse --method GraNet --prune-rate 0.5 --optimizer sgd --sparse-init "
    "ER_same_params_per_layer --init-density 0.01 --final-density 0.001 --update-frequency 1000 "
    "--l2 0.0005 --lr 0.1 --epochs 160 --model vgg16 --data cifar10 --prune magnitude "
    "--init-method default --is-prune True --flow-preservation True --ortho-repair False --seed 1"
)


class NoRun:
    """A run folder that gets checkpoints only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = self.show = self.write_table = lambda *_: None


def some_data() -> Data:
    """Random images of a few grey pixels, with labels that depend on them."""
    images = torch.randint(
        256, (84, 4, 4, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    labels = images[:, :2, :2].float().mean((1, 2, 3)).sub(75).div(26).long().clamp(0, 3)
    split = partial(Batches, images, labels, mean=(0.5,), std=(0.3,), batch_size=16, device=CPU)
    rows = torch.arange(84).split([16 * STEPS, 10, 10])
    return Data(split(seed=1, rows=rows[0]), split(rows=rows[1]), split(rows=rows[2]), SHAPE)


def random_data(shape: Shape, split: list[int], batch_size: int) -> Data:
    """Noise of some shape, with labels in turn, split into training, validation and test."""
    size, count = (shape.size, shape.size, shape.channels), sum(split)
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(256, (count, *size), dtype=torch.uint8, generator=draw)
    labels = torch.arange(count) % shape.classes
    channels = {"mean": (0.5,) * shape.channels, "std": (0.3,) * shape.channels}
    part = partial(Batches, images, labels, **channels, batch_size=batch_size, device=CPU)
    rows = torch.arange(count).split(split)
    return Data(part(seed=1, rows=rows[0]), part(rows=rows[1]), part(rows=rows[2]), shape)


def options(**values) -> DSTOptions:
    """Checked options of a small run."""
    checked = DSTOptions(**SMALL | values)
    checked.check()
    return checked


def begin(folder: Path, options: DSTOptions, dataset: Data | None = None) -> tuple[Trainer, Phase]:
    """A trainer as main.py makes it, and its one phase; ``dataset`` replaces `some_data`."""
    dataset = dataset or some_data()
    model, *_ = script.network(options, dataset, CPU, folder)
    trainer = Trainer(model, dataset, options, NoRun(folder), [CPU], lambda: flops.densities(model))
    return trainer, phase(options, len(dataset.train), partial(trainer.add_row, "topology"))


class Watched(Method):
    """A method whose after_backward is ``look(step, act)``; ``act()`` does what it did before."""

    def __init__(self, method: Method, look):
        self.method, self.look = method, look
        self.dense_gradients = method.dense_gradients
        self.moves_masks = method.moves_masks
        self.needs_dense_gradients = method.needs_dense_gradients

    def after_backward(self, step, model, optimizer):
        self.look(step, lambda: self.method.after_backward(step, model, optimizer))


def watched(whole: Phase, look) -> Phase:
    """The phase with its method `Watched`."""
    return dataclasses.replace(whole, method=Watched(whole.method, look))


def train(folder: Path, options: DSTOptions, look=None, dataset: Data | None = None) -> Trainer:
    """The trainer after a whole run; ``look(trainer, step, masks before)`` after each update."""
    trainer, whole = begin(folder, options, dataset)

    def after_update(step: int, act) -> None:
        rows, before = len(trainer.tables.get("topology", [])), masks(trainer.model)
        act()
        if len(trainer.tables.get("topology", [])) > rows:
            look(trainer, step, before)

    trainer.run_phases([watched(whole, after_update) if look else whole])
    return trainer


def masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the masks."""
    return {name: mask.clone() for name, _, mask in masked_weights(model)}


def counts(model: torch.nn.Module) -> dict[str, int]:
    """Weights of each masked layer."""
    return {name: int(mask.sum()) for name, _, mask in masked_weights(model)}


def dead_units(model: torch.nn.Module) -> int:
    """Units without an incoming or outgoing edge in a masked layer, counted one by one."""
    dead = 0
    for _, _, mask in masked_weights(model):
        edges = {tuple(index[:2]) for index in mask.nonzero().tolist()}
        for side in (0, 1):
            dead += len(set(range(mask.shape[side])) - {edge[side] for edge in edges})
    return dead
