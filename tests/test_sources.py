"""What other runs give a run is copied into its folder: they may go, or change, afterwards."""

import json
import shutil

import pytest
import torch
from script_runs import MLP, Crash, same

from ER_DST import main as dst
from startsparse import checkpoint
from startsparse.errors import OptionError
from startsparse.trainer import Trainer
from STR import main as script

pytestmark = pytest.mark.usefixtures("no_pictures")

LEVELS = ["--threshold-list", "0.1", "0.05", "--final_prune_epoch", "1"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run with levels."""
    where = tmp_path_factory.mktemp("other")
    script.main([*MLP, *LEVELS, "--log-dir", f"{where}/runs", "--result-dir", str(where)])
    return next(where.glob("runs/*/*/seed-1"))


def flags(kind, source):
    return {
        "start_from": [*LEVELS[:1], "0.04", "0.03", *LEVELS[3:], "--start-from", str(source)],
        "target_expt_name": [*LEVELS, "--pruner", "mask-ref", "--target-expt-name", str(source)],
        "er_sparsity_file": ["--er-sparse-method", "network", "--er-sparsity-file", str(source)],
    }[kind]  # fmt: skip


def edit(source):
    """Other weights, masks and densities, in files that can be read."""
    for path in source.rglob("*.pt"):
        state = checkpoint.load(path)
        for tensor in state["model"].values():
            tensor.fill_(1) if tensor.dtype == torch.bool else tensor.mul_(2)
        checkpoint.save_by_rank_0(path, state)
    layers = {name: {"density": 0.5} for name in json.loads((source / "layers.json").read_text())}
    (source / "layers.json").write_text(json.dumps(layers))
    result = json.loads((source / "summary.json").read_text())
    (source / "summary.json").write_text(json.dumps({**result, "requested": 0.9}))


@pytest.mark.parametrize("change", [shutil.rmtree, edit], ids=["gone", "edited"])
@pytest.mark.parametrize("kind", ["start_from", "target_expt_name", "er_sparsity_file"])
def test_a_resumed_run_needs_its_sources_no_more(run, monkeypatch, tmp_path, other, kind, change):
    source = shutil.copytree(other, tmp_path / "source/net/seed-1")
    argv = [*MLP, *flags(kind, source)]
    whole = run(*argv, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "run_phases", crash)  # before the first step
        run(*argv, where="parts")
    change(source)
    assert same(whole, run(*argv, "--resume", "auto", where="parts"))
    assert (whole / "sources" / kind).is_dir()


def crash(_trainer, _phases):
    raise Crash


def test_a_file_of_ratios_is_kept_too(run_dst, monkeypatch, tmp_path, other):
    ratios = tmp_path / "mine.json"
    layers = json.loads((other / "layers.json").read_text())
    ratios.write_text(json.dumps({name: 0.1 * n for n, name in enumerate(layers, 1)}))
    argv = ["--sparse", "--model", "mlp", "--width", "16", "--epochs", "1", "--method", "DST"]
    argv += ["--init-density", "0.2", "--sparse-init", "network", "--ratios-from", str(ratios)]
    whole = run_dst(*argv, where="whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "run_phases", crash)
        run_dst(*argv, where="parts")
    ratios.unlink()
    assert same(whole, run_dst(*argv, "--resume", "auto", where="parts"))
    with pytest.raises(OptionError, match=r"^--ratios-from: .*mine\.json does not exist"):
        dst.main([*argv, "--log-dir", str(tmp_path / "new")])


def test_the_folder_alone_continues_a_run(run, monkeypatch, tmp_path, other):
    source = shutil.copytree(other, tmp_path / "source/net/seed-1")
    argv = [*MLP, *flags("start_from", source)]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "run_phases", crash)
        run(*argv)
    shutil.rmtree(source)
    (folder,) = (tmp_path / "a/runs").glob("*/*/seed-1")
    assert folder.parent.name == "mlp-ConvMask-from-net"
    script.main(["--resume", str(folder), "--result-dir", str(tmp_path / "a")])
    assert json.loads((folder / "summary.json").read_text())["requested"] == 0.03
    with pytest.raises(OptionError, match="--start-from: .*seed-1 is no folder of a finished run"):
        run(*argv, where="new")
