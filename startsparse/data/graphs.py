"""A graph as one batch, and Zachary's karate club, which needs no download."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from startsparse.data.rows import halves
from startsparse.sparse_rows import SparseRows

NO_LABEL = -100
"""Label of a node without a label in this part; `F.cross_entropy` ignores it."""


class GraphBatches:
    """One part of a graph; an epoch is one step, on all nodes.

    Args:
        features: float32 [N, F], of all nodes of the graph, dense or sparse.
        labels: int64 [N]; `NO_LABEL` for a node that has none.
        nodes: int64 [M], the nodes of this part.
        device: where the graph lies.

    Attributes:
        examples: nodes of the part that have a label.
    """

    def __init__(
        self,
        features: Tensor | SparseRows,
        labels: Tensor,
        nodes: Tensor,
        device: torch.device,
    ) -> None:
        visible = torch.full_like(labels, NO_LABEL)
        visible[nodes] = labels[nodes]
        self.examples = int((visible != NO_LABEL).sum())
        self.features, self.labels = features.to(device), visible.to(device)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return 1

    def size(self, step: int) -> int:  # noqa: ARG002
        """Nodes of the batch, with and without a label."""
        return len(self.labels)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, Tensor]]:  # noqa: ARG002
        """Features and labels [N] of all nodes; `NO_LABEL` outside the part.

        Dense features are [N, F, 1, 1], sparse ones `SparseRows` [N, F].
        """
        if start == 0:
            features = self.features
            if isinstance(features, Tensor):
                features = features[:, :, None, None]
            yield features, self.labels


@dataclass
class Graph:
    """A graph with features and classes of its nodes; the counterpart of `Arrays`.

    Attributes:
        features: float32 [N, F], dense, or `SparseRows` where most are 0.
        labels: int64 [N], from 0 to classes - 1; `NO_LABEL` for a node that has none.
        edges: int64 [2, E] of nodes that are joined, in either direction. Repeated edges count
            once; edges of a node with itself do not count.
        classes: number of classes.
        train: int64 [M], the nodes to train on.
        held_out: seed of the run -> nodes of the validation and of the test part.
        size: for a network, a node is an image of one pixel with F channels.
    """

    features: Tensor | SparseRows
    labels: Tensor
    edges: Tensor
    classes: int
    train: Tensor
    held_out: Callable[[int], tuple[Tensor, Tensor]]
    size: int = 1

    @property
    def channels(self) -> int:
        """Features of a node."""
        return self.features.shape[1]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.features)

    @property
    def adjacency(self) -> Tensor:
        """float32 sparse COO [N, N]: 1 where two nodes are joined; symmetric, diagonal 0."""
        edges = self.edges[:, self.edges[0] != self.edges[1]]
        pairs = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
        return torch.sparse_coo_tensor(
            pairs, torch.ones(pairs.shape[1]), (self.nodes, self.nodes), check_invariants=True
        ).coalesce()

    def batches(
        self, *, seed: int, device: torch.device, **_: object
    ) -> tuple[GraphBatches, GraphBatches, GraphBatches]:
        """Training, validation and test part; batch size and augmentation do not apply."""
        features, labels = self.features.to(device), self.labels
        parts = (self.train, *self.held_out(seed))
        train, valid, test = (GraphBatches(features, labels, part, device) for part in parts)
        return train, valid, test


def karate(root: Path, mirror: str = "") -> Graph:  # noqa: ARG001 -- the set needs no file
    """Zachary's karate club (1977): 34 members, 78 friendships, two clubs after the split.

    The features are the identity: the network knows only which member a node is. It trains on one
    member of each club, the instructor (0) and the president (33), as Kipf and Welling (2017,
    appendix A.1) do with four communities. The seed splits the other 32 into halves for validation
    and test.
    """
    from networkx import karate_club_graph  # slow to import, and no other set needs it

    club = karate_club_graph()
    return Graph(
        features=torch.eye(len(club)),
        labels=torch.tensor([int(club.nodes[node]["club"] == "Officer") for node in club]),
        edges=torch.tensor(list(club.edges())).T,
        classes=2,
        train=torch.tensor([0, 33]),
        held_out=partial(halves, torch.arange(1, 33)),
    )
