"""The graph convolutional network of Kipf and Welling (2017, arXiv:1609.02907)."""

import torch
from torch import Tensor, fx, nn

from startsparse.sparse_rows import symmetric_product

fx.wrap("symmetric_product")  # a traced network has it as one function

_PARTS = {
    "starts": Tensor.crow_indices,
    "columns": Tensor.col_indices,
    "values": Tensor.values,
}


class GCN(nn.Module):
    """Z = A relu(A X W0) W1, the logits of equation 9, with dropout before both layers.

    A = D^-1/2 (adjacency + I) D^-1/2 is `renormalised`. The input is the features of all nodes, (N,
    features), anything that flattens to it, or `SparseRows`; the output is (N, classes) logits. As
    in the paper, there are no biases.

    Args:
        adjacency: float32 sparse COO [N, N], symmetric with diagonal 0; with None the network has
            its layers, but no forward pass.
    """

    graph_starts: Tensor
    graph_columns: Tensor
    graph_values: Tensor

    def __init__(
        self, features: int, classes: int, adjacency: Tensor | None, *, width: int = 16
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(features, width, bias=False)
        self.classifier = nn.Linear(width, classes, bias=False)
        graph = None if adjacency is None else renormalised(adjacency).to_sparse_csr()
        # In parts, as a CSR tensor cannot be copied or pickled with its module. They belong to the
        # data, not to the weights, so they are not in checkpoints. Copies, as torch.compile takes
        # no views of a sparse tensor.
        for name in ("starts", "columns", "values"):
            part = None if graph is None else _PARTS[name](graph).clone()
            self.register_buffer(f"graph_{name}", part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, classes)."""
        hidden = torch.relu(self._mixed(self.hidden(self.dropout(x.flatten(1)))))
        return self._mixed(self.classifier(self.dropout(hidden)))

    def _mixed(self, units: Tensor) -> Tensor:
        """A times ``units`` [N, U]."""
        graph = self.graph_starts, self.graph_columns, self.graph_values
        return symmetric_product(units, *graph)


def renormalised(adjacency: Tensor) -> Tensor:
    """D^-1/2 (adjacency + I) D^-1/2 with the degrees D of adjacency + I; sparse COO [N, N].

    Kipf and Welling (2017), section 2.2, the renormalization trick.
    """
    nodes = torch.arange(len(adjacency))
    eye = torch.sparse_coo_tensor(
        torch.stack([nodes, nodes]),
        torch.ones(len(nodes), dtype=adjacency.dtype),
        adjacency.shape,
        check_invariants=True,
    )
    joined = (adjacency + eye).coalesce()
    scale = torch.sparse.sum(joined, 1).to_dense().rsqrt()
    rows, columns = joined.indices()
    values = scale[rows] * joined.values() * scale[columns]
    return torch.sparse_coo_tensor(
        joined.indices(), values, joined.shape, is_coalesced=True, check_invariants=True
    )


def gcn(*, classes: int, channels: int, size: int, width: int, adjacency: Tensor | None) -> GCN:
    """Two layers; ``width`` is the units of the hidden one, 0 is the paper's 16."""
    return GCN(channels * size * size, classes, adjacency, width=width or 16)
