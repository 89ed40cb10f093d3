"""Files of networks: tickets, exports, ratios, checkpoints."""

import functools
import hashlib
import json
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from ticket_networks import trained

from ER_SLT.edge_popup import popup, set_density
from ER_SLT.initializers import init_weights
from ER_SLT.levels import result_options
from ER_SLT.main import CONFIGS, plan
from ER_SLT.options import SLTOptions
from ER_SLT.stored import check_shapes, stored
from ER_SLT.ticket import load_ticket, save_ticket_by_rank_0
from startsparse import data, er, export, masks, models
from startsparse.commandline import parse
from startsparse.export import formats
from startsparse.export.compact import compact
from torture.damage import damages, refused
from torture.promises import promise

EXPORTS = ("dense", "csr", "compact")


@functools.cache
def _bytes(write) -> bytes:
    """What ``write`` writes to the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "file"))
        return Path(folder, "file").read_bytes()


@functools.cache
def _export(kind: str) -> bytes:
    network = {"arch": "mlp", "classes": 3, "channels": 1, "size": 4, "width": 6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = models.build(**network).eval()
    for layer in masks.sparse_layers(model).values():
        layer.weight.data *= layer.weight.abs() > 0.2
    facts = {"kind": formats.KIND, "network": json.dumps(network), "set": "digits"}
    facts |= {"density": "0.5", "test_accuracy": "0.25"}
    facts["images"] = data.Images(("a", "b", "é"), (0.1,), (0.2,), 4, 1).to_json()
    writer = formats.write_csr if kind == "csr" else formats.write_dense
    network = compact(model) if kind == "compact" else model
    return _bytes(lambda path: writer(path, network, facts))


def _loaded(path: Path):
    model = export.load(path)
    return model.state_dict(), model.images, formats._read(path)[1]


@functools.cache
def _expected(kind: str):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").write_bytes(_export(kind))
        return _loaded(Path(folder, "file"))


def _equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


@promise(
    "A damaged export is refused by name, or it is the same network",
    st.tuples(st.sampled_from(EXPORTS), damages),
    cases=600,
    sample=40,
)
def a_damaged_export(case, folder):
    kind, damage = case
    path = folder / "network.safetensors"
    path.write_bytes(damage.of(_export(kind)))
    found = refused(_loaded, path, naming=path)
    assert found is None or _equal(found, _expected(kind))


@functools.cache
def _ticket() -> bytes:
    facts = {"options": {"seed": 7}, "test_accuracy": 0.5, "valid_accuracy": math.nan}
    return _bytes(lambda path: save_ticket_by_rank_0(path, trained(), facts))


@promise("A damaged ticket is refused by name", damages, cases=600, sample=40)
def a_damaged_ticket(damage, folder):
    path, file = folder / "a.ticket", damage.of(_ticket())
    path.write_bytes(file)
    assert (refused(load_ticket, path, naming=path) is None) == (file != _ticket())


@promise("Equal runs write equal tickets, to the byte", st.integers(0, 99), cases=100, sample=10)
def equal_tickets(seed, folder):
    files = []
    for name in ("one", "other"):
        save_ticket_by_rank_0(folder / name, trained(), {"seed": seed, "b": 1, "a": [2]})
        files.append((folder / name).read_bytes())
    assert files[0] == files[1]


# Right digests of wrong content


def sign(header: dict, content: bytes) -> bytes:
    """A safetensors file with a right digest, if its header has a place for one."""
    blank = "the digest of this file with this text in its place".center(64)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["sha256"] = blank
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = len(text).to_bytes(8, "little") + text + content
    return file.replace(blank.encode(), hashlib.sha256(file).hexdigest().encode(), 1)


def parts(file: bytes) -> tuple[dict, bytes]:
    """Header and content of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


JSON_TEXTS = (
    *("", "null", "[]", "{", "3", '"x"', "[" * 100_000, '{"a":' * 50_000, "{}", "1e400"),
    *('{"a": 1, "a": 2}', "NaN", "\x00", '{"options": null}', '{"options": {}}'),
)
SHAPES = ([], [0], [-1, 5], [2**31, 2**31], [2**62, 4], [1.5], ["3"], [True], None, 7, {}, [10**30])
FACTS = ("kind", "sha256", "description", "shapes", "weights", "network", "images", "format", "set")
DTYPES = ("F64", "F16", "I8", "I64", "BOOL", "F8_E4M3", "X", "U8", "F32")


