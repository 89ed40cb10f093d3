"""Layers that lose their last weight while a network trains."""

import logging

import torch
from torch import nn

from startsparse.errors import OptionError, UserError
from startsparse.fields import flag
from startsparse.masks import CUT, nnz, sparse_layers
from startsparse.options import Options

log = logging.getLogger("startsparse")


class Emptied:
    """The empty layers of a network, of which each is warned of once.

    Attributes:
        known: names of the layers that the run has warned of.
    """

    def __init__(self, model: nn.Module, options: Options):
        self.model, self.options = model, options
        self.known: set[str] = set()

    @torch.no_grad()
    def check(self, when: str) -> None:
        """Warn, in one line, of layers that became empty. Waits for the device.

        Args:
            when: for the message, as in "after epoch 3".

        Raises:
            UserError: no layer has a weight.
        """
        layers = sparse_layers(self.model)
        empty = [name for name, count in nnz(self.model).items() if not count]
        if len(empty) == len(layers):
            raise UserError(
                f"{_flags(self.options)}: no weight is left {when}, all layers are empty "
                "and the network computes nothing; ask for more weights"
            )
        new = [name for name in empty if name not in self.known]
        self.known = set(empty)
        if new:
            log.warning("warning: %s there is no weight left in %s; %s", when, ", ".join(new), CUT)


def require_weights(model: nn.Module, options: Options) -> None:
    """Raise `OptionError` if the density that ``options`` ask for is not one weight of ``model``.

    Args:
        model: planned, on the meta device.
    """
    total = sum(layer.weight.numel() for layer in sparse_layers(model).values())
    if round(options.requested * total) < 1:
        raise OptionError(
            f"{_flags(options)}: {options.requested:g} of {total} weights is none; "
            f"{1 / total:.2g} is one"
        )


def _flags(options: Options) -> str:
    return " or ".join(map(flag, options.density_options))
