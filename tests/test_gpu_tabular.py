"""startsparse.tabular on a pretended GPU: the networks of the CPU, and no step waits."""

import dataclasses
import hashlib
import tempfile
from pathlib import Path

import pytest

from startsparse.tabular import TabularOptions

TINY = TabularOptions(
    starts=(1.0, 0.5), densities=(0.5, 0.02), reset=(False, True), seeds=(1,), width=8, epochs=1,
    flow_preservation=(True,), final_epochs=2, batch_size=200, sparse_compute="on",
)  # fmt: skip


def trained(loop, device):
    """Rows as CSV, a digest of all networks, and the devices of what they and the rows are on."""
    from startsparse import tabular
    from startsparse.tabular import tables

    # On the CPU without sparse forms, which sum in another order.
    form = "off" if device == "cpu" else "on"
    options = dataclasses.replace(TINY, loop=loop, device=device, sparse_compute=form)
    members = tabular.make_members(tables.load("breast-cancer"), options)
    rows = tabular.run(members, options)
    digest, devices = hashlib.sha256(), set()
    for member in members:
        state = [*member.model.state_dict().values(), member.test.features, member.valid.labels]
        devices.update(str(tensor.device) for tensor in state)
        for tensor in (*state, *member.first_masks.values()):
            digest.update(tensor.cpu().numpy().tobytes())
    return [rows.to_csv(), digest.hexdigest()], sorted(devices)


def batched(_):
    return trained("batched", "auto"), trained("batched", "cpu")


def one_after_the_other(_):
    return trained("loop", "cuda:1"), trained("loop", "cpu")


@pytest.mark.parametrize(
    ("both", "gpus", "device"), [(batched, 1, "cuda:0"), (one_after_the_other, 2, "cuda:1")]
)
def test_networks_on_a_gpu_are_those_on_the_cpu(gpu, both, gpus, device):
    (found, devices), (expected, others) = gpu.call(both, gpus=gpus)
    assert found == expected
    assert devices == [device] and others == ["cpu"]


def counted(log):
    """Waits and launches of two epochs of three networks, and of six, with 2 and with 6 steps."""
    import torch
    from batched_runs import RECIPES, network, part

    from startsparse.data.rows import Rows
    from startsparse.tabular.batched import train_batched

    there, found = torch.device("cuda:0"), {}
    for seeds in (3, 6):
        for batch_size in (48, 16):
            models = [network(seed, 0.3).to(there) for seed in range(seeds)]
            parts = [
                Rows(p.features, p.labels, batch_size=batch_size, device=there, seed=p.seed)
                for p in (part(seed, examples=96) for seed in range(seeds))
            ]
            with log.counting() as counts:
                losses = train_batched(models, parts, RECIPES["adam"], 2)
            assert losses.device.type == "cpu"
            found[f"{seeds} networks, {96 // batch_size} steps"] = counts
    return found


def test_a_step_waits_for_nothing_however_many_networks(gpu):
    """Steps are told from the rest by their number."""
    found, launches = gpu.call(counted), set()
    for networks in ("3 networks", "6 networks"):
        few, many = (found[f"{networks}, {steps} steps"] for steps in (2, 6))
        assert few["waits"] == many["waits"]
        launches.add((many["launches"] - few["launches"]) / (2 * (6 - 2)))
    assert len(launches) == 1
    assert launches.pop() <= 175  # one network after the other: 60 for each


def program_on_a_gpu(_):
    """The first lines of what the program writes."""
    from startsparse.tabular import program, report

    draw, report.accuracy_plot = report.accuracy_plot, None
    argv = ["--seeds", "1", "--starts", "0.5", "--densities", "0.5", "--reset", "no"]
    argv += ["--width", "8", "--epochs", "1", "--final-epochs", "1", "--device", "cuda"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            program.main([*argv, "--result-dir", folder], say=lambda _: None)
            return (Path(folder) / "results.csv").read_text().splitlines()
    finally:
        report.accuracy_plot = draw


def test_the_program(gpu):
    head, row = gpu.call(program_on_a_gpu)
    assert head.startswith("table,start,reset") and row.startswith("breast-cancer,0.5,False")


def mixed(_):
    """What a user of the library is told whose networks and rows are on two devices."""
    import torch
    from batched_runs import RECIPES, network, part

    from startsparse.tabular.batched import LOOPS

    said = []
    for train in LOOPS.values():
        try:
            train([network(1, 0.3).to("cuda:0")], [part(1)], RECIPES["sgd"], 1)
        except ValueError as error:
            said.append(str(error))
    return [*said, bool(torch.cuda.is_available())]


def test_networks_and_rows_on_two_devices(gpu):
    line = "the networks and their data are on cpu and cuda:0: should be on one device"
    assert gpu.call(mixed) == [line, line, True]
