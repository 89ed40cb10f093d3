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


class NonFiniteLoss(UserError):
    """Training met a loss that is NaN or infinite."""


def new_sums(device: torch.device) -> Tensor:
    """float64 [4]: sum of losses, hits, examples, and first step with a bad loss (inf: none)."""
    return torch.tensor([0.0, 0.0, 0.0, torch.inf], dtype=torch.float64, device=device)


def means(sums: Tensor) -> dict[str, float]:
    """Mean loss and accuracy (in [0, 1]) of `new_sums`. Waits for the device."""
    loss, hits, examples, _ = sums.tolist()
    return {"loss": loss / max(examples, 1), "accuracy": hits / max(examples, 1)}


def train_epoch(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    batches: AnyBatches,
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    *,
    epoch: int,
    start: int = 0,
    seed: int | None = None,
    sums: Tensor,
    autocast: torch.autocast,
    label_smoothing: float = 0.0,
    clip_norm: float = 0.0,
    title: str = "",
    before_step: Callable[[int], None] | None = None,
    after_backward: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    share: Callable[[Sequence[nn.Parameter], int], object] = processes.average_gradients,
    blame: Callable[[Tensor], str] | None = None,
) -> None:
    """Train for one epoch, or for what is left of it.

    Args:
        model: the network that owns weights and masks.
        forward: images -> logits; the network itself, compiled, or on several devices.
        learning_rate: step of the epoch -> learning rate.
        epoch: number of the epoch, from which the order of the data derives.
        start: first step; later than 0 when an interrupted epoch is resumed.
        seed: of the run. PyTorch's global generators, from which dropout draws, are seeded before
            each step by (seed, epoch, step); None: they are left alone.
        sums: `new_sums`, added to in place; of all processes when the epoch is done.
        before_step: called with the step's number in the epoch, from 0.
        after_backward: called in each step of the epoch, with its number from 0, when gradients
            are there of all weights, inside and outside the masks; may change the masks.
        after_step: called with the number of steps done in this epoch.
        share: (parameters that learn, examples), called after the backward pass; with several
            processes it makes the gradients those of the whole batch.
        blame: images -> what went first when the loss is not finite (default: `first_bad_layer`).

    Raises:
        NonFiniteLoss: names the step, and the layer that went first if it can be told. On the CPU
            at once; on a GPU, where looking means waiting, within about a second.
    """
    model.train()
    pairs = [(weight, mask) for _, weight, mask in masked_weights(model) if weight.requires_grad]
    blame = blame or (lambda images: first_bad_layer(model, images, autocast))
    waits = sums.device.type != "cpu"
    hidden = processes.rank() > 0 or None
    bar = tqdm(total=len(batches), initial=start, desc=title, leave=False, disable=hidden)
    shown = time.monotonic()
    with bar:
        for step, (images, labels) in enumerate(batches.epoch(epoch, start), start):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            if before_step:
                before_step(step)
            if seed is not None:
                torch.manual_seed(seeding.derive(seed, "step", epoch, step))
            now = time.monotonic()
            if len(labels):  # not every process has a share of a very small batch
                with autocast:
                    logits = forward(images)
                    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
                _add(sums, loss.detach(), logits.detach(), labels, step)
                if not waits or now - shown > 1:
                    _stop_if_bad(sums, images, blame)
                optimizer.zero_grad()
                loss.backward()
            learning = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
            share(learning, len(labels))
            if after_backward:
                after_backward(step)
            # Layers that compute only inside their mask have no gradient outside it, or here.
            whole = [(w.grad, mask) for w, mask in pairs if w.grad is not None]
            mask_gradients([gradient for gradient, _ in whole], [mask for _, mask in whole])
            if clip_norm:
                nn.utils.clip_grad_norm_(learning, clip_norm)
            optimizer.step()
            bar.update()
            if now - shown > 1:
                bar.set_postfix({k: f"{v:.4f}" for k, v in means(sums).items()}, refresh=False)
                shown = now
            if after_step:
                after_step(step + 1)
        _stop_if_bad(sums, images, blame)
    processes.add_up(sums)


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
    for images, labels in batches.epoch(0):
        with autocast:
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        _add(sums, loss, logits, labels, 0)
    return means(processes.add_up(sums))


def _add(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
    hits = (logits.argmax(1) == labels).sum()
    first_bad = torch.where(loss.isfinite(), torch.inf, float(step)).double()
    count = (labels >= 0).sum().double()  # below 0: a node of a graph that is not of this part
    sums[:3] += torch.stack([loss * count, hits, count])
    sums[3] = torch.minimum(sums[3], first_bad)


def _stop_if_bad(sums: Tensor, images: Tensor, blame: Callable[[Tensor], str]) -> None:
    first_bad = sums[3].item()
    if first_bad != torch.inf:
        layer = blame(images)
        where = f"; {layer}" if layer else "; too late to tell which layer went first"
        raise NonFiniteLoss(f"the loss is not finite at step {int(first_bad) + 1}{where}")


@torch.no_grad()
def first_bad_layer(model: nn.Module, images: Tensor, autocast: torch.autocast) -> str:
    """What went first in a network whose loss is not finite; "" if it cannot be told.

    Weights that are not finite, unless all are; else the first module whose output is not.
    """
    bad = {name: not bool(p.isfinite().all()) for name, p in model.named_parameters()}
    if any(bad.values()):
        return "" if all(bad.values()) else f"weights of {next(n for n in bad if bad[n])}"
    found = []

    def look(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if not found and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with autocast:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return f"output of {found[0]}" if found else ""
