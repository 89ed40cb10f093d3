"""Layers that compute with another weight than the one they store: the one type for all of them.

A *formula* is a subclass of `EffectiveLayer` that says what the weight and bias of a layer become.
Soft thresholds and edge-popup are two; a new one is about ten lines::

    class Powered(EffectiveLayer):
        zeros_learn = False
        entrywise = True

        def effective(self):
            return self.weight * self.weight.abs(), self.bias

    replace_layers(model, Powered)

Masks, densities, FLOPs, sparse compute, checkpoints and export then work with it, for they ask this
type. Masks may be attached before or after. `plain_state` is the network without its formulas.
"""

from collections.abc import Callable, Collection, ItemsView, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from startsparse.cached import cached


class EffectiveLayer(nn.Module):
    """A convolution or linear layer that computes with `effective` weight and bias.

    A subclass is a formula for both kinds of layers; `replace_layers` applies it to plain layers.
    These keep their ``weight``, ``bias`` (or None) and ``weight_mask``, if any. `set_up` adds
    further parameters that learn.

    Attributes:
        zeros_learn: whether the gradient of an effective weight that is zero counts. Every formula
            sets it. With False the sparse form leaves that gradient zero.
        entrywise: whether `effective` works entry by entry, or by the order of the entries alone.
            The sparse form then passes it the vectors of entries inside the mask, instead of the
            weight and all parameters of its shape, and no mask. With False it picks these entries
            from the whole effective weight, which costs a pass over it in each step.
        replaced: the class of the plain layer.
        plain_names: keys of the plain layer in its state_dict.
        held: what `effective_of_all` has computed for this layer, while the network computes.
    """

    zeros_learn: ClassVar[bool]
    entrywise: ClassVar[bool] = False
    replaced: ClassVar[type[nn.Module]]
    formula: ClassVar[type["EffectiveLayer"]]

    weight: nn.Parameter
    bias: nn.Parameter | None
    plain_names: frozenset[str]
    held: tuple[Tensor, Tensor | None] | None = None

    def __init_subclass__(cls) -> None:
        """Refuse an incomplete formula.

        Raises:
            TypeError: names the part.
        """
        if not isinstance(getattr(cls, "zeros_learn", None), bool):
            raise TypeError(
                f"{cls.__name__}: an EffectiveLayer says zeros_learn = True or False: whether the "
                "gradient of an effective weight that is zero counts"
            )
        if cls.effective is EffectiveLayer.effective:
            raise TypeError(
                f"{cls.__name__}: an EffectiveLayer has effective(self), which returns the weight "
                "and the bias to compute with"
            )

    def set_up(self, *_settings: Any) -> None:
        """Add the formula's parameters and buffers; takes the settings of `replace_layers`.

        Their names come after those of the plain layer in its state_dict.
        """

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias to compute with, shapes as ``weight`` and ``bias``.

        Zero where a mask leaves the weight zero.
        """
        raise NotImplementedError

    @classmethod
    def agree(cls, layers: Sequence[Any]) -> None:
        """Decide jointly for the layers of a network, in forward order; by default do nothing.

        `replace_layers` has the network call it before each forward pass.
        """

    @classmethod
    def effective_of_all(
        cls,
        layers: Sequence[Any],  # noqa: ARG003
    ) -> Sequence[tuple[Tensor, Tensor | None]] | None:
        """`agree` and `effective` of all layers of a network at once; by default None.

        On a GPU, where each operation takes time to start, a formula may need far fewer operations
        for all layers together. None: here it does not, and they compute one by one. The network
        calls it before each forward pass. What it returns is what `effective` would.
        """
        return None

    @classmethod
    def effective_weights(cls, layers: Sequence[Any]) -> list[Tensor]:
        """`effective_weight` of each of ``layers``; a formula may need fewer operations for all."""
        return [layer.effective_weight() for layer in layers]

    def present(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the forward pass computes with."""
        return self.effective() if self.held is None else self.held

    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        return self.effective()[0]

    @torch.no_grad()
    def check(self) -> None:
        """Check the shapes of `effective`, and that its weight is zero outside the mask.

        Raises:
            TypeError: it is not as `effective` promises.
        """
        name, mask = self.formula.__name__, getattr(self, "weight_mask", None)
        stored, effective = (self.weight, self.bias), self.effective()
        for kind, *pair in zip(("weight", "bias"), stored, effective):
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in pair]
            if shapes[0] != shapes[1]:
                raise TypeError(f"{name}.effective: a {kind} of {shapes[0]} becomes {shapes[1]}")
        if mask is not None and bool(self.effective_weight()[~mask].any()):
            raise TypeError(f"{name}.effective: weights outside the mask are not 0")

    def __reduce__(self) -> tuple:
        """Pickle by formula and plain class, as the class of the layer is created when needed."""
        return _blank, (self.formula, self.replaced), self.__dict__

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save as usual, and write the formula's name into the metadata, for `formulas`."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination._metadata[prefix[:-1]]["formula"] = self.formula.__name__


class _Conv2d(nn.Conv2d):
    """The forward pass of a convolution with an effective weight."""

    present: Callable[[], tuple[Tensor, Tensor | None]]

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self._conv_forward(inputs, *self.present())


