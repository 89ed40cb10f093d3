"""A small graph in the real format of Planetoid, with the spec that describes it.

small = write_planetoid(tmp_path)
small.loader(tmp_path, "")
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from data_files import put, python2_pickle
from scipy.sparse import csr_matrix

from startsparse.data import Loader, planetoid


@dataclass
class Small:
    """A small graph: how to load it, and the expected result."""

    spec: planetoid.Spec
    loader: Loader
    features: np.ndarray  # [N, F], as in the files
    labels: list[int]  # -100: none
    joined: np.ndarray  # bool [N, N]
    train: list[int]
    valid: list[int]
    test: list[int]


def python2_csr(dense: np.ndarray) -> bytes:
    """A csr_matrix as SciPy pickled it in 2015, under Python 2."""
    matrix = csr_matrix(dense)
    state = b"}(" + b"".join(
        python2_pickle(key)[2:-1] + value
        for key, value in {
            b"_shape": b"(" + b"".join(python2_pickle(n)[2:-1] for n in dense.shape) + b"t",
            b"maxprint": b"K\x32",
            b"indices": python2_pickle(matrix.indices.astype("<i4"))[2:-1],
            b"indptr": python2_pickle(matrix.indptr.astype("<i4"))[2:-1],
            b"data": python2_pickle(matrix.data.astype("<f4"))[2:-1],
        }.items()
    )
    return b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n)\x81" + state + b"ub."


def python2_defaultdict(graph: dict[int, list[int]]) -> bytes:
    """A defaultdict(list) of Python 2."""
    items = python2_pickle(graph)[3:]  # without protocol and empty dict
    return b"\x80\x02ccollections\ndefaultdict\n(c__builtin__\nlist\ntR" + items


def write_planetoid(root: Path, name: str = "cora", missing: int = 0, seed: int = 0) -> Small:
    """40 nodes in a ring; ``missing`` of the test nodes have no row.

    The file has the neighbours of a node once for each direction, some twice, and an edge from node
    3 to itself.
    """
    draw = np.random.default_rng(seed)
    train, valid, others, test, features, classes = 6, 8, 10, 16, 9, 3
    known = train + valid + others
    nodes = known + test
    labels = [node % classes for node in range(nodes)]
    x = (draw.random((nodes, features)) < 0.2).astype(np.float32)
    x[:, :classes] = np.eye(classes)[labels]  # no row is empty, and a network can learn
    x[5, 4] = 3
    index = draw.permutation(np.arange(known, nodes))
    # isolated: without a row, but never the last node, from which the number of nodes follows
    gone = sorted(index[index < nodes - 1][:missing].tolist())
    index = np.array([node for node in index if node not in gone])
    graph = {node: [] for node in range(nodes)}
    for node in range(nodes):
        for step in (classes, classes, 2 * classes):  # a neighbour twice
            other = (node + step) % (nodes - nodes % classes)
            if node not in gone and other not in gone and node != other:
                graph[node].append(other)
                graph[other].append(node)
    graph[3].append(3)

    onehot = np.eye(classes, dtype=np.int32)[labels]
    folder = root / "planetoid" / name
    content = {
        "x": python2_csr(x[:train]),
        "y": python2_pickle(onehot[:train]),
        "allx": python2_csr(x[:known]),
        "ally": python2_pickle(onehot[:known]),
        "tx": python2_csr(x[index]),
        "ty": python2_pickle(onehot[index]),
        "graph": python2_defaultdict(graph),
        "test.index": "".join(f"{node}\n" for node in index).encode(),
    }
    for part, data in content.items():
        put(folder / f"ind.{name}.{part}", data)

    joined = np.zeros((nodes, nodes), dtype=bool)
    for node, neighbours in graph.items():
        joined[node, neighbours] = joined[neighbours, node] = True
    np.fill_diagonal(joined, False)
    x[gone] = 0
    for node in gone:
        labels[node] = -100
    spec = replace(
        planetoid.CORA,
        name=name,
        nodes=nodes,
        features=features,
        classes=classes,
        edges=int(joined.sum()) // 2,
        train=train,
        valid=valid,
        test=len(index),
        content="",
        url="http://127.0.0.1:9",  # nothing listens there: a test never reaches the real server
    )
    return Small(
        spec,
        partial(planetoid.load, spec),
        x,
        labels,
        joined,
        list(range(train)),
        list(range(train, train + valid)),
        sorted(index.tolist()),
    )
