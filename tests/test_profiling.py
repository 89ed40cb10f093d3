"""--profile: the trace of ten steps, what is printed of it, and that results do not change."""

import json
from collections import Counter

import pytest
import torch
from script_runs import MLP, same

from startsparse.profiling import Operation, StepProfiler, new_profile, operations, text


def traced(folder):
    """How often each operation is in the trace of a run, which Chrome could read."""
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    return Counter(e["name"] for e in events if e.get("ph") == "X")


def optimizer_steps(folder):
    return traced(folder)["Optimizer.step#SGD.step"]


@pytest.mark.parametrize(
    ("fixture", "more"),
    [
        ("run", ["--conv-type", "ConvMask"]),
        ("run_dst", ["--sparse", "--update-frequency", "3", "--init-density", "0.5",
                     "--final-density", "0.3"]),
    ],
)  # fmt: skip
def test_a_traced_run_is_the_same_run(fixture, more, request, few_images, no_pictures, capsys):
    script = request.getfixturevalue(fixture)
    flags = [*MLP, "--batch-size", "16", "--epochs", "2", "--sparse-compute", "off", *more]
    folder = script(*flags, "--profile", where="with")  # twelve steps an epoch
    printed = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(printed) if line.startswith("longest operations"))
    assert any(line.startswith("aten::") for line in printed[start + 1 : start + 11])
    assert printed[start + 11] == f"trace of 10 steps: {folder / 'profile.json'}"
    assert optimizer_steps(folder) == 10

    without = script(*flags, where="without")
    assert not (without / "profile.json").exists()
    assert same(folder, without)


def test_tickets_are_traced_too(run_slt, few_images, no_pictures):
    flags = [*MLP, "--batch-size", "16", "--levels", "2", "--er-init-density", "0.6"]
    assert optimizer_steps(run_slt(*flags, "--profile")) == 10


def test_short_epochs_are_traced_whole(run, few_images, no_pictures):
    """Three steps an epoch: the first whole one after ten steps is the fifth."""
    folder = run(*MLP, "--batch-size", "64", "--epochs", "5", "--profile")
    assert optimizer_steps(folder) == 3


def test_a_run_that_is_too_short_says_so(run, few_images, no_pictures, capsys):
    folder = run(*MLP, "--batch-size", "64", "--epochs", "3", "--profile")
    assert not (folder / "profile.json").exists()
    line = next(x for x in capsys.readouterr().out.splitlines() if "--profile" in x and "no" in x)
    assert line.startswith("warning: --profile: no trace: it begins after 10 steps")


def test_a_resumed_run_may_be_traced(run, few_images, no_pictures):
    flags = [*MLP, "--batch-size", "16", "--epochs", "2"]
    folder = run(*flags)
    (folder / "summary.json").unlink()
    run(*flags, "--resume", "auto", "--profile")  # nothing is left to train


def test_steps_of_the_trace():
    """By hand: of epochs of 14 steps, those with ten steps left after the first ten."""

    def first_and_last(steps):
        profiler, numbers = StepProfiler(None, torch.device("cpu")), []
        for number in range(100):
            profiler.before_step(number % steps, steps)
            if profiler._running:
                numbers.append(number)
            if profiler._running and (len(numbers) == 10 or number % steps == steps - 1):
                profiler._running.stop()
                break
            profiler.after_step(number % steps, steps)
        return numbers[0], numbers[-1]

    assert first_and_last(40) == (10, 19)
    assert first_and_last(14) == (14, 23)
    assert first_and_last(4) == (12, 15)


def test_operations_are_counted_and_ordered():
    device, one = torch.device("cpu"), torch.ones(300, 300)
    with new_profile(device) as seen:
        for _ in range(3):
            one @ one
        one.neg()
    found = operations(seen, device)
    calls = {operation.name: operation.calls for operation in found}
    assert (calls["aten::mm"], calls["aten::neg"]) == (3, 1)
    assert [o.milliseconds for o in found] == sorted((o.milliseconds for o in found), reverse=True)


def test_the_table_is_per_step():
    found = [Operation("aten::mm", 30.0, 20), Operation("aten::add", 10.0, 40)]
    lines = text([*found, *[Operation("aten::none", 0.0, 1)] * 20], 10).splitlines()
    assert len(lines) == 11
    assert lines[1].split() == ["aten::mm", "3.000", "75.0%", "2.0"]
    assert lines[2].split() == ["aten::add", "1.000", "25.0%", "4.0"]
