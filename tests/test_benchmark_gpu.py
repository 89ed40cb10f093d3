"""benchmarks.gpu: its rehearsal on a CPU, what it notes, and its table."""

import json
import warnings

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import networks, runs, speed, table
from benchmarks.gpu.measure import noted, per_step
from benchmarks.gpu.parts import Report


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "x.json", 1000, {})


def rehearse(path, parts):
    program.main(["--rehearse", "--parts", parts, "--out", str(path)])
    return json.loads(path.read_text())


def test_the_rehearsal_measures_all_parts_in_this_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "KINDS", ("ConvMask", "edge-popup global"))
    monkeypatch.setattr(speed, "UPDATES", (("gradient", "always"),))
    monkeypatch.setattr(speed, "CPU_THREADS", (1,))
    monkeypatch.setattr(runs, "RUNS", {k: runs.RUNS[k] for k in ("ConvMask", "GraNet, gradient")})
    parts = "machine,steps,waits,updates,graphs,input,cpu"
    found = rehearse(tmp_path / "a.json", parts)
    rows = {name: found[name]["rows"] for name in parts.split(",")}
    failed = [row["error"] for part in rows.values() for row in part if "error" in row]
    assert not failed
    counts = {name: len(part) for name, part in rows.items()}
    assert counts == {"machine": 0, "steps": 12, "waits": 3, "updates": 1, "graphs": 1,
                      "input": 3, "cpu": 1}  # fmt: skip
    dense, masked = rows["steps"][:2]
    assert (dense["kind"], masked["kind"]) == ("DenseConv", "ConvMask")
    assert 0.2 < masked["over_dense"] < 5
    assert masked["images_per_second"] == pytest.approx(8e3 / masked["ms"])
    assert all(row["waits"] == {} for row in rows["waits"])  # it cannot know on a CPU
    capsys.readouterr()
    program.main(["--table", str(tmp_path / "a.json")])
    printed = capsys.readouterr().out
    assert "| images/s, on an H200 | 74,000 |" in printed
    assert "### cpu" in printed


def test_runs_are_compared_with_themselves(tmp_path):
    sizes = networks.tiny()
    found = runs.same_and_resumed("ConvMask", sizes)
    assert set(found.values()) == {"ConvMask", "same"}
    one = runs.run("ConvMask", tmp_path / "a", sizes)
    other = runs.run("ConvMask", tmp_path / "b", sizes, "--seed", "2")
    assert runs.difference(one, one) == ""
    assert runs.difference(one, other).startswith("['model']")


def test_what_a_part_raises_is_kept_and_the_next_part_begins(report, capsys):
    def bad(found):
        with found.row(kind="a") as row:
            row["ms"] = 1
        with found.row(kind="b"):
            raise ValueError("no\nsuch kernel")
        raise RuntimeError("out of luck")

    report.do("bad", bad)
    report.do("good", lambda found: found.content.update(fact=1))
    found = json.loads(report.path.read_text())
    assert found["bad"]["rows"][0] == {"kind": "a", "ms": 1}
    assert found["bad"]["rows"][1]["error"] == "ValueError: no such kernel"
    assert found["bad"]["error"] == "RuntimeError: out of luck"
    assert found["good"]["fact"] == 1
    assert "out of luck; ValueError" in capsys.readouterr().out


def test_each_row_is_written_at_once(report):
    def part(found):
        with found.row(kind="a"):
            pass
        assert json.loads(report.path.read_text())["part"]["rows"] == [{"kind": "a"}]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.do("part", part)


def test_a_part_without_time_says_so(tmp_path):
    report = Report(tmp_path / "x.json", 10, {})
    report.do("steps", lambda found: speed.steps(found, networks.tiny()))
    assert report.content["steps"]["cut"] == 0
    assert report.content["steps"]["rows"] == []
    assert "Time ran out." in table.markdown(report.path)


def test_waits_are_noted_by_the_line_of_the_project_and_only_in_steps():
    sizes = networks.tiny()
    made = networks.Program("DenseConv", networks.batches(sizes, 8), sizes)

    def wait():  # as CUDA's detector says it, of the line that called
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    made.learner.optimizer.step = wait
    with noted(made.learner) as places:
        wait()
        made.epoch(3)
    (place,) = places
    assert place.startswith("startsparse/training.py:")
    assert places[place] == 3


def test_a_step_is_the_difference_of_two_runs():
    one = torch.ones(3)

    def run(steps):
        for _ in range(steps):
            one.neg()
        one.exp()  # the end, which is no part of a step

    found, _ = per_step(run, networks.tiny())
    assert found["launches"] == 1


def test_goals_are_met_or_not(tmp_path):
    def step(kind, over, share, compiled=False, speed=80_000):
        return {"kind": kind, "batch": 512, "compiled": compiled, "images_per_second": speed,
                "ms": 10.0, "over_dense": over, "python_share": share}  # fmt: skip

    content = {
        "steps": {"rows": [
            step("DenseConv", None, 0.2) | {"over_dense": 1.0},
            step("ConvMask", 1.019, 0.2), step("ConvMask", 1.03, 0.31, True),
            step("STRConv", 1.05, 0.9), {"kind": "STRConvER", "error": "x | y"},
        ]},
        "waits": {"rows": [{"kind": "ConvMask", "waits": {"startsparse/a.py:3": 1.0}}]},
        "same": {"rows": [{"name": "a", "repeated": "same", "resumed after step 3": "fc by 1"}]},
        "graphs": {"rows": [{"name": "a", "after_two_epochs": 0}], "cut": 1},
        "updates": {"rows": [{"growth": "random", "flow_preservation": "False", "step_ms": 10.1,
                              "update_ms": 20.0}]},
    }  # fmt: skip
    (path := tmp_path / "x.json").write_text(json.dumps(content))
    lines = [line.split(" | ") for line in table.markdown(path).splitlines()]
    met = {line[0][2:]: line[3] == "yes |" for line in lines[4:14] if len(line) == 4}
    assert met == {
        "images/s, on an H200": True,
        "ConvMask over dense": False,
        "STRConv over dense": True,
        # (10.1 + 20 / 100) / 10 is 1.03
        "random growth, flow False, with its updates": False,
        "Python's share of a step, dense and ConvMask": False,
        "waits in ordinary steps": False,
        "compilations after two epochs": True,
        "runs that differ from themselves, or resumed ones": False,
    }
    assert "x / y" in table.markdown(path)


def test_bad_use_is_one_line(capsys):
    for argv, said in (
        (["--parts", "steps,speed", "--rehearse"], "'speed' is none of machine, same"),
        ([], "there is no GPU here; --rehearse needs none"),
    ):
        if argv or not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                program.main(argv)
            assert said in capsys.readouterr().err