@st.composite
def changes(draw):
    """A function that changes a header in place, and returns the content to write with it."""
    kind = draw(st.sampled_from(["fact", "no fact", "drop", "name", "dtype", "shape", "offsets"]))
    which, text = draw(st.integers(0, 99)), draw(st.sampled_from(JSON_TEXTS))
    fact, odd = draw(st.sampled_from(FACTS)), draw(st.sampled_from([1, None, [], {}, 1.5, True]))
    place = draw(st.sampled_from([-1, 0, 3, 2**40, 2**63, 2**64]))
    more = draw(st.sampled_from(["", "x", "er/", "found/x", "statistics/", "er/0/../..", "\n"]))
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    return kind, which, text, fact, odd, place, more, dtype, shape


def change(case, header: dict, content: bytes) -> bytes:
    """Apply one of `changes`."""
    kind, which, text, fact, odd, place, more, dtype, shape = case
    facts = header["__metadata__"]
    names = [name for name in header if name != "__metadata__"]
    name = names[which % len(names)]
    match kind:
        case "fact":
            facts[fact] = text if which % 3 else odd
        case "no fact":
            facts.pop(fact, None)
        case "drop":
            del header[name]
        case "name":
            header[more] = header.pop(name)
        case "dtype":
            header[name]["dtype"] = dtype
        case "shape":
            header[name]["shape"] = shape
        case "offsets":
            header[name]["data_offsets"][which % 2] = place
    return content


@promise(
    "A file with a right digest and crafted content is refused by name",
    st.tuples(st.sampled_from((*EXPORTS, "ticket")), changes()),
    cases=1000,
    sample=40,
)
def crafted_content(case, folder):
    what, change_ = case
    header, content = parts(_ticket() if what == "ticket" else _export(what))
    before = json.dumps(header)
    content = change(change_, header, content)
    path = folder / "file"
    path.write_bytes(sign(header, content))
    if what == "ticket":
        refused(load_ticket, path, naming=path)
    else:
        found = refused(_loaded, path, naming=path)
        assert found is None or json.dumps(header) == before or found[0].keys()


LENGTHS = (0, 1, 7, 8, 100, 10**8, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@promise(
    "A safetensors header that lies about sizes is refused, and nothing of them is allocated",
    st.tuples(st.sampled_from((*EXPORTS, "ticket")), st.sampled_from(LENGTHS), st.integers(0, 40)),
    cases=400,
    sample=20,
)
def a_lying_header(case, folder):
    what, length, more = case
    file = _ticket() if what == "ticket" else _export(what)
    path = folder / "file"
    path.write_bytes(length.to_bytes(8, "little") + file[8 : len(file) - more])
    assert refused(load_ticket if what == "ticket" else export.load, path, naming=path) is None


# Options in tickets


@functools.cache
def _run_ticket() -> bytes:
    options = parse(SLTOptions, CONFIGS, ["--set", "digits", "--arch", "mlp", "--width", "4"])
    model, requested = plan(options, data.SHAPES["digits"])
    er.attach_er_masks(model, requested, options)
    init_weights(model, options.init, options.seed, options.bfac, None, options.weight_scale)
    popup(model, options.seed, options.score_init, options.ranking)
    set_density(model, options.sparsity)
    facts = {"options": result_options(options), "test_accuracy": 0.5}
    return _bytes(lambda path: save_ticket_by_rank_0(path, model, facts))


VALUES = (
    *(
        None,
        [],
        {},
        [1],
        {"a": 1},
        True,
        -1,
        0,
        2**31,
        2**62,
        10**30,
        1e308,
        -0.5,
        "",
        "nan",
        "inf",
    ),
    *("é\n", "x" * 3_000, "--seed=3", "../../x", "resnet18", "mlp", "digits", "1e-320", "010"),
)
NAMES = (
    *(
        "width",
        "model",
        "dataset",
        "seed",
        "sparsity",
        "epochs",
        "levels",
        "lr",
        "resume",
        "config",
    ),
    *("evaluate", "log_dir", "data", "modulus", "no_such", "width ", "--width", "initBias", "bfac"),
    *("er_init_density", "er_sparse_method", "er_sparsity_file", "batch_size", "threads", "name"),
)


@promise(
    "A ticket with options that no run has is refused by name, before data are read",
    st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)),
    cases=500,
    sample=15,
)
def crafted_options(case, folder):
    name, value = case
    header, content = parts(_run_ticket())
    description = json.loads(header["__metadata__"]["description"])
    description["options"][name] = value
    header["__metadata__"]["description"] = json.dumps(description)
    path = folder / "ticket"
    path.write_bytes(sign(header, content))

    def read():
        ticket, saved, _ = stored(path)
        options = parse(SLTOptions, CONFIGS, [], saved)
        check_shapes(ticket, options, path)

    refused(read, naming="--")
