"""Edge-popup in a GCN: without BatchNorm it needs larger weights, and then it learns."""

import math

import pandas as pd
import pytest
import torch
from slt_runs import result

from ER_SLT import main as script
from ER_SLT.edge_popup import set_density
from ER_SLT.options import SLTOptions
from startsparse import data, er, recipe
from startsparse.commandline import parse

# configs/karate.yaml is read, but for one level of 200 steps; PUBLISHED is the recipe for images.
SHORT = ["--dataset", "karate", "--levels", "1", "--passes", "20", "--width", "64"]
SHORT += ["--sparse-compute", "off", "--select", "last"]
PUBLISHED = ["--weight-scale", "1", "--optimizer", "sgd", "--lr", "0.1", "--lr-policy", "every30"]


@pytest.mark.parametrize("name", ["karate", "cora", "citeseer", "pubmed"])
def test_graphs_have_a_recipe(name):
    options = parse(SLTOptions, script.CONFIGS, ["--dataset", name])
    assert (options.set, options.arch, options.width) == (name, "gcn", 256)
    assert (options.optimizer, options.lr, options.lr_policy) == ("adam", 0.01, "cosine")
    assert options.weight_scale > 1


def test_frozen_weights_have_to_be_large_enough(run_slt, no_pictures, capsys):
    """The loss of two classes is ln 2 at chance. With the weights of He it stays near that."""
    losses, accuracies, warned = [], [], []
    for argv in (PUBLISHED, []):
        folder = run_slt(*SHORT, *argv)
        losses.append(pd.read_csv(folder / "epochs.csv")["train_loss"].iloc[-1])
        accuracies.append(result(folder)["test_accuracy"])
        warned.append("--weight-scale: logits begin with" in capsys.readouterr().out)
    assert warned == [True, False]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[1] < 0.2
    # 16 test members: one club for all is at most 10 of them
    assert accuracies[1] >= 13 / 16


def test_the_scale_that_is_advised_makes_logits_of_1(run_slt, no_pictures, capsys):
    argv = [*SHORT, "--epochs", "1", "--passes", "1", "--width", "16", "--sparsity", "0.4"]
    run_slt(*argv, "--weight-scale", "0.5")
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "at chance; " in line)
    advised = said.partition("at chance; ")[2].split()[0]
    options = parse(SLTOptions, script.CONFIGS, [*argv, "--weight-scale", advised])
    graph = recipe.load_data(options, torch.device("cpu"))
    model, requested = script.plan(options, graph.shape)
    er.attach_er_masks(model, requested, options)
    script.pop_up(model, options)
    set_density(model, 0.4)
    x, _ = data.first_batch(graph.train, 0)
    assert model.eval()(x).std().item() == pytest.approx(1, rel=0.1)  # advised with two digits