class _Linear(nn.Linear):
    """The forward pass of a linear layer with an effective weight."""

    present: Callable[[], tuple[Tensor, Tensor | None]]

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., n_in] -> [..., n_out]."""
        return F.linear(inputs, *self.present())


@cached
def _layer_class(formula: type[EffectiveLayer], replaced: type[nn.Module]) -> type[EffectiveLayer]:
    """The class of a layer ``replaced`` with this formula.

    A subclass of Conv2d or Linear keeps its own forward pass, and its ``super().forward`` computes
    with the effective weight.
    """
    kind, forward = (
        (nn.Conv2d, _Conv2d) if issubclass(replaced, nn.Conv2d) else (nn.Linear, _Linear)
    )
    bases = (formula, *[replaced] * (replaced is not kind), forward)
    parts = {"formula": formula, "replaced": replaced, "__module__": formula.__module__}
    return type(f"{formula.__name__}{replaced.__name__}", bases, parts)


def _blank(formula: type[EffectiveLayer], replaced: type[nn.Module]) -> EffectiveLayer:
    kind = _layer_class(formula, replaced)
    return kind.__new__(kind)


def replace_layers(
    model: nn.Module,
    formula: type[EffectiveLayer],
    *settings: Any,
    dense: Collection[str] = (),
) -> dict[str, Any]:
    """Give all convolutions and linear layers but those named in ``dense`` a formula, in place.

    Only the class of a module changes; it stays the same object with its tensors, masks and hooks.

    Args:
        settings: arguments of `EffectiveLayer.set_up`.

    Returns:
        The layers of ``formula``, name -> module, in forward order.

    Raises:
        TypeError: `EffectiveLayer.check`; or a layer has a formula already.
    """
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and name not in dense
    }
    for name, layer in layers.items():
        if isinstance(layer, EffectiveLayer):
            raise TypeError(f"'{name}' has a formula already: {layer.formula.__name__}")
        plain_names = frozenset(layer.state_dict()) - {"weight_mask"}
        layer.__class__ = _layer_class(formula, type(layer))
        layer.plain_names = plain_names
        layer.set_up(*settings)
        layer.check()
    for joint in ("agree", "effective_of_all"):
        if getattr(formula, joint).__func__ is not getattr(EffectiveLayer, joint).__func__:
            model.register_forward_pre_hook(_before)
            model.register_forward_hook(_after, always_call=True)
            break
    return effective_layers(model, formula)


def effective_layers(
    model: nn.Module, formula: type[EffectiveLayer] = EffectiveLayer
) -> dict[str, Any]:
    """The layers of ``formula`` (default: of any), name -> module, in forward order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, formula)}


def agree(model: nn.Module) -> None:
    """Let the layers of each formula decide jointly (`EffectiveLayer.agree`)."""
    for formula, layers in by_formula(model):
        formula.agree(layers)


def by_formula(model: nn.Module) -> ItemsView[type[EffectiveLayer], list[EffectiveLayer]]:
    """The layers of each formula, in forward order."""
    groups: dict[type[EffectiveLayer], list[EffectiveLayer]] = {}
    for layer in effective_layers(model).values():
        groups.setdefault(layer.formula, []).append(layer)
    return groups.items()


def _before(model: Any, _inputs: object) -> None:
    """Compute what the layers decide and compute together; ``model`` may be a replica."""
    model.holding = []
    for formula, layers in by_formula(model):
        together = formula.effective_of_all(layers)
        if together is None:
            formula.agree(layers)
            continue
        model.holding += layers
        for layer, held in zip(layers, together):
            layer.held = held


def _after(model: Any, *_: object) -> None:
    for layer in model.holding:
        layer.held = None
    model.holding = []


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State of the ordinary network that computes the same.

    Weights and biases are the effective ones, or those inside the mask. There are no masks and no
    tensors of a formula or a method. BatchNorm without weight and bias gets 1 and 0.
    """
    agree(model)
    # Keyed by module, since a layer may have several names.
    effective = {layer: layer.effective() for layer in effective_layers(model).values()}
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if not _is_plain(module, kind):
            continue
        if module in effective and kind in ("weight", "bias"):
            tensor = effective[module][kind == "bias"].detach()
        elif (mask := getattr(module, f"{kind}_mask", None)) is not None:
            tensor = tensor * mask
        state[name] = tensor
        if kind == "running_mean" and isinstance(module, _BatchNorm) and module.weight is None:
            state[f"{path}.weight"] = torch.ones_like(tensor)
            state[f"{path}.bias"] = torch.zeros_like(tensor)
    return state


def _is_plain(module: nn.Module, kind: str) -> bool:
    """Whether the parameter or buffer ``kind`` of ``module`` is one of an ordinary network."""
    if isinstance(module, EffectiveLayer):
        return kind in module.plain_names
    if type(module) in (nn.Conv2d, nn.Linear):
        return kind in ("weight", "bias")
    return kind != "weight_mask"


def formulas(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> formula, for layers of a saved state_dict that compute with another weight."""
    metadata = getattr(state, "_metadata", {})
    return {name: entry["formula"] for name, entry in metadata.items() if "formula" in entry}
