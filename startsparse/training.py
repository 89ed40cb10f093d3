"""One epoch and one evaluation.

No step reads a value back from the device: losses and hits are summed there and read when the epoch
ends, or about once a second for the progress bar.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from startsparse import processes, seeding
from startsparse.data import AnyBatches
from startsparse.errors import UserError
from startsparse.masks import mask_gradients, masked_weights
from startsparse.method import PLAIN, Method


class NonFiniteLoss(UserError):
    """A loss is NaN or infinite."""


class NonFiniteNetwork(UserError):
    """Weights, scores, running statistics or the optimizer's state are NaN or infinite."""


def new_sums(device: torch.device) -> Tensor:
    """float64 [4]: sum of losses, hits, examples, and first step with a bad loss (inf: none)."""
    return torch.tensor([0.0, 0.0, 0.0, torch.inf], dtype=torch.float64, device=device)


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (in [0, 1]) of `new_sums`. Waits for the device."""
    loss, hits, examples, _ = sums.tolist()
    return {"loss": loss / max(examples, 1), "accuracy": hits / max(examples, 1)}


class Learner:
    """A network and its optimizer: all that `train_epoch` needs in every step.

    A subclass may do more around a step: `Trainer` counts FLOPs, saves and stops.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        forward: Callable[[Tensor], Tensor] | None = None,
        autocast: torch.autocast | None = None,
        label_smoothing: float = 0.0,
        clip_norm: float = 0.0,
        seed: int | None = None,
    ):
        """Args:
        model: the network that owns weights and masks.
        forward: inputs -> logits; the network itself (the default), compiled, or on several
            devices.
        autocast: of the forward pass (default: off).
        clip_norm: largest norm of the gradients inside the masks; 0: no clipping.
        seed: of the run. It seeds PyTorch's global generators, from which dropout draws, before
            each step by (seed, epoch, step); None: they are left alone.
        """
        self.model, self.optimizer = model, optimizer
        # A compiled network is true or false by its length, which it may not have.
        self.forward = model if forward is None else forward
        self.autocast = autocast or torch.autocast("cpu", enabled=False)
        self.label_smoothing, self.clip_norm, self.seed = label_smoothing, clip_norm, seed

    def before_step(self, method: Method, step: int) -> None:
        """Called before the forward pass of ``step`` of the phase."""
        method.before_step(step, self.model, self.optimizer)

    def average_gradients(self, parameters: Sequence[nn.Parameter], examples: int) -> None:
        """Make the gradients those of the whole batch; called after the backward pass."""
        processes.all_average_gradients(parameters, examples)

    def after_step(self, method: Method, step: int) -> None:
        """Called after the optimizer has moved the weights in ``step`` of the phase."""
        method.after_step(step, self.model, self.optimizer)

    def first_bad_layer(self, inputs: Tensor) -> str:
        """Where the loss of ``inputs`` first became non-finite; "" if it cannot be told."""
        return first_bad_layer(self.model, inputs, self.autocast)


