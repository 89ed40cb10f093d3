"""What a ticket says of its run, checked before anything is built or read for it."""

from pathlib import Path

import torch

from ER_SLT.options import SLTOptions
from ER_SLT.ticket import Ticket, load_ticket
from startsparse import masks, recipe
from startsparse.commandline import from_values
from startsparse.errors import OptionError, UserError, reason
from startsparse.fields import names, normal
from startsparse.reading import is_number
from startsparse.runs import FREE


def stored(path: Path) -> tuple[Ticket, SLTOptions, float]:
    """The ticket in a file, the options of its run, and its test accuracy.

    Raises:
        OptionError: the file is no ticket of this project, or says what no run writes.
    """
    try:
        ticket = load_ticket(path)
        options, accuracy = (ticket.description.get(n) for n in ("options", "test_accuracy"))
        if not is_number(accuracy) or not 0 <= accuracy <= 1:
            raise UserError(f"{path}: its test_accuracy is {accuracy!r}, not one from 0 to 1")
        if not isinstance(options, dict):
            raise UserError(f"{path}: the ticket has no 'options'")
        known = names(SLTOptions)
        # What may differ without another result is the reader's to choose, not the ticket's.
        options = {k: v for k, v in options.items() if known.get(normal(k)) not in FREE}
        saved = from_values(SLTOptions, options, path)
    except UserError as error:
        raise OptionError(f"--evaluate: {error}") from None
    return ticket, saved, accuracy


def check_shapes(ticket: Ticket, options: SLTOptions, path: Path) -> None:
    """Raise `OptionError` where the masks are not of the network that the options describe.

    Nothing is allocated for it, whatever width the ticket claims.
    """
    try:
        with torch.device("meta"):
            layers = masks.sparse_layers(recipe.build(options, recipe.expected_shape(options)))
    except (
        RuntimeError,
        ValueError,
        TypeError,
        OverflowError,
    ) as error:  # PyTorch's, of impossible sizes
        why = f"its options build no network ({reason(error)})"
        raise OptionError(f"--evaluate: {path}: {why}") from None
    for name, layer in layers.items():
        mask, expected = ticket.found.get(f"{name}.weight"), tuple(layer.weight.shape)
        found = "missing" if mask is None else tuple(mask.shape)
        if found != expected:
            raise OptionError(
                f"--evaluate: {path}: the mask of '{name}' is {found}, not {expected}"
            )
