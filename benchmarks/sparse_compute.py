"""Training steps, inference and memory of networks that compute only inside their masks.

A step is forward, backward and SGD with momentum, on one batch. The base of all figures is the
dense network in the faster of PyTorch's two layouts; both take turns in one run. The masked network
is measured too, and SparseProp (Nikdan et al., ICML 2023) if it is installed, which may keep layers
dense that are faster so. Goals, times faster than dense: ResNet18 1.5, 2.7, 4.2, 9 at density 0.2,
0.1, 0.05, 0.01; VGG16 3, 10 at 0.1, 0.01; MLP 1.8, 3.5, 8 at 0.1, 0.05, 0.01; inference at 0.05: 3;
lists of entries after a change of masks at most 0.3 of a dense step; bytes of weights, gradients
and momentum at most 3 times the density, index lists included.

``--save`` also writes what it prints to sparse_compute.csv beside this file, and its picture.
"""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps import interleaved, random_images
from startsparse import er, masks, models
from startsparse.engine.choice import choose
from startsparse.engine.network import SparseForm
from startsparse.models.mlp import MLP
from startsparse.options import Options

# network -> layer-wise ratio, batch, shape of an image
NETWORKS = {
    "resnet18": ("uniform", 64, (3, 32, 32)),
    "vgg16": ("balanced", 64, (3, 32, 32)),
    "mlp": ("uniform", 128, (1, 28, 28)),
    "resnet20": ("ERK", 128, (3, 32, 32)),
}
DENSITIES = {"resnet18": (0.2, 0.1, 0.05, 0.01), "vgg16": (0.1, 0.01), "mlp": (0.1, 0.05, 0.01)}
# pairs of measurements, and steps in a row that make one measurement
PAIRS = {"resnet18": (5, 2), "vgg16": (5, 3), "mlp": (10, 50), "resnet20": (15, 1)}
INFERENCE = 0.05  # density of the networks that are evaluated


def network(arch: str, density: float) -> nn.Module:
    """The network with random masks, or without any at density 1."""
    ratio, _, (_, size, _) = NETWORKS[arch]
    if arch == "mlp":  # 784-1024-1024-10
        model = MLP(size * size, 10, width=1024, hidden=2)
    else:
        model = models.build(arch, classes=10)
    models.init_weights(model, "kaiming_normal", 1)
    if density < 1:
        options = Options(er_sparse_method=ratio, er_sparse_init=density)
        er.attach_er_masks(model, er.requested_densities(model, options), options)
    return model


def step(
    forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor
) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    labels = torch.arange(len(images)) % 10

    def run() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - started

    return run


def inference(forward: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], float]:
    """A function that evaluates the batch and returns the seconds."""

    @torch.inference_mode()
    def run() -> float:
        started = time.perf_counter()
        forward(images)
        return time.perf_counter() - started

    return run


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of all networks here."""
    return torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True)


def dense(arch: str, images: Tensor) -> list[nn.Module | Tensor]:
    """The dense network and its batch, in the faster layout."""
    candidates = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network(arch, 1.0).to(memory_format=layout)
        batch = images.to(memory_format=layout)
        candidates.append((step(model, sgd(model), batch), model, batch))
    (plain, *of_plain), (last, *of_last) = candidates
    return of_plain if interleaved(plain, last, *PAIRS[arch])[2] < 1 else of_last


def sparseprop(model: nn.Module, images: Tensor) -> nn.Module | None:
    """``model`` with SparseProp's layers where it finds them faster; None: not installed."""
    try:
        from sparseprop.modules import sparsify_if_faster
        from sparseprop.utils import generate_intermediate_shapes, swap_module
    except ImportError:
        return None
    model = copy.deepcopy(model)
    shapes, _ = generate_intermediate_shapes(model, images.shape[1:])
    for name, layer in masks.sparse_layers(model).items():
        if name != "conv1":  # there it would compute the gradient of the images, which is slow
            swap_module(model, name, sparsify_if_faster(layer, (len(images), *shapes[name])))
    return model


def sparse_form(arch: str, density: float, images: Tensor) -> tuple[nn.Module, SparseForm]:
    """The masked network and its sparse form, in which layers stay dense that are faster so."""
    model = network(arch, density).to(memory_format=torch.channels_last)
    form = SparseForm(model, NETWORKS[arch][2])
    form.compute_sparsely(choose(form, images, 10).faster)
    return model, form


