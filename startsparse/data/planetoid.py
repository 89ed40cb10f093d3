"""Cora, Citeseer and Pubmed: citation networks, from the files of Yang et al. (2016).

Revisiting Semi-Supervised Learning with Graph Embeddings (arXiv:1603.08861). A node is a paper, its
features are the words in it, its class is its topic, and an edge is a citation.
"""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from startsparse.console import log
from startsparse.data import files, pickles
from startsparse.data.files import File
from startsparse.data.graphs import NO_LABEL, Graph
from startsparse.errors import UserError, reason
from startsparse.sparse_rows import SparseRows

URL = "https://github.com/kimiyoung/planetoid/raw/master/data"


@dataclass(frozen=True)
class Spec:
    """The published sizes of a set, which its files must match, as there are no checksums.

    ``edges`` counts each pair of different joined nodes once; ``train``, ``valid`` and ``test`` are
    the numbers of nodes in the public split. ``content`` is a digest of the numbers in the files,
    however these are pickled ("": none is known).
    """

    name: str
    nodes: int
    features: int
    classes: int
    edges: int
    train: int
    valid: int = 500
    test: int = 1000
    url: str = URL
    content: str = ""


CORA = Spec(
    "cora",
    nodes=2708,
    features=1433,
    classes=7,
    edges=5278,
    train=140,
    content="b9add5d349095cf00204f57306086ca3",
)
CITESEER = Spec(
    "citeseer",
    nodes=3327,
    features=3703,
    classes=6,
    edges=4552,
    train=120,
    content="f5d01d24c77e22e6f254daffce99b492",
)
PUBMED = Spec("pubmed", nodes=19717, features=500, classes=3, edges=44324, train=60)


