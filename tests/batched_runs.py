"""Shared by the tests of small networks trained together: networks, data, recipes."""

import torch

from startsparse.data.rows import Rows
from startsparse.masks import attach_masks, draw_masks, sparse_layers
from startsparse.models import build, init_weights
from startsparse.tabular.batched import Recipe

CPU = torch.device("cpu")
RECIPES = {
    "adam": Recipe("adam", lr=1e-2),
    "adam-decay": Recipe("adam", lr=1e-3, weight_decay=1e-2),
    "sgd": Recipe("sgd", lr=0.02, momentum=0.9, weight_decay=5e-4),
    "nesterov": Recipe("sgd", lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "plain-sgd": Recipe("sgd", lr=0.1, momentum=0.0),
}


def network(seed, density, dtype=torch.float32, width=24):
    model = build("mlp", classes=3, channels=7, size=1, width=width)
    init_weights(model, "kaiming_normal", seed)
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [density] * len(shapes), seed, "bernoulli"))
    return model.to(dtype)


def networks(dtype=torch.float32):
    """Two networks of one seed that differ in their masks, and three others."""
    settings = ((1, 1.0), (1, 0.5), (2, 0.5), (3, 0.1), (4, 0.03))
    return [network(seed, density, dtype) for seed, density in settings]


def part(seed, dtype=torch.float32, examples=90, batch_size=16):
    """Five steps of 16 rows and one of 10 in an epoch."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(examples, 7, generator=draw, dtype=torch.float64).to(dtype)
    labels = (features[:, :3] + features[:, 3:6] * features[:, 1:4]).argmax(1)
    return Rows(features, labels, batch_size=batch_size, device=CPU, seed=seed)


def compare(one, other, name, dtype, **close):
    """Assert that networks agree: in their states, or under Adam, if very sparse, in their outputs.

    If a unit of a very sparse network is always active, BatchNorm cancels its bias, and the scale
    of its weight if it has only one. Such a gradient is pure rounding, and Adam turns it into full
    steps.
    """
    features = part(9, dtype).features
    for number, (mine, theirs) in enumerate(zip(one, other)):
        states = mine.state_dict(), theirs.state_dict()
        assert list(states[0]) == list(states[1])
        for key, value in states[0].items():
            if "adam" not in name or number < 3:
                torch.testing.assert_close(value, states[1][key], **close, msg=key)
        assert states[0]["hidden.2.num_batches_tracked"] == 24
        found, expected = mine(features), theirs(features)  # with statistics of the batch
        torch.testing.assert_close(found, expected, rtol=0, atol=100 * close["atol"])
