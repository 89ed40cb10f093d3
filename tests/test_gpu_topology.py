"""Updates of the masks on a pretended GPU: few waits, few launches, and the masks of the CPU."""

import pytest
import torch

KINDS = {
    "GraNet": {"method": "GraNet"},
    "GraNet, flow": {"method": "GraNet", "preserve_flow": True},
    "GraNet, uniform": {"method": "GraNet_uniform"},
    "GraNet, uniform, flow": {"method": "GraNet_uniform", "preserve_flow": True},
    "RigL": {"method": "DST"},
    "SET": {"method": "DST", "growth": "random"},
    "momentum": {"method": "DST", "growth": "momentum"},
    "within the initial mask": {"method": "GraNet", "within_initial": True},
    "GMP": {"method": "GMP"},
    "GMP, uniform": {"method": "GMP_uniform"},
}


def network(arch, device):
    """In the middle of a training, with gradients, momentum and masks."""
    from ER_DST.dynamic import remember
    from ER_DST.topology import GROWTH, add_to_momentum
    from startsparse import models
    from startsparse.masks import attach_masks, draw_masks, sparse_layers

    model = models.build(arch, classes=10, size=32, width=4)
    models.init_weights(model, "kaiming_normal", 1)
    layers = sparse_layers(model)
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    attach_masks(model, draw_masks(shapes, [0.3] * len(shapes), 1, "bernoulli"))
    model.to(device).to(memory_format=torch.channels_last)
    remember(model, GROWTH["momentum"])
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw).to(device)
        parameter.grad = torch.empty_like(parameter).copy_(noise)
    add_to_momentum(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.step()
    turn_gradients(model)
    return model, optimizer


def turn_gradients(model):
    """Other gradients, which lie in memory as before."""
    for parameter in model.parameters():
        parameter.grad.copy_(parameter.grad.roll(1, 0))


def updates(log):
    """What three updates in a row cost on the GPU, and whether they are those of the CPU."""
    from ER_DST.dynamic import move
    from ER_DST.topology import Change
    from startsparse import flops
    from startsparse.masks import nnz

    found = {}
    for arch in ("resnet20", "vgg11"):
        for name, kind in KINDS.items():
            here, there = network(arch, "cpu"), network(arch, torch.device("cuda", 0))
            nnz(there[0])  # as `emptied` does before the training
            costs, same = [], True
            for step, density in enumerate((0.29, 0.26, 0.25)):
                change = Change(seed=1, step=step, density=density, fraction=0.3, **kind)
                for model, _ in (here, there):
                    turn_gradients(model)
                with log.counting() as cost:
                    row = move(*there, change)
                    flops.densities(there[0])
                costs.append(cost)
                if kind.get("growth") == "random":
                    same &= move(*here, change)["density"] == row["density"]
                else:
                    same &= move(*here, change) == row
            if kind.get("growth") != "random":
                for tensor, other in zip(tensors(*here), tensors(*there)):
                    same &= torch.equal(tensor, other.cpu())
            found[f"{arch}, {name}"] = [costs, bool(same)]
    return found


def prunings(log):
    """Waits of each pruner, and whether the GPU prunes as the CPU does."""
    from unittest import mock

    from startsparse import pruning
    from startsparse.masks import masked_weights, nnz

    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = {}
    for pruner in pruning.PRUNERS:
        masks = []
        for device in (torch.device("cpu"), torch.device("cuda", 0)):
            model, _ = network("resnet20", device)
            batch = images.to(device), labels.to(device)
            count = round(0.8 * sum(nnz(model).values()))
            with mock.patch.object(pruning, "ROUNDS", 2), log.counting() as cost:
                pruning.prune(
                    model,
                    pruner,
                    count,
                    seed=1,
                    level=1,
                    batch=lambda batch=batch: batch,
                    shape=(1, 3, 32, 32),
                )
            masks.append([mask.cpu() for _, _, mask in masked_weights(model)])
        found[pruner] = [cost["waits"], all(map(torch.equal, *masks))]
    return found


def repairs(log):
    """Waits of flow preservation by magnitude, and whether the GPU's is that of the CPU."""
    from startsparse import flow
    from startsparse.masks import masked_weights

    masks = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        model, _ = network("resnet20", device)
        for _, _, mask in masked_weights(model):
            mask[::2] = False
        with log.counting() as cost:
            flow.repair(model, 1, 0, by_magnitude=True)
        masks.append([mask.cpu() for _, _, mask in masked_weights(model)])
    return [cost["waits"], all(map(torch.equal, *masks))]


def tensors(model, optimizer):
    yield from model.state_dict().values()
    for parameter in model.parameters():
        yield parameter.grad
        yield optimizer.state[parameter]["momentum_buffer"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_waits_and_launches_little_and_is_that_of_the_cpu(gpu, kind):
    found = [gpu.call(updates)[f"{arch}, {kind}"] for arch in ("resnet20", "vgg11")]
    for costs, same in found:
        assert same
        for cost in costs:
            assert cost["waits"] <= (2 if "flow" in kind else 1)
            assert cost["launches"] <= 135
    (many_layers, _), (few_layers, _) = found
    assert many_layers == few_layers


@pytest.mark.parametrize("kind", ["masked", "levels"])
def test_masks_cost_one_launch_in_a_step(gpu, kind):
    """Of a few hundred: at most 1.02 times those of the dense network."""
    masked, dense = (gpu(name)["launches"]["step"] for name in (kind, "dense"))
    assert masked - dense <= 1
    assert masked <= 1.02 * dense


def test_levels_are_pruned_as_on_the_cpu_by_every_pruner(gpu):
    found = gpu.call(prunings)
    assert all(same for _, same in found.values())
    assert found["mag"][0] <= 30  # one for each layer and a few


def test_flow_is_preserved_on_the_cpu_after_one_transfer(gpu):
    assert gpu.call(repairs) == [2, True]  # of masks, and of magnitudes
