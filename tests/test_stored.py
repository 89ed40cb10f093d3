"""Tickets that say of their run what no run writes: refused before anything is built for it."""

import pytest
from script_runs import ROOT

from ER_SLT import main as script
from ER_SLT.edge_popup import popup, set_density
from ER_SLT.initializers import init_weights
from ER_SLT.levels import result_options
from ER_SLT.main import CONFIGS, plan
from ER_SLT.options import SLTOptions
from ER_SLT.ticket import save_ticket_by_rank_0
from startsparse import data, er
from startsparse.commandline import parse
from startsparse.errors import OptionError

ARGV = ["--set", "digits", "--arch", "mlp", "--width", "4"]


@pytest.fixture(scope="module")
def parts():
    """The network of a run before its first step, and what its ticket says."""
    options = parse(SLTOptions, CONFIGS, ARGV)
    model, requested = plan(options, data.SHAPES["digits"])
    er.attach_er_masks(model, requested, options)
    init_weights(model, options.init, options.seed, options.bfac, None, options.weight_scale)
    popup(model, options.seed, options.score_init, options.ranking)
    set_density(model, options.sparsity)
    return model, {"options": result_options(options), "test_accuracy": 0.5}


@pytest.fixture
def ticket(parts, tmp_path, monkeypatch):
    """Write a ticket with a change in what it says; what is loaded for it is an error."""
    model, said = parts
    monkeypatch.setattr(script.recipe, "load_data", lambda *_: pytest.fail("data were read"))

    def write(options=(), facts=()):
        path = tmp_path / "x.safetensors"
        changed = {**said, "options": {**said["options"], **dict(options)}, **dict(facts)}
        save_ticket_by_rank_0(path, model, changed)
        return path

    return write


def refused(path):
    with pytest.raises(OptionError) as error:
        script.main(["--evaluate", str(path)])
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"width": 8}, "the mask of 'hidden.0' is (4, 3072), not (8, 3072)"),
        ({"width": 10**6}, "width"),
        ({"width": 10**30}, "x.safetensors: "),
        ({"width": -1}, "width"),
        ({"width": [4]}, "width: should be one value"),
        ({"width": None}, "width"),
        ({"model": "resnet18"}, "is missing, not "),
        ({"model": "x\ny"}, "--model"),
        ({"dataset": "mnist"}, "(4, 3072), not (4, 1024)"),
        ({"seed": "x" * 10}, "--seed: 'xxxxxxxxxx' is not a whole number"),
        ({"no_such": 1}, "unknown option 'no_such'"),
        ({"--width": 4}, "unknown option '--width'"),
    ],
)
def test_wrong_options_are_named(ticket, options, what):
    path = ticket(options)
    assert what in refused(path)


@pytest.mark.parametrize("value", [None, "0.5", True, -0.1, 1.5, float("nan"), float("inf"), [1]])
def test_an_accuracy_that_is_none(ticket, value):
    path = ticket(facts={"test_accuracy": value})
    expected = f"--evaluate: {path}: its test_accuracy is {value!r}, not one from 0 to 1"
    assert refused(path) == expected


def test_no_options(ticket):
    for options in (None, [], "x"):
        path = ticket(facts={"options": options})
        assert refused(path) == f"--evaluate: {path}: the ticket has no 'options'"


def test_where_data_lie_is_not_the_tickets_to_say(ticket, monkeypatch):
    """Nor what to resume; such options in a ticket count for nothing."""
    path, seen = ticket({"data": "x" * 300, "resume": "auto", "log_dir": "/x", "workers": 99}), []

    def look(options, _):
        seen.append(options)
        raise OptionError("enough")

    monkeypatch.setattr(script.recipe, "load_data", look)
    with pytest.raises(OptionError, match="enough"):
        script.main(["--evaluate", str(path)])
    (options,) = seen
    assert (options.data, options.resume, options.log_dir) == ("", "", SLTOptions.log_dir)
    assert options.workers == SLTOptions.workers
    assert str(ROOT) not in path.read_bytes().decode("latin1")