def train_epoch(
    learner: Learner,
    batches: AnyBatches,
    learning_rate: Callable[[int], float],
    sums: Tensor,
    *,
    epoch: int,
    start: int = 0,
    method: Method = PLAIN,
    first: int = 0,
    title: str = "",
) -> None:
    """Train for one epoch, or for the rest of it.

    Args:
        learning_rate: step of the epoch -> learning rate.
        sums: `new_sums`, added to in place; at the end, those of all processes.
        epoch: number of the epoch, from which the order of the data derives.
        start: first step; above 0 in a resumed epoch.
        method: what the steps do besides descending (default: nothing).
        first: number in the phase of the epoch's first step, for ``method``.
        title: of the progress bar.

    Raises:
        NonFiniteLoss: names the step, and the first bad layer if it can be told. On the CPU at
            once; on a GPU, where a look makes the CPU wait, within about a second.
    """
    learner.model.train()
    masked = [(w, mask) for _, w, mask in masked_weights(learner.model) if w.requires_grad]
    hidden = processes.rank() > 0 or None
    bar = tqdm(total=len(batches), initial=start, desc=title, leave=False, disable=hidden)
    shown = time.monotonic()
    with bar:
        for step, (inputs, labels) in enumerate(batches.epoch(epoch, start), start):
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate(step)
            learner.before_step(method, first + step)
            if learner.seed is not None:
                torch.manual_seed(seeding.derive(learner.seed, "step", epoch, step))
            late = time.monotonic() - shown > 1
            if len(labels):  # not every process has a part of a very small batch
                loss = _forward(learner, inputs, labels, sums, step)
                if late or sums.device.type == "cpu":
                    _stop_if_bad(sums, inputs, learner)
                learner.optimizer.zero_grad()
                loss.backward()
            _move_weights(learner, method, first + step, len(labels), masked)
            bar.update()
            if late:
                bar.set_postfix({k: f"{v:.4f}" for k, v in means(sums).items()}, refresh=False)
                shown = time.monotonic()
            learner.after_step(method, first + step)
        _stop_if_bad(sums, inputs, learner)
    processes.all_reduce(sums)


def _forward(learner: Learner, inputs: Tensor, labels: Tensor, sums: Tensor, step: int) -> Tensor:
    """The loss of a batch; adds it to ``sums``."""
    with learner.autocast:
        logits = learner.forward(inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=learner.label_smoothing)
    _add(sums, loss.detach(), logits.detach(), labels, step)
    return loss


def _move_weights(
    learner: Learner,
    method: Method,
    step: int,
    examples: int,
    masked: list[tuple[Tensor, Tensor]],
) -> None:
    """From the gradients of this process's part of a batch to the new weights."""
    optimizer = learner.optimizer
    learning = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    learner.average_gradients(learning, examples)
    method.after_backward(step, learner.model, optimizer)
    # In layers that compute only inside their mask, the weight has no gradient.
    dense = [(weight.grad, mask) for weight, mask in masked if weight.grad is not None]
    mask_gradients([gradient for gradient, _ in dense], [mask for _, mask in dense])
    if learner.clip_norm:
        nn.utils.clip_grad_norm_(learning, learner.clip_norm)
    optimizer.step()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    batches: AnyBatches,
    autocast: torch.autocast,
    device: torch.device,
) -> dict[str, float]:
    """Mean cross-entropy and accuracy (in [0, 1]) over the examples of ``batches``."""
    model.eval()
    sums = new_sums(device)
    for inputs, labels in batches.epoch(0):
        with autocast:
            logits = forward(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        _add(sums, loss, logits, labels, 0)
    return means(processes.all_reduce(sums))


def _add(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
    hits = (logits.argmax(1) == labels).sum()
    first_bad = torch.where(loss.isfinite(), torch.inf, float(step)).double()
    count = (labels >= 0).sum().double()  # below 0: a node of a graph that is not of this part
    sums[:3] += torch.stack([loss * count, hits, count])
    sums[3] = torch.minimum(sums[3], first_bad)


def _stop_if_bad(sums: Tensor, inputs: Tensor, learner: Learner) -> None:
    first_bad = sums[3].item()
    if first_bad != torch.inf:
        layer = learner.first_bad_layer(inputs)
        where = f"; {layer}" if layer else "; too late to tell which layer went first"
        raise NonFiniteLoss(f"the loss is not finite at step {int(first_bad) + 1}{where}")


@torch.no_grad()
def require_finite(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, when: str = ""
) -> None:
    """Raise `NonFiniteNetwork` if training has diverged although its losses are finite.

    Scores that are NaN choose weights all the same. Infinite running statistics, and infinite
    moments of Adam, make outputs and updates zero. So a loss need not show it. Waits for the
    device.

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
    for name, tensor in floating.items():
        if not tensor.isfinite().all():
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
