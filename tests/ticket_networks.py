"""A small network for tickets, trained a little, and its reconstruction from a ticket."""

import torch
from torch import nn

from ER_SLT.edge_popup import popup, set_density
from ER_SLT.initializers import init_weights
from ER_SLT.ticket import put_in_place
from startsparse.masks import attach_masks, draw_masks, sparse_layers

DESCRIPTION = {"initBias": "ortho-nonzero-bias", "seed": 7, "bfac": 0.5, "accuracy": 0.1 + 0.2}


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    )


def images():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def rebuild(ticket, ranking="layer"):
    """The network of a ticket, rebuilt from the ticket alone."""
    model, options = plain(), ticket.description
    attach_masks(model, ticket.er_masks)
    init_weights(model, options["initBias"], options["seed"], options["bfac"])
    popup(model, options["seed"], "constant", ranking)
    put_in_place(model, ticket)
    return model.eval()


def trained(ranking="layer", steps=3):
    """A tiny ticket; its last layer is dense."""
    model = plain()
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    masks = draw_masks(shapes, [0.6, 0.4, 1.0], DESCRIPTION["seed"], "bernoulli")
    del masks["7"]
    attach_masks(model, masks)
    init_weights(model, DESCRIPTION["initBias"], DESCRIPTION["seed"], DESCRIPTION["bfac"])
    popup(model, DESCRIPTION["seed"], ranking=ranking)
    set_density(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(steps):
        model(images()).square().mean().backward()
        optimizer.step()
    return model.eval()