def stored(form: SparseForm, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Bytes of weights, gradients and momentum, and of index lists, over those of a dense network.

    The dense network has no lists: both are divided by its weights, gradients and momentum.
    """
    dense_bytes = 3 * 4 * sum(mask.numel() for _, _, mask in masks.masked_weights(form.model))
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.dim() != 1]
    weights += [form.layers[name].values for name in form.computes]
    state = [t for w in weights for t in (w, w.grad, *optimizer.state[w].values()) if t is not None]
    lists = [t for name in form.computes for t in form.layers[name].lists()]
    return _bytes(state) / dense_bytes, _bytes(lists) / dense_bytes


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Table:
    """The measurements, printed line by line."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        print(f"{'':<31} {'dense ms':>9} {'ms':>8} {'times faster':>13}")

    def add(
        self, arch: str, density: float, form: str, mine: Callable[[], float],
        base: Callable[[], float],
    ) -> float:  # fmt: skip
        """Measure ``mine`` against ``base``; returns the base's seconds."""
        counts = (20, 10) if form.startswith("inference") else PAIRS[arch]
        seconds, dense_seconds, ratio = interleaved(mine, base, *counts)
        name = f"{arch} {density:g}, {form}"
        row = 1e3 * dense_seconds, 1e3 * seconds, 1 / ratio
        print("{:<31} {:9.1f} {:8.1f} {:13.2f}".format(name, *row), flush=True)
        names = "network", "density", "form", "dense_ms", "ms", "times_faster"
        self.rows.append(dict(zip(names, (arch, density, form, *row))))
        return dense_seconds

    def save(self) -> None:
        """sparse_compute.csv and sparse_compute.png."""
        from matplotlib.figure import Figure

        here = Path(__file__)
        table = pd.DataFrame(self.rows)
        table.round(3).to_csv(here.with_suffix(".csv"), index=False)
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axis, (arch, densities) in zip(figure.subplots(1, 3), DENSITIES.items()):
            ratio, batch, _ = NETWORKS[arch]
            for form in ("sparse", "SparseProp", "masked"):
                rows = table[(table["network"] == arch) & (table["form"] == form)]
                axis.plot(rows["density"], rows["times_faster"], "o-", label=form)
            axis.axhline(1, color="black", lw=1, ls=":", label="dense")
            axis.set(
                xscale="log", yscale="log", xlabel="density", title=f"{arch}, {ratio}, {batch}"
            )
            axis.invert_xaxis()
            ticks = [t for t in (0.5, 1, 2, 5, 10, 20) if t < 1.3 * table["times_faster"].max()]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xticks(densities, [f"{density:g}" for density in densities])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        figure.axes[0].set_ylabel("times faster than dense")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(here.with_suffix(".png"), dpi=110)


def main(save: bool = False) -> None:
    table = Table()
    for arch, densities in DENSITIES.items():
        _, size, shape = NETWORKS[arch]
        images = random_images(size, torch.device("cpu"), torch.contiguous_format, shape)
        base, batch = dense(arch, images)
        base_step = step(base, sgd(base), batch)
        for density in densities:
            model, form = sparse_form(arch, density, images)
            other, optimizer = sparseprop(network(arch, density), images), sgd(model)

            started = time.perf_counter()
            for name, _, mask in masks.masked_weights(model):
                form.layers[name].set_mask(mask)
            lists = time.perf_counter() - started

            masked = step(model, optimizer, images.to(memory_format=torch.channels_last))
            table.add(arch, density, "masked", masked, base_step)
            with form.within(optimizer):
                mine = step(form, optimizer, images)
                dense_seconds = table.add(arch, density, "sparse", mine, base_step)
                weights, indices = stored(form, optimizer)
                print(
                    f"    {len(form.computes)} of {len(form.layers)} layers; lists after a change "
                    f"of masks {lists / dense_seconds:.2f} of a dense step; stored {weights:.3f} "
                    f"of dense, lists {indices:.3f}",
                    flush=True,
                )
            if other is not None:
                theirs = step(other, sgd(other), images)
                table.add(arch, density, "SparseProp", theirs, base_step)
        model, form = sparse_form(arch, INFERENCE, images)
        model.eval(), base.eval()
        with form.within():
            for count in (1, 64):
                mine, theirs = inference(form, images[:count]), inference(base, batch[:count])
                table.add(arch, INFERENCE, f"inference {count}", mine, theirs)
    if save:
        table.save()


if __name__ == "__main__":
    main("--save" in sys.argv)
