"""The pretended GPU behaves as CUDA does, where other tests rely on it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

CUDA = torch.device("cuda", 0)


def errors(_log):
    """What is said where devices meet."""
    there, here = torch.ones(2, 3, device=CUDA), torch.ones(2, 3)
    tries = {
        "sum": lambda: there + here,
        "copy": lambda: there.numpy(),
        "array": lambda: there.__array__(),
        "two": lambda: there + there.to("cuda:1"),
        "list": lambda: torch._foreach_mul_([there], [here]),
        "draw": lambda: there.normal_(generator=torch.Generator()),
        "drawn": lambda: here.normal_(generator=torch.Generator("cuda")),
        "other": lambda: there.normal_(generator=torch.Generator("cuda:1")),
        "number": lambda: there * torch.tensor(2.0),  # CUDA takes one number from the CPU
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = ""
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def test_devices_do_not_mix(gpu):
    said = gpu.call(errors, gpus=2)
    assert said.pop("number") == ""
    assert all(said.values()), said
    assert "on the CPU" in said["sum"]
    assert "numpy" in said["copy"]
    assert "'cuda:0', 'cuda:1'" in said["two"]
    assert "'cuda:0' device type for generator but found 'cpu'" in said["draw"]
    assert "found 'cuda:0'" in said["drawn"]
    assert "found 'cuda:1'" in said["other"]


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "boolean index": lambda x: x[x > 0],
    "put from the GPU": lambda x: x.__setitem__(x > 0, x[0].clone()),
    "copy to CPU": lambda x: x.cpu(),
    "copy to GPU": lambda x: torch.ones(2).to(CUDA),
    "new from a list": lambda x: torch.tensor([1.0], device=CUDA),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.arange(2).to(CUDA).repeat_interleave(x[:2].long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "CPU index": lambda x: x[torch.tensor([1, 0])],
}
FREE = {
    "sum": lambda x: x.sum(),
    "fill": lambda x: x.__setitem__(x > 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "zeros": lambda x: torch.zeros(3, device=CUDA),
    "index": lambda x: x[x.argsort()],
    "pinned": lambda x: torch.ones(2).pin_memory().to(CUDA, non_blocking=True),
    "back": lambda x: x.to("cpu", non_blocking=True),
    "same": lambda x: x.to(CUDA),
    "size": lambda x: x.numel() + len(x) + x.shape[0],
}


def waits(log):
    """How often each of them waits."""
    numbers = torch.arange(3.0, device=CUDA)
    counts = {}
    for name, act in (WAITS | FREE).items():
        with log.counting() as counted:
            act(numbers.clone())
        counts[name] = counted["waits"]
    return counts


def test_each_wait_is_noted(gpu):
    counts = gpu.call(waits)
    assert {name for name in WAITS if counts[name] == 0} == set()
    assert {name for name in FREE if counts[name]} == set()


def launches(log):
    """Kernels of a few operations."""
    ones = [torch.ones(2, 3, device=CUDA) for _ in range(4)]
    bools = [tensor.bool() for tensor in ones]
    turned = [torch.ones(3, 2, device=CUDA).t() for _ in range(4)]
    counts = []
    for act in (
        lambda: ones[0] + 1,
        lambda: ones[0].view(3, 2).t().unsqueeze(0),
        lambda: torch.empty(2, device=CUDA),
        lambda: torch._foreach_mul_(ones, ones),
        lambda: torch._foreach_mul_(ones, bools),  # CUDA does these one by one
        lambda: torch._foreach_mul_(ones, turned),
    ):
        with log.counting() as counted:
            act()
        counts.append(counted["launches"])
    return counts


def test_launches_are_counted_as_cuda_does_them(gpu):
    assert gpu.call(launches) == [1, 0, 0, 1, 4, 4]


def draws(_log):
    """Numbers of seeded generators."""

    def drawn(seed, device=CUDA):
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.rand(2, generator=generator, device=device).tolist()

    cpu = torch.random.default_generator

    def dropped(manual_seed):
        manual_seed(1)
        return F.dropout(torch.ones(64, device=CUDA)).tolist()

    generator = torch.Generator(device=CUDA)
    return {
        "device": str(generator.device),
        "is": isinstance(generator, torch.Generator),
        "is on the CPU": isinstance(torch.Generator(), torch.Generator),
        "same": drawn(1) == drawn(1) != drawn(2),
        "on others": drawn(1) == drawn(1, torch.device("cuda", 1)),
        "by default": dropped(torch.manual_seed) == dropped(torch.manual_seed),
        # The GPU's generator is another one than the CPU's.
        "by the CPU's": dropped(cpu.manual_seed) == dropped(cpu.manual_seed),
    }


def test_generators_are_of_a_device(gpu):
    drawn = gpu.call(draws, gpus=2)
    assert drawn.pop("device") == "cuda:0"
    assert not drawn.pop("by the CPU's")
    assert all(drawn.values()), drawn


def learned(_log):
    """Gradients and steps of a network, there and here."""
    found = []
    for device in (CUDA, torch.device("cpu")):
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)
        )
        images = torch.randn(8, 2, 3, 3).to(device)
        network.to(device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            loss = F.cross_entropy(network(images), torch.arange(8, device=device) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append([parameter.flatten().tolist() for parameter in network.parameters()])
        assert all(p.device == device and p.grad.device == device for p in network.parameters())
    return found


def test_it_learns_as_the_cpu_does(gpu):
    there, here = gpu.call(learned)
    assert there == here


def test_what_pytorch_lacks_is_named(monkeypatch):
    import pretended_cuda

    monkeypatch.delattr(torch._C, "_set_only_lift_cpu_tensors")
    with pytest.raises(
        RuntimeError, match="needs torch._C._set_only_lift_cpu_tensors, which PyTor"
    ):
        pretended_cuda.require()
