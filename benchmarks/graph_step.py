"""Training step of a graph network, divided by that of a plain loop with sparse features.

The two-layer GCN on random graphs with the sizes of Cora and Citeseer: one step is on all nodes,
with dropout and Adam. The plain loop is the shortest program for it in PyTorch, with features and
adjacency in CSR format; dropout and layers are those of `torch.nn.functional`. Pairs of ten steps
run back to back; the figure is the median of their ratios. Goal: at most 1.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps import devices, interleaved
from startsparse import masks, models, training
from startsparse.data import planetoid
from startsparse.data.graphs import Graph, GraphBatches
from startsparse.models.gcn import renormalised
from startsparse.sparse_rows import SparseRows
from startsparse.training import new_sums

WORDS = {planetoid.CORA: 18, planetoid.CITESEER: 32}  # features above 0 of a node, on average


def random_graph(spec: planetoid.Spec) -> Graph:
    """As many nodes, words and edges as ``spec`` says, at random places."""
    draw = torch.Generator().manual_seed(1)
    features = torch.rand(spec.nodes, spec.features, generator=draw)
    features = (features < WORDS[spec] / spec.features).float()
    return Graph(
        features=SparseRows(features / features.sum(1, keepdim=True).clamp(min=1)),
        labels=torch.randint(spec.classes, (spec.nodes,), generator=draw),
        edges=torch.randint(spec.nodes, (2, spec.edges), generator=draw),
        classes=spec.classes,
        train=torch.arange(spec.train),
        held_out=lambda _: (torch.arange(0), torch.arange(0)),
    )


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of all."""
    return torch.optim.Adam(parameters, 0.01, weight_decay=5e-4, fused=True)


def our_step(graph: Graph, device: torch.device, density: float, sparse: bool) -> Callable:
    """A step of the project's training loop, which returns its seconds."""
    model = models.build(
        "gcn", classes=graph.classes, channels=graph.channels, size=1, adjacency=graph.adjacency
    )
    if density < 1:
        shapes = {name: layer.weight.shape for name, layer in masks.sparse_layers(model).items()}
        masks.attach_masks(model, masks.draw_masks(shapes, [density] * 2, 1, "exact"))
    rows = graph.features
    assert isinstance(rows, SparseRows)
    features = rows if sparse else rows.dense
    batches = GraphBatches(features, graph.labels, graph.train, device)
    learner = training.Learner(model.to(device), adam(list(model.parameters())), seed=1)
    sums = new_sums(device)

    def step() -> None:
        training.train_epoch(learner, batches, lambda _: 0.01, sums, epoch=0)

    return timed(step, device)


def plain_step(graph: Graph, device: torch.device) -> Callable:
    """A step of a plain loop, which returns its seconds."""
    assert isinstance(graph.features, SparseRows)
    rows, a = graph.features.csr.to(device), renormalised(graph.adjacency).to_sparse_csr()
    a, labels, train = a.to(device), graph.labels.to(device), graph.train.to(device)
    w0 = torch.empty(graph.channels, 16, device=device)
    w1 = torch.empty(16, graph.classes, device=device)
    weights = [torch.nn.init.xavier_uniform_(w).requires_grad_() for w in (w0, w1)]
    optimizer = adam(weights)

    def step() -> None:
        values = F.dropout(rows.values(), 0.5)
        parts = rows.crow_indices(), rows.col_indices(), values
        x = torch.sparse_csr_tensor(*parts, rows.shape, check_invariants=False)
        hidden = F.dropout(torch.relu(a @ (x @ w0)), 0.5)
        logits = a @ (hidden @ w1)
        optimizer.zero_grad()
        F.cross_entropy(logits[train], labels[train]).backward()
        optimizer.step()

    return timed(step, device)


def timed(step: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """``step``, which then returns its seconds."""

    def measured() -> float:
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return measured


def main() -> None:
    for device in devices():
        for spec in WORDS:
            graph = random_graph(spec)
            plain = plain_step(graph, device)
            print(f"{spec.name + ', ' + device.type:<20} {'ms':>8} {'plain ms':>9} {'ratio':>6}")
            for name, density, sparse in (
                ("dense", 1, True),
                ("mask of 0.1", 0.1, True),
                ("dense features", 1, False),
            ):
                step = our_step(graph, device, density, sparse)
                mine, base, ratio = interleaved(step, plain, pairs=9, in_a_row=10)
                print(f"{name:<20} {1e3 * mine:8.2f} {1e3 * base:9.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
