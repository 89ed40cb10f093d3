"""Training that has diverged ends with one line, which names the step and the layer if it can."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from startsparse.errors import UserError
from startsparse.totals import Totals

if TYPE_CHECKING:
    from startsparse.data import AnyBatches
    from startsparse.training import Learner


class NonFiniteLoss(UserError):
    """A loss is NaN or infinite."""


class NonFiniteNetwork(UserError):
    """Weights, scores, running statistics or the optimizer's state are NaN or infinite."""


class Lookout:
    """Whether the losses of an epoch are finite; a context manager around its steps.

    A look waits for the device, so on a GPU looks are rare. Until the next one a fused optimizer
    moves no weight after a bad loss: the weights stay those of its step, and the inputs of the step
    can be made again.

    Attributes:
        step, inputs: of the step that is done now.
    """

    def __init__(self, learner: "Learner", batches: "AnyBatches", totals: Totals, epoch: int):
        """``totals``: of the epoch."""
        self.learner, self.batches, self.totals, self.epoch = learner, batches, totals, epoch
        self.step, self.inputs = 0, torch.empty(0)
        held = totals.late and learner.optimizer.defaults.get("fused")
        self._held = torch.zeros((), device=totals.sums.device) if held else None

    def __enter__(self) -> "Lookout":
        self.learner.lookout = self
        if self._held is not None:
            # As torch.amp.GradScaler tells an optimizer to leave out a step, without a wait.
            self.learner.optimizer.found_inf = self._held  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        self.learner.lookout = None
        if self._held is not None:
            del self.learner.optimizer.found_inf  # type: ignore[attr-defined]

    def hold(self) -> None:
        """Called between loss and optimizer: after a bad loss it moves nothing."""
        if self._held is not None:
            torch.lt(self.totals.sums[3], math.inf, out=self._held)

    def look(self) -> None:
        """Make the sums those of all batches; raise `NonFiniteLoss` if one is not finite."""
        self.totals.fold()
        first = self.totals.sums[3].item()
        if first == math.inf:
            return
        step, layer, learner = int(first), "", self.learner
        if step == self.step:
            layer = learner.first_bad_layer(self.inputs)
        elif self._held is not None:
            learner.seed_generators(learner.seed_of(self.epoch, step))
            inputs, _ = next(self.batches.epoch(self.epoch, step))
            layer = learner.first_bad_layer(inputs)
        where = f"; {layer}" if layer else "; too late to tell which layer went first"
        raise NonFiniteLoss(f"the loss is not finite at step {step + 1}{where}")


@torch.no_grad()
def require_finite(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, when: str = ""
) -> None:
    """Raise `NonFiniteNetwork` if training has diverged although its losses are finite.

    Scores that are NaN choose weights all the same. Infinite running statistics, and infinite
    moments of Adam, make outputs and updates zero. So a loss need not show it. Waits for the
    device once.

    Args:
        when: ends "... is not finite", for the message.
    """
    tensors = dict(model.state_dict())
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for what, state in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(state):
                    tensors[f"{what} of {name}, in the optimizer,"] = state
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    finite = [tensor.isfinite().all() for tensor in floating.values()]
    device = next(model.parameters()).device
    for name, is_finite in zip(floating, torch.stack([f.to(device) for f in finite]).tolist()):
        if not is_finite:
            raise NonFiniteNetwork(
                f"training has diverged: {name} is not finite{when}; try a lower --lr or "
                "--weight-decay"
            )


@torch.no_grad()
def first_bad_layer(model: nn.Module, inputs: Tensor, autocast: torch.autocast) -> str:
    """What is not finite first in a network whose loss is not; "" if it cannot be told.

    It is the first weights that are not finite ("" if none are finite), or the first module whose
    output is not.
    """
    bad = {name: not bool(p.isfinite().all()) for name, p in model.named_parameters()}
    if any(bad.values()):
        return "" if all(bad.values()) else f"weights of {next(n for n in bad if bad[n])}"
    outputs: list[str] = []

    def look(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if not outputs and not output.isfinite().all():
                outputs.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with autocast:
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f"output of {outputs[0]}" if outputs else ""
