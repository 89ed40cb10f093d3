"""The layers of --conv-type: a new kind is its formula and a line here."""

from typing import NamedTuple

from startsparse.effective import EffectiveLayer
from STR.thresholds import SoftThresholded


class ConvType(NamedTuple):
    """What the layers of a network are.

    Attributes:
        masked: whether they have a random mask.
        formula: of the weight that they compute with; None: it is their own.
        settings: the options, in order, that the formula is set up with.
    """

    masked: bool
    formula: type[EffectiveLayer] | None = None
    settings: tuple[str, ...] = ()


_THRESHOLD = SoftThresholded, ("sInit_value", "sparse_function")

CONV_TYPES: dict[str, ConvType] = {
    "DenseConv": ConvType(masked=False),
    "ConvMask": ConvType(masked=True),
    "STRConv": ConvType(False, *_THRESHOLD),
    "STRConvER": ConvType(True, *_THRESHOLD),
}
