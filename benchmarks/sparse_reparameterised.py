"""Soft thresholds and edge-popup computed sparsely, times faster than masked.

ResNet18 for 32x32 images in a uniform random mask of density 0.1. Soft thresholds use half of it,
and so does edge-popup with a sparsity of 0.05, ranked per layer or globally. Training
steps (forward, backward, SGD with momentum) and inference of batches of 64, all layers sparse
(``--sparse-compute on``) against ``off``, in turns in one run.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.sparse_compute import inference, sgd, step
from benchmarks.steps import interleaved, random_images
from ER_SLT.edge_popup import RANKINGS, set_density
from ER_SLT.main import plan, pop_up
from ER_SLT.options import SLTOptions
from startsparse import er
from startsparse.data import Shape
from startsparse.engine.network import SparseForm
from startsparse.masks import density_table, masked_weights
from STR.main import network
from STR.options import STROptions

SHAPE, BATCH, PAIRS = Shape(classes=10, channels=3, size=32), 64, 5
MASK = {"arch": "resnet18", "er_sparse_method": "uniform", "er_sparse_init": 0.1}


def soft() -> nn.Module:
    """Soft thresholds, each at the median of the weights inside the mask."""
    model, _ = network(STROptions(**MASK, conv_type="STRConvER"), SHAPE)
    for name, weight, mask in masked_weights(model):
        median = weight.detach()[mask].abs().median()
        model.get_submodule(name).threshold_logit.data.fill_(median.logit())
    return model


def popup(ranking: str) -> nn.Module:
    """Edge-popup."""
    options = SLTOptions(**MASK, sparsity=0.05, global_ranking=ranking == "global")
    model, requested = plan(options, SHAPE)
    er.attach_er_masks(model, requested, options)
    pop_up(model, options)
    set_density(model, options.sparsity)
    return model


def show(name: str, masked: Callable[[], float], sparse: Callable[[], float]) -> None:
    """Measure both and print a line."""
    seconds, others, ratio = interleaved(masked, sparse, PAIRS)
    print(f"{name:<32} {1e3 * seconds:9.1f} {1e3 * others:9.1f} {ratio:13.2f}", flush=True)


def main() -> None:
    images = random_images(BATCH, torch.device("cpu"), torch.contiguous_format)
    last = images.to(memory_format=torch.channels_last)
    print(f"{'':<32} {'masked ms':>9} {'ms':>9} {'times faster':>13}")
    makers = {"soft thresholds": soft}
    makers |= {f"edge-popup, {r} ranking": lambda r=r: popup(r) for r in RANKINGS}
    for name, make in makers.items():
        masked = make().to(memory_format=torch.channels_last)
        model = copy.deepcopy(masked)
        form, optimizer = SparseForm(model, (3, 32, 32)), sgd(model)
        form.compute_sparsely(form.layers)
        with form.within(optimizer):
            show(name, step(masked, sgd(masked), last), step(form, optimizer, images))
            masked.eval(), model.eval()
            show("  inference", inference(masked, last), inference(form, images))
        print(f"  density {density_table(model).iloc[-1].density:.4f}", flush=True)


if __name__ == "__main__":
    main()
