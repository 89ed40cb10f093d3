"""Sparse rows as the input of networks, against the same rows stored densely."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ER_SLT.edge_popup import Popup
from startsparse import data, masks, models
from startsparse.data.graphs import GraphBatches, karate
from startsparse.effective import replace_layers
from startsparse.engine.network import SparseForm
from startsparse.models.gcn import renormalised
from startsparse.sparse_rows import SparseRows
from startsparse.training import Learner, evaluate, first_bad_layer, new_sums, train_epoch
from STR.thresholds import SoftThresholded

CPU = torch.device("cpu")
OFF = torch.autocast("cpu", enabled=False)


def some_rows(rows=12, columns=9, dtype=torch.float64, seed=0):
    """Mostly 0, with an empty row and an empty column."""
    draw = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=draw, dtype=dtype)
    dense *= torch.rand(rows, columns, generator=draw) < 0.3
    dense[4], dense[:, 2] = 0, 0
    return dense


def some_graph(nodes=12, seed=1):
    draw = torch.Generator().manual_seed(seed)
    joined = (torch.rand(nodes, nodes, generator=draw) < 0.3).triu(1)
    return (joined | joined.T).double().to_sparse()


def network(arch, dtype=torch.float64):
    adjacency = some_graph() if arch == "gcn" else None
    model = models.build(arch, classes=3, channels=9, size=1, width=8, adjacency=adjacency)
    models.init_weights(model, "kaiming_normal", 3)
    return model.to(dtype)


def orders(model, parameters, inputs, second=True):
    """Output, gradients of the loss, and those of their weighted sum, unless not ``second``."""
    output = model(inputs)
    loss = F.cross_entropy(output, torch.arange(len(inputs)) % output.shape[1])
    first = torch.autograd.grad(loss, parameters, create_graph=second)
    if not second:
        return [output, *first]
    along = sum((g * g.detach().cos()).sum() for g in first)
    return [output, *first, *torch.autograd.grad(along, parameters)]


def same(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-12}
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients_of_both_orders(bias):
    dense, layer = some_rows(), nn.Linear(9, 4, bias=bias).double()
    rows, parameters = SparseRows(dense), list(layer.parameters())
    same(orders(layer, parameters, rows), orders(layer, parameters, dense))
    assert "dense" not in vars(rows)


@pytest.mark.parametrize("arch", ["gcn", "mlp"])
@pytest.mark.parametrize("kind", ["plain", "mask", "thresholds", "popup"])
def test_every_kind_of_layer_of_a_network(arch, kind):
    model, dense = network(arch), some_rows()
    if kind == "thresholds":
        replace_layers(model, SoftThresholded, -3.0, "sigmoid")
    if kind == "popup":
        replace_layers(model, Popup)
    if kind != "plain":
        layers = masks.sparse_layers(model)
        drawn = masks.draw_masks(
            {n: x.weight.shape for n, x in layers.items()}, [0.7] * len(layers), 1, "exact"
        )
        masks.attach_masks(model, drawn)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rows, parameters = SparseRows(dense), [p for p in model.parameters() if p.requires_grad]
    assert parameters
    second = kind in ("plain", "mask")
    found, expected = (orders(model, parameters, inputs, second) for inputs in (rows, dense))
    same(found, expected, rtol=1e-8, atol=1e-9)
    assert "dense" not in vars(rows)


def test_a_gcn_with_the_dropout_that_it_drew():
    """Forward and gradient by dense matrices, with the drawn masks taken from the layer."""
    model, dense, drawn = network("gcn"), some_rows(), []
    model.dropout.register_forward_hook(lambda *arguments: drawn.append(arguments[2]))
    model.train()
    parameters = list(model.parameters())
    loss = model(SparseRows(dense)).sin().sum()
    found = torch.autograd.grad(loss, parameters)
    first, second = drawn
    assert isinstance(first, SparseRows)
    kept = first.dense != 0
    assert 0 < kept.sum() < (dense != 0).sum()
    torch.testing.assert_close(first.dense, 2 * dense * kept)
    a, (w0, w1) = renormalised(some_graph()).to_dense(), parameters
    hidden = torch.relu(a @ (2 * dense * kept) @ w0.T)
    expected = a @ (hidden * 2 * (second != 0)) @ w1.T
    same(found, torch.autograd.grad(expected.sin().sum(), parameters))
    torch.testing.assert_close(loss, expected.sin().sum())


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_dropout_keeps_the_mean_and_draws_for_stored_numbers_only(p):
    dense = some_rows()
    rows, layer = SparseRows(dense), nn.Dropout(p)
    torch.manual_seed(2)
    drawn = torch.stack([layer(rows).dense for _ in range(4000)])
    assert torch.equal(drawn[:, dense == 0], torch.zeros(4000, int((dense == 0).sum())).double())
    stored = drawn[:, dense != 0] / dense[dense != 0]
    if p == 1:
        assert (stored == 0).all()
        return
    dropped = (stored == 0).double().mean(0)
    assert (dropped - p).abs().max() < 5 * (p * (1 - p) / 4000) ** 0.5 + 1e-12
    torch.testing.assert_close(stored.max(), torch.tensor(1 / (1 - p)).double())
    # of each two places all four cases come: they are drawn one by one
    pairs = torch.corrcoef((stored == 0).double().T).fill_diagonal_(0)
    assert p == 0 or pairs.abs().max() < 0.1


def test_dropout_follows_the_global_seed_and_stops_in_evaluation():
    rows, layer = SparseRows(some_rows()), nn.Dropout(0.5)

    def draw(seed):
        torch.manual_seed(seed)
        return layer(rows).dense

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert layer.eval()(rows) is rows


def test_any_other_function_gets_dense_rows():
    dense = some_rows()
    rows = SparseRows(dense.to_sparse())
    assert torch.equal(torch.relu(rows), dense.relu())
    assert torch.equal(torch.cat([dense, rows]), torch.cat([dense, dense]))
    assert torch.equal(torch.add(dense, other=rows), 2 * dense)
    assert (len(rows), rows.shape, rows.device) == (12, (12, 9), CPU)
    low = rows.to(torch.float32)
    assert (low.dtype, low.dense.dtype) == (torch.float32, torch.float32)
    assert torch.equal(low.transposed.to_dense(), dense.float().T)
    assert rows.flatten(1) is rows and rows.isfinite().all()


def test_under_autocast_the_product_is_in_full_precision():
    model, dense = network("gcn", torch.float32), some_rows(dtype=torch.float32)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(SparseRows(dense))
    torch.testing.assert_close(low, model(dense), atol=0.05, rtol=0.05)


def test_the_sparse_form_of_an_mlp():
    model, dense = network("mlp", torch.float32), some_rows(dtype=torch.float32)
    layers = masks.sparse_layers(model)
    drawn = masks.draw_masks({n: x.weight.shape for n, x in layers.items()}, [0.4] * 4, 1, "exact")
    masks.attach_masks(model, drawn)
    model.eval()
    expected = model(dense)
    form = SparseForm(model, (9, 1, 1))
    form.compute_sparsely(form.layers)
    with form.within(), torch.no_grad():
        torch.testing.assert_close(form(SparseRows(dense)), expected, rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_of_a_graph_make_no_dense_rows():
    rows = SparseRows(some_rows(dtype=torch.float32))
    model = network("gcn", torch.float32)
    batches = GraphBatches(rows, torch.arange(12) % 3, torch.arange(12), CPU)
    learner = Learner(model, torch.optim.Adam(model.parameters(), 0.1), seed=1)
    train_epoch(learner, data.Repeated(batches, 3), lambda _: 0.1, new_sums(CPU), epoch=0)
    evaluate(model, model, batches, OFF, CPU)
    assert "dense" not in vars(rows)


def test_rows_that_are_not_finite_are_found():
    dense = some_rows(dtype=torch.float32)
    dense[0, 0] = torch.inf
    assert (
        first_bad_layer(network("gcn", torch.float32), SparseRows(dense), OFF)
        == "output of dropout"
    )


def test_a_graph_network_is_one_compiled_graph_and_computes_the_same():
    """Sparse features stay outside: PyTorch compiles no sparse tensors."""
    graph, results = karate(None), []
    x = graph.features[:, :, None, None]
    for compiled in (False, True):
        torch.manual_seed(1)
        model = models.build(
            "gcn", classes=2, channels=34, size=1, adjacency=graph.adjacency
        ).train()
        torch._dynamo.reset()
        forward = model
        if compiled:
            forward = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        with torch.random.fork_rng():
            logits = forward(x)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
        sparse = (torch.compile(model, backend="aot_eager") if compiled else model).eval()
        results[-1].append(sparse(SparseRows(graph.features)))
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
