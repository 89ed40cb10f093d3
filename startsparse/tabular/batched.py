"""Many small networks of one shape, trained at once as one batched model.

Parameters and buffers of the networks are stacked, and `torch.func.vmap` runs all forward passes as
one. Every network has its own weights, masks, data and order. Optimizers update each entry by
itself, so one optimizer of the stacked tensors does the same as one for each network. `train_loop`
trains one network after the other instead, in the project's training loop, where networks may
compute in their sparse forms (`compute`).
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from startsparse import optimizers, training
from startsparse.data.rows import Rows, SideBySide
from startsparse.engine.network import SparseForm
from startsparse.masks import gradient, keep_inside, mask_gradients, masked_weights


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the networks are trained. The learning rate is constant, as in the published runs."""

    optimizer: str = "adam"  # one of `optimizers.OPTIMIZERS`
    lr: float = 0.01
    weight_decay: float = 0.0
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of ``parameters``."""
        return optimizers.make_optimizer(
            self.optimizer,
            [{"params": list(parameters), "weight_decay": self.weight_decay}],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )


def train_loop(
    models: Sequence[nn.Module],
    parts: Sequence[Rows],
    recipe: Recipe,
    epochs: int,
    first_epoch: int = 0,
    forms: Sequence[SparseForm] = (),
) -> Tensor:
    """Train each network, in place, on its own part of the data, with a new optimizer.

    Args:
        models: networks of any shape.
        parts: training data of each, on its device.
        epochs: number of epochs.
        first_epoch: number of the first epoch; the order of the data derives from it.
        forms: sparse forms that compute instead of networks on the CPU (default: none).

    Returns:
        float64 [epochs, networks]: mean training loss.

    Raises:
        ValueError: a network and its data are on two devices.
        NonFiniteLoss: a loss became NaN or infinite.
    """
    losses = torch.empty(epochs, len(models), dtype=torch.float64)
    for number, (model, rows) in enumerate(zip(models, parts)):
        device = _one_device([model], [rows])
        keep_inside(model)
        optimizer = recipe.make_optimizer(model.parameters())
        form = forms[number] if forms else None
        learner = training.Learner(model, optimizer, forward=form or model)
        with form.within(optimizer) if form else contextlib.nullcontext():
            for epoch in range(epochs):
                sums = training.new_sums(device)
                training.train_epoch(
                    learner, rows, lambda _: recipe.lr, sums, epoch=first_epoch + epoch
                )
                losses[epoch, number] = training.means(sums)["loss"]
    return losses


def train_batched(
    models: Sequence[nn.Module],
    parts: Sequence[Rows],
    recipe: Recipe,
    epochs: int,
    first_epoch: int = 0,
) -> Tensor:
    """`train_loop` for networks of one shape at once, equal within rounding.

    Networks must have the same parameters and masked layers, and parts the same number of rows and
    batch size, all on one device. Seeds, weights, masks and data are each network's own. No step
    waits for a GPU: losses are read when an epoch ends.

    Raises:
        ValueError: networks or parts differ in what they must share.
        NonFiniteLoss: as `train_loop`, at the end of the epoch.
    """
    _check(models, parts)
    device, rows = _one_device(models, parts), SideBySide(parts)
    for model in models:
        keep_inside(model)
        model.train()
    parameters, buffers = stack_module_state(list(models))
    skeleton = _skeleton(models[0])
    weights = [f"{name}.weight" if name else "weight" for name, _, _ in masked_weights(models[0])]
    masks = [buffers[f"{name}_mask"] for name in weights]
    optimizer = recipe.make_optimizer(parameters.values())

    def loss_of(values: dict, state: dict, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(skeleton, (values, state), (features,)), labels)

    losses = torch.zeros(epochs, len(models), dtype=torch.float64)
    for epoch in range(epochs):
        sums = torch.zeros(len(models), dtype=torch.float64, device=device)
        for features, labels in rows.epoch(first_epoch + epoch):
            loss = vmap(loss_of)(parameters, buffers, features, labels)  # one per network
            sums += loss.detach() * labels.shape[1]
            optimizer.zero_grad()
            loss.sum().backward()  # each network's gradient comes from its own loss alone
            mask_gradients([gradient(parameters[name]) for name in weights], masks)
            optimizer.step()
        losses[epoch] = sums.cpu()
        if not losses[epoch].isfinite().all():
            bad = int((~losses[epoch].isfinite()).int().argmax())
            raise training.NonFiniteLoss(
                f"the loss of network {bad + 1} of {len(models)} is not finite in epoch {epoch + 1}"
            )
    _write_back(models, parameters, buffers)
    return losses / min(parts[0].examples, len(parts[0]) * parts[0].batch_size)


LOOPS = {"batched": train_batched, "loop": train_loop}


class _BatchNorm(nn.BatchNorm1d):
    """BatchNorm of [B, F] in training, in plain operations.

    Inside vmap PyTorch's own kernel sees the channels of all networks side by side, and its
    backward pass is a third of the whole step.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, F)."""
        mean = x.mean(0)
        centred = x - mean
        variance = centred.square().mean(0)
        with torch.no_grad():
            unbiased = len(x) / (len(x) - 1)
            self.running_mean.mul_(1 - self.momentum).add_(mean * self.momentum)
            self.running_var.mul_(1 - self.momentum).add_(variance * (self.momentum * unbiased))
            self.num_batches_tracked.add_(1)
        return centred * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias


def _skeleton(model: nn.Module) -> nn.Module:
    """The network without weights; `functional_call` fills them in."""
    skeleton = copy.deepcopy(model).to("meta")
    for name, module in list(skeleton.named_modules()):
        if type(module) is nn.BatchNorm1d:
            parent, _, child = name.rpartition(".")
            plain = _BatchNorm(module.num_features, module.eps, module.momentum, device="meta")
            setattr(skeleton.get_submodule(parent), child, plain)
    return skeleton.train()


def _check(models: Sequence[nn.Module], parts: Sequence[Rows]) -> None:
    if not models or len(models) != len(parts):
        raise ValueError(f"{len(models)} networks, {len(parts)} parts: should be equal and not 0")
    shapes = [{k: (v.shape, v.dtype) for k, v in model.state_dict().items()} for model in models]
    if any(other != shapes[0] for other in shapes):
        raise ValueError("the networks differ in their parameters or masked layers")
    if len({(part.features.shape, part.batch_size) for part in parts}) > 1:
        raise ValueError("the parts differ in their number of rows, features or batch size")


def _one_device(models: Sequence[nn.Module], parts: Sequence[Rows]) -> torch.device:
    """Where the networks and their data are."""
    devices = {next(model.parameters()).device for model in models}
    devices |= {part.labels.device for part in parts}
    if len(devices) > 1:
        where = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"the networks and their data are on {where}: should be on one device")
    return devices.pop()


@torch.no_grad()
def _write_back(models: Sequence[nn.Module], parameters: dict, buffers: dict) -> None:
    tensors = [dict((*model.named_parameters(), *model.named_buffers())) for model in models]
    for name, stacked in (*parameters.items(), *buffers.items()):
        torch._foreach_copy_([own[name] for own in tensors], stacked.unbind())
