"""One epoch and one evaluation.

No step waits for a GPU: losses and hits are summed there and read when the epoch ends, or about
once a second for the progress bar. From a loss that is not finite on the optimizer moves no weight
(`divergence.Lookout`), so that the layer where it began can still be told then.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from startsparse import processes, seeding
from startsparse.data import AnyBatches
from startsparse.divergence import (
    Lookout,
    NonFiniteLoss,
    NonFiniteNetwork,
    first_bad_layer,
    require_finite,
)
from startsparse.masks import mask_gradients, masked_weights
from startsparse.method import PLAIN, Method
from startsparse.totals import Totals, means, new_sums

__all__ = [
    "Learner",
    "NonFiniteLoss",
    "NonFiniteNetwork",
    "evaluate",
    "first_bad_layer",
    "means",
    "new_sums",
    "require_finite",
    "train_epoch",
]


class Learner:
    """A network and its optimizer: all that `train_epoch` needs in every step.

    A subclass may do more around a step: `Trainer` counts FLOPs, saves and stops.

    Attributes:
        lookout: in an epoch, whether its losses are finite.
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
        devices: Sequence[torch.device] = (),
    ):
        """Args:
        model: the network that owns weights and masks.
        forward: inputs -> logits; the network itself (the default), compiled, or on several
            devices.
        autocast: of the forward pass (default: off).
        clip_norm: largest norm of the gradients inside the masks; 0: no clipping.
        seed: of the run. It seeds PyTorch's global generators, from which dropout draws, before
            each step by (seed, epoch, step); None: they are left alone.
        devices: those that ``forward`` uses (default: those of the parameters).
        """
        self.model, self.optimizer = model, optimizer
        # A compiled network is true or false by its length, which it may not have.
        self.forward = model if forward is None else forward
        self.autocast = autocast or torch.autocast("cpu", enabled=False)
        self.label_smoothing, self.clip_norm, self.seed = label_smoothing, clip_norm, seed
        self.devices = set(devices) or {parameter.device for parameter in model.parameters()}
        self.lookout: Lookout | None = None

    def seed_of(self, epoch: int, step: int) -> int | None:
        """The seed of the generators from which a step may draw."""
        return None if self.seed is None else seeding.derive(self.seed, "step", epoch, step)

    def seed_generators(self, seed: int | None) -> None:
        """Seed the generators that are used, with the bits of `torch.manual_seed`.

        That seeds those of all devices there are, and takes a hundred times as long.
        """
        if seed is None:
            return
        if any(device.type not in ("cpu", "cuda") for device in self.devices):
            torch.manual_seed(seed)
            return
        torch.default_generator.manual_seed(seed)
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)

    def before_step(self, method: Method, step: int) -> None:
        """Called before the forward pass of ``step`` of the phase."""
        method.before_step(step, self.model, self.optimizer)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over the processes; called after the backward pass."""
        processes.all_average_gradients(parameters)

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
    optimizer = learner.optimizer
    masked = [(w, mask) for _, w, mask in masked_weights(learner.model) if w.requires_grad]
    hidden = None if processes.shows() else True
    bar = tqdm(total=len(batches), initial=start, desc=title, leave=False, disable=hidden)
    # Before the first step: thousands in a row cost a third of what one costs between two steps.
    rates = {step: learning_rate(step) for step in range(start, len(batches))}
    seeds = {step: learner.seed_of(epoch, step) for step in rates}
    shown, totals = time.monotonic(), Totals(sums)
    with bar, Lookout(learner, batches, totals, epoch) as lookout:
        for step, (inputs, labels) in enumerate(batches.epoch(epoch, start), start):
            lookout.step, lookout.inputs = step, inputs
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            learner.before_step(method, first + step)
            learner.seed_generators(seeds[step])
            learning = [
                p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
            ]
            if processes.world_size() == 1:
                loss = _forward(learner, inputs, labels, totals, step)
            else:
                loss = _forward_part(learner, inputs, labels, totals, step, batches.size(step))
            if totals.bad == step:
                lookout.look()
            lookout.hold()
            for parameter in learning:
                parameter.grad = None
            loss.backward()
            _move_weights(learner, method, first + step, learning, masked)
            bar.update()
            if time.monotonic() - shown > 1:
                lookout.look()
                bar.set_postfix({k: f"{v:.4f}" for k, v in means(sums).items()}, refresh=False)
                shown = time.monotonic()
            learner.after_step(method, first + step)
        lookout.look()
    processes.all_reduce(sums)


def _forward(learner: Learner, inputs: Tensor, labels: Tensor, totals: Totals, step: int) -> Tensor:
    """The loss of a batch; adds it to ``totals``."""
    with learner.autocast:
        logits = learner.forward(inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=learner.label_smoothing)
    totals.add(loss.detach(), logits.detach(), labels, step)
    return loss


def _forward_part(
    learner: Learner, inputs: Tensor, labels: Tensor, totals: Totals, step: int, size: int
) -> Tensor:
    """`_forward` of this process's part of a batch of ``size``.

    The mean over the processes of what they return is the loss of the batch.
    """
    if len(labels) < size:
        share = len(labels) / size
        return _forward(learner, inputs, labels, totals, step) * (share * processes.world_size())
    if processes.rank() > 0:  # all have the whole batch, and rank 0 counts it
        totals = Totals(new_sums(totals.sums.device))
    with processes.alone():  # BatchNorm has all examples here
        return _forward(learner, inputs, labels, totals, step)


def _move_weights(
    learner: Learner,
    method: Method,
    step: int,
    learning: list[nn.Parameter],
    masked: list[tuple[Tensor, Tensor]],
) -> None:
    """From the gradients of this process's part of a batch to the new weights."""
    optimizer = learner.optimizer
    learner.average_gradients(learning)
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
    totals = Totals(new_sums(device))
    for inputs, labels in batches.epoch(0):
        with autocast:
            logits = forward(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        totals.add(loss, logits, labels, 0)
    totals.fold()
    return means(processes.all_reduce(totals.sums))
