"""Exported networks: what is in the files, what they compute, and what can go wrong."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.sparse import csr_matrix
from script_runs import SOFT, few_digits, newest

from ER_DST import main as dst
from ER_SLT import main as slt
from startsparse import checkpoint, data, export, masks, models, plots, sealed
from startsparse.effective import EffectiveLayer
from startsparse.errors import OptionError, UserError
from startsparse.export import command, formats
from startsparse.trainer import Trainer
from STR import main as st

SMALL = ["--epochs", "2", "--batch-size", "32"]
RUNS = {
    "masked": (st, "--resnet-type small-dense --width 4 --er-sparse-init 0.1 --warmup-length 0"),
    "soft": (st, "--arch mlp --width 12 --conv-type STRConvER --select last --warmup-length 0"),
    "DST": (
        dst,
        "--model resnet20 --width 4 --sparse-init ERK --init-density 0.1 --final-density 0.03 "
        "--update-frequency 1 --final-prune-epoch 1 --warmup-length 0 --growth momentum",
    ),
    "SLT": (
        slt,
        "--dataset digits --model resnet20 --width 4 --levels 2 --sparsity 0.05 --global "
        "--initBias kn-nonzero-bias --shuffle",
    ),
    "graph": (st, "--set karate --er-sparse-init 0.1"),
    "pairs": (st, "--set modular-addition --modulus 7 --width 8"),
}


class Finished:
    """A run, the network it tested as it was in memory, and what that makes of some inputs."""

    def __init__(self, where, name):
        script, argv = RUNS[name]
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            test = Trainer.test

            def watch(trainer):
                result = test(trainer)
                seen.append((trainer.model, trainer.data.shape))
                return result

            patch.setattr(Trainer, "test", watch)
            patch.setattr(plots, "plot_run_by_rank_0", lambda *_: None)
            patch.setitem(data.SETS, "digits", few_digits(64, 20))
            soft = SOFT if name == "soft" else []
            folders = ["--log-dir", f"{where}/runs", "--result-dir", str(where)]
            small = SMALL[:2] if name == "graph" else SMALL  # a graph is one batch
            script.main([*argv.split(), *soft, *small, *folders])
        self.folder = newest(where)
        self.model, self.shape = seen[-1]
        batch = 1 if self.shape.nodes else 9
        draw = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(
            batch * self.shape.input[0], *self.shape.input[1:], generator=draw
        )
        with torch.inference_mode():
            self.logits = self.model.eval()(self.inputs)
        self.summary = json.loads((self.folder / "summary.json").read_text())

    def load(self, path):
        with torch.inference_mode():
            return export.load(path, self.shape.adjacency)(self.inputs)

    def weights(self):
        """Layer -> the weight that it computes with, by the layers themselves."""
        for name, layer in masks.sparse_layers(self.model).items():
            formula = isinstance(layer, EffectiveLayer)
            yield name, (layer.effective_weight() if formula else layer.weight).detach()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Finished(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def exported(run, *argv):
    """The path of an export to the default place."""
    command.main([str(run.folder), "--repeats", "0", *argv])
    return max((run.folder / "export").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def close(found, expected, tolerance=1e-5):
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", RUNS)
def test_round_trip(name, finished):
    run = finished(name)
    before = contents(run.folder)
    dense = exported(run)
    csr, compact = exported(run, "--format", "csr"), exported(run, "--compact")
    both = exported(run, "--format", "csr", "--compact")
    names = ("network", "network.csr", "compact", "compact.csr")
    assert [p.name for p in (dense, csr, compact, both)] == [f"{n}.safetensors" for n in names]
    after = contents(run.folder)
    assert {p: after[p] for p in before} == before
    assert set(after) - set(before) == {dense, csr, compact, both}

    state = safetensors.torch.load_file(dense)
    weights = dict(run.weights())
    for layer, weight in weights.items():
        assert torch.equal(state[f"{layer}.weight"], weight), layer
        assert (weight == 0).any() or run.summary["density"] == 1
    facts = formats._read(dense)[1]
    network = json.loads(facts["network"])
    plain = models.build(**network, adjacency=run.shape.adjacency)
    shapes = {n: t.shape for n, t in plain.state_dict().items()}
    if name == "SLT":  # its layers have biases
        shapes |= {f"{n}.bias": w.shape[:1] for n, w in weights.items()}
    assert {n: t.shape for n, t in state.items()} == shapes
    kept = sum(int(w.count_nonzero()) for w in weights.values())
    assert float(facts["density"]) == kept / sum(w.numel() for w in weights.values())
    # What grew in the last update, and has not moved yet, is 0 inside its mask.
    rare = 0.1 if name == "DST" else 0.01
    assert float(facts["density"]) == pytest.approx(run.summary["density"], rel=rare)
    assert float(facts["test_accuracy"]) == run.summary["test_accuracy"]
    sets = {"graph": "karate", "pairs": "modular-addition"}
    assert facts["set"] == sets.get(name, "digits")

    for path in (dense, csr, compact, both):
        close(run.load(path), run.logits)
    again = export.load_csr(csr)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in state.items())
    compacted, again = safetensors.torch.load_file(compact), export.load_csr(both)
    assert all(torch.equal(again[n], t) for n, t in compacted.items())
    assert sum(t.numel() for t in compacted.values()) <= sum(t.numel() for t in state.values())


def test_biases_of_a_ticket_are_those_in_use(finished):
    run = finished("SLT")
    state = safetensors.torch.load_file(exported(run))
    for name, layer in masks.sparse_layers(run.model).items():
        assert torch.equal(state[f"{name}.bias"], layer.effective()[1].detach())
    assert 0 < (state["stages.2.0.conv1.bias"] == 0).sum() < 16
    assert (state["bn1.weight"] == 1).all()
    assert (state["bn1.bias"] == 0).all()


def test_the_weights_are_those_that_the_run_selected(finished):
    assert export.read_run(finished("masked").folder).source.name == "best.pt"
    last = export.read_run(finished("pairs").folder)  # of which the options say --select last
    assert last.source.name == "checkpoint.pt"
    state = checkpoint.load(last.source)["model"]
    assert torch.equal(last.model.embedding.weight, state["embedding.weight"])


def test_rows_are_compressed_as_scipy_compresses_them(finished):
    run = finished("soft")
    path = exported(run, "--format", "csr")
    file = safetensors.torch.load_file(path)
    dense = safetensors.torch.load_file(exported(run))
    for name in masks.sparse_layers(run.model):
        values, columns, rows = (file[f"{name}.weight.{x}"] for x in ("values", "columns", "rows"))
        assert (values.dtype, columns.dtype, rows.dtype) == (
            torch.float32,
            torch.int32,
            torch.int32,
        )
        expected = csr_matrix(dense[f"{name}.weight"].flatten(1).numpy())
        assert np.array_equal(values, expected.data)
        assert np.array_equal(columns, expected.indices)
        assert np.array_equal(rows, expected.indptr)
    assert path.stat().st_size < 0.5 * (path.parent / "network.safetensors").stat().st_size


@pytest.mark.parametrize(("name", "more"), [("SLT", []), ("DST", ["--compact"]), ("pairs", [])])
def test_onnx(name, more, finished):
    import onnxruntime

    run = finished(name)
    path = exported(run, "--format", "onnx", *more)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (run.inputs, run.inputs[:1]):
        (logits,) = session.run(None, {"inputs": batch.numpy()})
        assert logits.shape == (len(batch), run.shape.classes)
        close(torch.from_numpy(logits), run.logits[: len(batch)])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["network"])["classes"] == run.shape.classes
    assert (facts.get("compact") == "true") == bool(more)
    assert [p for p in path.parent.iterdir() if p.name.startswith((".", f"{path.name}."))] == []


def test_what_is_printed(finished, capsys):
    run = finished("soft")
    command.main([str(run.folder), "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[: line.rfind("  ")].split("  ")[0]: line.split() for line in lines if line}
    layers = [(3 * 32 * 32, 12), (12, 12), (12, 12), (12, 10)]
    stored = sum(i * o + o for i, o in layers) + 3 * 2 * 12
    flops = sum(2 * i * o for i, o in layers)
    kept = sum(int(w.count_nonzero()) for _, w in run.weights())
    others = [p for n, p in run.model.named_parameters() if n.endswith("bias") or p.dim() == 1]
    others = [p for p in others if p.numel() > 1]  # thresholds are not in the plain network
    assert rows["parameters"][-2:] == [f"{stored:,}"] * 2
    nonzero = kept + sum(int(p.count_nonzero()) for p in others)
    assert rows["of them not zero"][-2:] == [f"{nonzero:,}"] * 2
    assert rows["FLOPs of one input, dense"][-2:] == [f"{flops:.4g}"] * 2
    free = sum(2 * int(w.count_nonzero()) for _, w in run.weights())
    assert rows["FLOPs, were zeros free"][-2:] == [f"{free:.4g}"] * 2
    sizes = [run.folder / "dense_weights.pt", run.folder / "export/network.safetensors"]
    assert rows["bytes on disk"][-2:] == [f"{path.stat().st_size:,}" for path in sizes]
    for batch in (1, 64):
        (line,) = (line for line in lines if line.startswith(f"latency, batch {batch} "))
        assert float(line.split()[3]) > 0
        assert line.endswith("ms  " + "the same".rjust(len("network.safetensors")))
    assert any(line.startswith("Latencies are of this machine now") for line in lines)
    written = (run.folder / "export/network.safetensors").read_bytes()
    assert lines[-1] == f"sha256   {hashlib.sha256(written).hexdigest()}"
    command.main([str(run.folder), "--repeats", "2", "--compact"])
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "batch 64" in x)
    assert line.split()[-1] == "ms"
    assert all(float(x) > 0 for x in line.split()[3::2])


def error(kind, *argv):
    with pytest.raises(UserError) as raised:
        command.main([str(arg) for arg in argv])
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_errors(finished, tmp_path, monkeypatch):
    run = finished("pairs").folder
    assert "RUN" in error(OptionError)
    assert f"{tmp_path / 'no'} is no run folder" in error(OptionError, tmp_path / "no")
    message = error(OptionError, run, "--format", "pickle")
    assert "--format" in message
    assert "'pickle' is none of safetensors, csr, onnx" in message
    assert "--formt" in error(OptionError, run, "--formt", "csr")
    assert "at least 0" in error(OptionError, run, "--repeats", "-1")
    wrong = error(OptionError, run, "--output", tmp_path / "a.pt")
    assert "should end in .safetensors" in wrong
    assert "should end in .csr.safetensors" in error(
        OptionError, run, "--format", "csr", "--output", tmp_path / "a.safetensors"
    )
    (tmp_path / "a.safetensors").write_text("mine")
    assert "exists" in error(OptionError, run, "--output", tmp_path / "a.safetensors")
    inside = tmp_path / "a.safetensors" / "b.safetensors"
    message = error(OptionError, run, "--output", inside)
    assert message.startswith(f"--output: cannot write {inside}: ") and "is no folder" in message
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    graph = finished("graph").folder
    assert "gcn" in error(OptionError, graph, "--format", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = error(UserError, run, "--format", "onnx")
    assert missing.endswith("pip install onnxruntime")
    assert not (graph / "export/network.onnx").exists()


def test_runs_that_cannot_be_exported(finished, tmp_path):
    source = finished("SLT").folder
    for name in ("options.yaml", "summary.json", "best.pt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert "no dense_weights.pt" in error(UserError, tmp_path)
    (tmp_path / "best.pt").write_bytes(b"")
    assert "not a complete checkpoint" in error(UserError, tmp_path)
    odd = ("set: [1]", "set: digits\narch: [1]", "set: digits\narch: mlp\nwidth: x", "[" * 9999)
    for text in ("{", "[1]", "set: digits\narch: none", *odd):
        (tmp_path / "options.yaml").write_text(text)
        assert "names no known network" in error(UserError, tmp_path)
    (tmp_path / "summary.json").unlink()
    assert "not finished" in error(UserError, tmp_path)
    assert not (tmp_path / "export").exists()


def test_one_line_and_an_exit_code(tmp_path):
    command = [sys.executable, "-m", "startsparse.export", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: RUN:")
    assert done.stderr.count("\n") == 1


def test_files_that_cannot_be_loaded(finished, tmp_path):
    dense, csr = exported(finished("pairs")), exported(finished("pairs"), "--format", "csr")
    with pytest.raises(UserError, match="is of --format dense"):
        export.load_csr(dense)
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no network can be read"):
        export.load(path)
    for content in (csr.read_bytes()[:-1], b"", b"PK"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            export.load(path)
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"not a network of this project, or a damaged one"):
        export.load(path)
    state, facts = formats._read(dense)
    del state["embedding.weight"]
    sealed.write(path, state, facts)
    with pytest.raises(UserError, match=r"has no 'embedding.weight'"):
        export.load(path)


@pytest.mark.parametrize("kind", ["csr", "onnx"])
def test_nothing_is_half_written(kind, finished, monkeypatch):
    run = finished("pairs")
    path = exported(run, "--format", kind)
    before = contents(run.folder)

    def breaks(path, _content):
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", breaks)
    monkeypatch.setattr(formats, "_TOLERANCE", -1.0)  # no result is near enough
    message = error(UserError, run.folder, "--format", kind)
    assert ("No space left" if kind == "csr" else "onnxruntime computes logits") in message
    assert contents(run.folder) == before
    assert path in before


def test_loading_draws_nothing(finished):
    path = exported(finished("pairs"))
    torch.manual_seed(1)
    export.load(path)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert np.array_equal(drawn, torch.rand(3))


def test_a_changed_byte_is_noticed(finished, tmp_path):
    """In weights and metadata; safetensors itself notices none of these."""
    path = tmp_path / "x.safetensors"
    for argv in ([], ["--format", "csr"]):
        file = exported(finished("pairs"), *argv).read_bytes()
        for place in (file.index(b'"density"') + 12, len(file) - 2, len(file) // 2):
            damaged = bytearray(file)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError) as error:
                export.load(path)
            assert str(error.value) == f"{path}: damaged, the checksum does not match"


def test_equal_exports_are_equal_files(finished):
    run, files = finished("pairs"), set()
    for _ in range(4):
        path = exported(run)
        files.add(path.read_bytes())
        path.unlink()
    assert len(files) == 1


def test_an_export_of_an_older_version_is_read_with_a_warning(finished, tmp_path, caplog):
    run = finished("pairs")
    state, facts = formats._read(exported(run))
    old = {k: v for k, v in facts.items() if k != "sha256"} | {"kind": "startsparse network 1"}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path, old)
    sealed.log.propagate = True
    try:
        close(run.load(path), run.logits)
    finally:
        sealed.log.propagate = False
    assert f"{path} has no checksum" in caplog.text
    safetensors.torch.save_file(state, path, old | {"sha256": "0" * 64})
    with pytest.raises(UserError, match="damaged"):
        export.load(path)


WRONG = {
    "its network has more than 2,147,483,648 weights": lambda f, t: f.update(
        network=f["network"].replace('"width": 8', '"width": 200000')
    ),
    "no 'network'": lambda f, t: f.pop("network"),
    "names 'arch' twice": lambda f, t: f.update(network='{"arch": 1, "arch": 2}'),
    "--arch: no network is called 'x'": lambda f, t: f.update(
        network=f["network"].replace("algorithmic", "x")
    ),
    "build() got an unexpected keyword": lambda f, t: f.update(network='{"arch": "mlp", "x": 1}'),
    "--format 'pickle'": lambda f, t: f.update(format="pickle"),
    "'embedding.weight' is no matrix of 8 compressed rows": lambda f, t: t[
        "embedding.weight.columns"
    ].add_(1000),
    "'embedding.weight' has more than": lambda f, t: f.update(
        shapes=f["shapes"].replace("[8, ", "[2000000000, ")
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_right_digest_of_wrong_content(finished, tmp_path, message):
    state, facts = sealed.read(
        exported(finished("pairs"), "--format", "csr"), "network", formats.KIND
    )
    WRONG[message](facts, state)
    path = tmp_path / "x.safetensors"
    sealed.write(path, state, facts)
    with pytest.raises(UserError) as error:
        export.load(path)
    assert str(error.value).startswith(
        f"{path}: not a network that startsparse.export wrote ({message}"
    )
    assert "\n" not in str(error.value)