def load(spec: Spec, root: Path, mirror: str = "") -> Graph:
    """The graph of ``root/planetoid/<name>/ind.<name>.*``, with its public split.

    Missing files are fetched from ``mirror`` or ``spec.url``. The first nodes are for training, the
    500 after them for validation. test.index lists the test nodes in the order of the rows of tx.
    Citeseer has nodes in their range without a row: these have no features, no label and no part.
    The features of a node are divided by their sum (Kipf and Welling 2017, section 5.2). A warning
    says if the numbers are others than in the files that this was written for.

    Raises:
        UserError: names the file that is missing, damaged, or does not fit ``spec``.
    """
    folder = root / "planetoid" / spec.name
    names = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    paths = {
        name: files.present(folder, File(f"ind.{spec.name}.{name}"), spec.url, mirror)
        for name in names
    }
    x, tx, allx = (_features(paths[name], spec.features) for name in ("x", "tx", "allx"))
    y, ty, ally = (_classes(paths[name], spec.classes) for name in ("y", "ty", "ally"))
    for name, labels, rows in (("y", y, x), ("ty", ty, tx), ("ally", ally, allx)):
        _expect(paths[name], "rows", len(labels), len(rows))
    _expect(paths["x"], "training nodes", len(x), spec.train)
    index = _test_index(paths["test.index"], spec, first=len(allx))
    _expect(paths["tx"], "rows", len(tx), len(index))
    if len(allx) < spec.train + spec.valid:
        raise _other(paths["allx"], f"{len(allx)} rows, {spec.train + spec.valid} are needed")
    if (y == NO_LABEL).any():
        raise _other(paths["y"], "a training node without a label")

    labels = torch.full((spec.nodes,), NO_LABEL)
    labels[: len(allx)], labels[index] = ally, ty
    valid = torch.arange(spec.train, spec.train + spec.valid)
    graph = Graph(
        features=_rows(spec, (torch.arange(len(allx)), allx), (index, tx)),
        labels=labels,
        edges=_edges(paths["graph"], spec.nodes),
        classes=spec.classes,
        train=torch.arange(spec.train),
        held_out=lambda _seed: (valid, index.sort().values),
    )
    joined = graph.adjacency.indices()
    _expect(paths["graph"], "edges", joined.shape[1] // 2, spec.edges)
    found = (x, tx, allx, y, ty, ally, index, joined)
    if spec.content and spec.content != _content(*found):
        log.warning(
            "warning: %s: other numbers than in the published files: damaged, or another version "
            "of the set; delete the folder and run again to fetch it",
            folder,
        )
    return graph


def _content(*parts: Tensor) -> str:
    """A key of the numbers in tensors, dense or sparse, whatever their types."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for tensor in (part.indices(), part.values()) if part.is_sparse else (part,):
            digest.update(str(list(tensor.shape)).encode())
            digest.update(tensor.double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _other(path: Path, found: str) -> UserError:
    return UserError(f"{path}: damaged or another file: {found}; delete it and run again")


def _expect(path: Path, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise _other(path, f"{found} {what}, not {expected}")


class _Csr:
    """Stands for scipy.sparse.csr_matrix: the attributes that its pickle sets, without its code."""

    parts: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        self.parts = dict(state)


_CLASSES = {  # of old and new SciPy
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("scipy.sparse._csr", "csr_matrix"): _Csr,
}


def _unpickled(path: Path) -> Any:
    data = files.read(path, md5="")
    try:
        return pickles.loads(data, _CLASSES)
    except pickle.UnpicklingError as error:
        raise _other(path, f"no pickle of a graph ({error})") from error


def _array(path: Path, value: Any, what: str, dimensions: int) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise _other(path, f"{what} are no numbers")
    if value.ndim != dimensions:
        raise _other(path, f"{what} have {value.ndim} dimensions, not {dimensions}")
    return np.asarray(value)


def _features(path: Path, columns: int) -> Tensor:
    """float64 sparse COO [N, columns] of a pickled csr_matrix."""
    from scipy.sparse import csr_matrix  # slow to import, and seldom needed

    value = _unpickled(path)
    if not isinstance(value, _Csr):
        raise _other(path, f"a {type(value).__name__}, no csr_matrix")
    parts = value.parts
    arrays = [_array(path, parts.get(k), k, dimensions=1) for k in ("data", "indices", "indptr")]
    try:
        matrix = csr_matrix(tuple(arrays), shape=parts.get("_shape"))
        matrix.check_format()
    except (ValueError, TypeError) as error:
        raise _other(path, f"no csr_matrix ({reason(error)})") from error
    _expect(path, "features", matrix.shape[1], columns)
    coo = matrix.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float64))
    if not (values.isfinite() & (values >= 0)).all():
        raise _other(path, "a feature that is negative or not finite")
    return torch.sparse_coo_tensor(places, values, coo.shape, check_invariants=True).coalesce()


def _rows(spec: Spec, *parts: tuple[Tensor, Tensor]) -> SparseRows:
    """Features [nodes, features], each divided by the sum of its row; float32 only after that.

    Args:
        parts: nodes [M] and their features, sparse [M, features]; other nodes have none.
    """
    stored = [(nodes[part.indices()[0]], part.indices()[1]) for nodes, part in parts]
    rows, columns = (torch.cat(both) for both in zip(*stored))
    values = torch.cat([part.values() for _, part in parts])
    sums = torch.zeros(spec.nodes, dtype=torch.float64).index_add_(0, rows, values)
    places, values = torch.stack([rows, columns]), (values / sums[rows].clamp(min=1e-300)).float()
    shape = spec.nodes, spec.features
    return SparseRows(
        torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()
    )


def _classes(path: Path, columns: int) -> Tensor:
    """int64 [N] of a pickled array of one-hot rows; `NO_LABEL` for a row of zeros."""
    onehot = torch.from_numpy(_array(path, _unpickled(path), "labels", dimensions=2).astype(float))
    _expect(path, "classes", onehot.shape[1], columns)
    if not (((onehot == 0) | (onehot == 1)).all() and (onehot.sum(1) <= 1).all()):
        raise _other(path, "a row of labels that is not one-hot")
    return torch.where(onehot.any(1), onehot.argmax(1), NO_LABEL)


def _test_index(path: Path, spec: Spec, first: int) -> Tensor:
    """int64 [spec.test] nodes, from ``first`` to the last one."""
    lines = files.read(path, md5="").split()
    for odd in [line for line in lines if not line.isdigit() or len(line) > 9][:1]:
        raise _other(path, f"a line {odd.decode('latin1')!r}, no node")
    index = torch.tensor([int(line) for line in lines])
    _expect(path, "test nodes", len(index.unique()), spec.test)
    _expect(path, "lines", len(index), spec.test)
    if index.min() < first or index.max() != spec.nodes - 1:
        found = f"test nodes {int(index.min())} to {int(index.max())}"
        raise _other(path, f"{found}, not {first} or more to {spec.nodes - 1}")
    return index


def _edges(path: Path, nodes: int) -> Tensor:
    """int64 [2, E] of a pickled dict, node -> list of nodes."""
    graph = _unpickled(path)
    pairs = []
    if not isinstance(graph, dict):
        raise _other(path, f"a {type(graph).__name__}, no dict")
    for node, others in graph.items():
        if not isinstance(others, list):
            raise _other(path, f"node {node!r} has no list of nodes")
        for odd in [n for n in (node, *others) if not (type(n) is int and 0 <= n < nodes)][:1]:
            raise _other(path, f"{str(odd)[:40]!r} is no node from 0 to {nodes - 1}")
        pairs += [(node, other) for other in others]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
