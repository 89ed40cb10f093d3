"""One epoch and one evaluation.

Nothing in the step reads a value back from the device: losses and hits are summed there and read
when the epoch ends, or about once a second for the progress bar.
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
    """Training met a loss that is NaN or infinite."""


def new_sums(device: torch.device) -> Tensor:
    """float64 [4]: sum of losses, hits, examples, and first step with a bad loss (inf: none)."""
    return torch.tensor([0.0, 0.0, 0.0, torch.inf], dtype=torch.float64, device=device)


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (in [0, 1]) of `new_sums`. Waits for the device."""
    loss, hits, examples, _ = sums.tolist()
    return {"loss": loss / max(examples, 1), "accuracy": hits / max(examples, 1)}


class Learner:
    """A network and how it descends: what `train_epoch` needs in every step.

    A subclass may do more around a step; `Trainer` counts FLOPs, saves and stops there.
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
        clip_norm: of the gradients inside the masks; 0: they are not clipped.
        seed: of the run. PyTorch's global generators, from which dropout draws, are seeded before
            each step by (seed, epoch, step); None: they are left alone.
        """
        self.model, self.optimizer = model, optimizer
        self.forward = forward or model
        self.autocast = autocast or torch.autocast("cpu", enabled=False)
        self.label_smoothing, self.clip_norm, self.seed = label_smoothing, clip_norm, seed

    def before_step(self, method: Method, step: int) -> None:
        """Called before the forward pass of ``step`` of the phase."""
        method.before_step(step, self.model, self.optimizer)

    def average_gradients(self, parameters: Sequence[nn.Parameter], examples: int) -> None:
        """Called after the backward pass: make the gradients those of the whole batch."""
        processes.all_average_gradients(parameters, examples)

    def after_step(self, method: Method, step: int) -> None:
        """Called when the weights have moved in ``step`` of the phase."""
        method.after_step(step, self.model, self.optimizer)

    def first_bad_layer(self, inputs: Tensor) -> str:
        """What went first where the loss of ``inputs`` is not finite; "" if it cannot be told."""
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
    """Train for one epoch, or for what is left of it.

    Args:
        learning_rate: step of the epoch -> learning rate.
        sums: `new_sums`, added to in place; of all processes when the epoch is done.
        epoch: number of the epoch, from which the order of the data derives.
        start: first step; later than 0 when an interrupted epoch is resumed.
        method: what is done besides descending (default: nothing).
        first: number in the phase of the epoch's first step, for ``method``.
        title: of the progress bar.

    Raises:
        NonFiniteLoss: names the step, and the layer that went first if it can be told. On the CPU
            at once; on a GPU, where looking means waiting, within about a second.
    """
    learner.model.train()
    found = masked_weights(learner.model)
    masked = [(weight, mask) for _, weight, mask in found if weight.requires_grad]
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
    """The loss of a batch, which is added to ``sums``."""
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
    """From the gradients of this process's part of a batch to the weights after the step."""
    optimizer = learner.optimizer
    learning = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    learner.average_gradients(learning, examples)
    method.after_backward(step, learner.model, optimizer)
    # Layers that compute only inside their mask have no gradient outside it, or here.
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
def first_bad_layer(model: nn.Module, inputs: Tensor, autocast: torch.autocast) -> str:
    """What went first in a network whose loss is not finite; "" if it cannot be told.

    Weights that are not finite, unless all are; else the first module whose output is not.
    """
    bad = {name: not bool(p.isfinite().all()) for name, p in model.named_parameters()}
    if any(bad.values()):
        return "" if all(bad.values()) else f"weights of {next(n for n in bad if bad[n])}"
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if not found and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with autocast:
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f"output of {found[0]}" if found else ""
