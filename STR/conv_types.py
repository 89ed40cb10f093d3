"""The kinds of layers of --conv-type. A new kind takes a formula and a line here."""

from typing import NamedTuple

from startsparse.effective import EffectiveLayer
from STR.thresholds import SoftThresholded


class ConvType(NamedTuple):
    """A kind of layer.

    Attributes:
        masked: whether layers have a random mask.
        formula: computes the effective weight; None: layers compute with their own weight.
        settings: names of the options that the formula's ``set_up`` takes, in order.
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
