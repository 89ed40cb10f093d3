"""A small network for tickets, and its reconstruction from a ticket."""

import torch
from torch import nn

from ER_SLT.edge_popup import popup
from ER_SLT.initializers import init_weights
from ER_SLT.ticket import put_in_place
from startsparse.masks import attach_masks


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
