"""Ticket files: they stand alone, stay small, notice every change, and can be shuffled."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from ticket_networks import DESCRIPTION, images, plain, rebuild, trained
from torch import nn

from ER_SLT.edge_popup import RANKINGS, found_masks, popup, popup_layers, set_density
from ER_SLT.initializers import init_weights
from ER_SLT.ticket import SHUFFLES, load_ticket, put_in_place, save_ticket_by_rank_0, shuffled
from startsparse import models, sealed
from startsparse.errors import UserError
from startsparse.masks import attach_masks, draw_masks, sparse_layers

REBUILD = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[3])
from ticket_networks import images, plain, rebuild
from ER_SLT.ticket import load_ticket
ticket = load_ticket(Path(sys.argv[1]))
torch.save(rebuild(ticket)(images()), sys.argv[2])
"""


@pytest.fixture
def saved(tmp_path):
    model = trained()
    save_ticket_by_rank_0(tmp_path / "folder" / "a.ticket", model, DESCRIPTION)
    return model, tmp_path / "folder" / "a.ticket"


@pytest.mark.parametrize("ranking", RANKINGS)
def test_round_trip(tmp_path, ranking, caplog):
    model = trained(ranking)
    save_ticket_by_rank_0(tmp_path / "a.ticket", model, DESCRIPTION)
    ticket = load_ticket(tmp_path / "a.ticket")
    assert ticket.description == DESCRIPTION
    assert list(ticket.er_masks) == ["0", "3"]
    with caplog.at_level(logging.WARNING, "startsparse"):
        again = rebuild(ticket, ranking)
    assert not caplog.records
    assert torch.equal(again(images()), model(images()))
    found = found_masks(model)
    assert found.keys() == ticket.found.keys()
    for name, mask in found_masks(again).items():
        assert torch.equal(mask, found[name])
        assert torch.equal(mask, ticket.found[name])
    assert torch.equal(ticket.er_masks["3"], model[3].weight_mask)
    assert int(again[1].num_batches_tracked) == 3


def test_round_trip_in_another_process(saved, tmp_path):
    model, path = saved
    here = tmp_path / "out.pt"
    argv = [sys.executable, "-c", REBUILD, path, here, Path(__file__).parent]
    subprocess.run(argv, check=True, timeout=120)
    assert torch.equal(torch.load(here, weights_only=True), model(images()))


def test_a_ticket_of_resnet18_is_below_four_mebibytes(tmp_path):
    model = models.build("resnet18", classes=10)
    shapes = {name: layer.weight.shape for name, layer in sparse_layers(model).items()}
    attach_masks(model, draw_masks(shapes, [0.5] * len(shapes), 1, "bernoulli"))
    popup(model, 1)
    set_density(model, 0.2)
    save_ticket_by_rank_0(tmp_path / "a.ticket", model, DESCRIPTION)
    assert 2.6 * 2**20 < (tmp_path / "a.ticket").stat().st_size < 3 * 2**20
    ticket = load_ticket(tmp_path / "a.ticket")
    size = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("_score"))
    assert sum(int(mask.sum()) for mask in ticket.found.values()) == pytest.approx(
        0.2 * size, abs=25
    )


def test_the_format_is_that_of_safetensors(saved):
    model, path = saved
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(facts["description"]) == DESCRIPTION
    assert torch.equal(tensors["statistics/1.running_var"], model[1].running_var)
    assert tensors["found/3.weight"].dtype == torch.uint8
    assert tensors["found/3.weight"].numel() == 6 * 8 * 3 * 3 // 8
    assert not any(name.endswith("score") for name in tensors)


def test_a_failed_write_leaves_the_ticket_that_was(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_ticket_by_rank_0(path, model, {"seed": 8})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_changed_or_missing_byte_is_noticed(saved):
    _, path = saved
    file, cause = path.read_bytes(), r"a.ticket: (damaged, the checksum|not a ticket of this)"
    length = int.from_bytes(file[:8], "little")
    for place in [*range(300), *range(300, len(file), 37), length + 7, length + 8, len(file) - 1]:
        for bit in (0, 5):
            broken = bytearray(file)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises(UserError, match=cause):
                load_ticket(path)
    for rest in (file[:-1], file + b"\0", file[: len(file) // 2], file[:5], b"", file[1:]):
        path.write_bytes(rest)
        with pytest.raises(UserError, match=cause):
            load_ticket(path)


@pytest.mark.parametrize("content", [b"hello", b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"])
def test_other_files_are_no_tickets(tmp_path, content):
    path = tmp_path / "x"
    with pytest.raises(UserError, match="x: no ticket can be read there"):
        load_ticket(path)
    with pytest.raises(UserError, match="no ticket can be read there"):
        load_ticket(tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match="x: not a ticket of this project, or a damaged one"):
        load_ticket(path)
    torch.save({"model": torch.ones(3)}, path)
    with pytest.raises(UserError, match="x: not a ticket of this project, or a damaged one"):
        load_ticket(path)
    for facts in (None, {"kind": "another"}):
        safetensors.torch.save_file({"x": torch.ones(3)}, path, facts)
        with pytest.raises(UserError, match="x: not a ticket of this project, or a damaged one"):
            load_ticket(path)


def test_a_network_that_does_not_fit_is_refused(saved):
    _, path = saved
    ticket = load_ticket(path)

    def build(masks, layers=None, biases=True):
        model = layers or plain()
        attach_masks(model, masks)
        init_weights(model, "kn-nonzero-bias" if biases else "kn-zero-bias", 1)
        popup(model, 1)
        return model

    other = {name: mask.flip(0) for name, mask in ticket.er_masks.items()}
    for model, cause in [
        (build({}), "the network has no random mask of '0'"),
        (build(other), "its random mask of '0' differs"),
        (build(ticket.er_masks, biases=False), "the network has no mask of '0.bias'"),
    ]:
        before = model.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        with pytest.raises(UserError, match=cause):
            put_in_place(model, ticket)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wider = plain()
    wider[7] = nn.Linear(6 * 3 * 3, 6)
    with pytest.raises(UserError, match=r"mask of '7.weight' is \(5, 54\) instead of \(6, 54\)"):
        put_in_place(build(ticket.er_masks, wider), ticket)


def test_other_weights_are_warned_of(saved, caplog):
    _, path = saved
    ticket = load_ticket(path)
    ticket.description["seed"] = 8
    with caplog.at_level(logging.WARNING, "startsparse"):
        rebuild(ticket)
    assert [record.message for record in caplog.records] == [
        "warning: the frozen weights drawn here are not, to the bit, the ticket's"
    ]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("what", SHUFFLES)
def test_shuffles(what, ranking):
    model = trained(ranking)
    found, layers = found_masks(model), popup_layers(model)
    effective = {name: layer.effective_weight().detach() for name, layer in layers.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    output, seen = model(images()), []
    for number in (0, 1, 0):
        with shuffled(model, 3, what, number):
            model.train()(images())  # moves running statistics
            masks = found_masks(model)
            seen.append(masks)
            for name, mask in masks.items():
                assert mask.sum() == found[name].sum()
            for name, layer in layers.items():
                here = layer.effective_weight().detach()
                inside = state.get(f"{name}.weight_mask", torch.ones_like(masks[f"{name}.weight"]))
                assert not (masks[f"{name}.weight"] & ~inside).any()
                assert not torch.equal(here, effective[name])
                kept, before = (x[x != 0].sort().values for x in (here, effective[name]))
                assert torch.equal(kept, before) == (what == "mask+weights")
                same = torch.equal(layer.weight, state[f"{name}.weight"])
                assert same == (what == "mask")
        model.eval()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images()), output)
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in found)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in found)


def test_a_failure_inside_a_shuffle_restores_too():
    model = trained()
    found = found_masks(model)
    with pytest.raises(RuntimeError, match="stop"), shuffled(model, 3, "mask"):
        raise RuntimeError("stop")
    assert all(torch.equal(mask, found[name]) for name, mask in found_masks(model).items())


@pytest.mark.parametrize("what", SHUFFLES)
def test_memory_format_does_not_matter_for_shuffles(what):
    def layers():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3))
        init_weights(model, "kn-nonzero-bias", 1)
        popup(model, 1)
        set_density(model, 0.3)
        return model.eval()

    one, other = layers(), layers().to(memory_format=torch.channels_last)
    with shuffled(one, 3, what), shuffled(other, 3, what):
        assert torch.allclose(one(images()), other(images()), atol=1e-5)
        for name, mask in found_masks(one).items():
            assert torch.equal(mask, found_masks(other)[name])


def test_equal_tickets_are_equal_files(tmp_path):
    """safetensors itself writes metadata in the order of a hash table."""
    model, files = trained(), set()
    for number in range(6):
        save_ticket_by_rank_0(tmp_path / str(number), model, DESCRIPTION)
        files.add((tmp_path / str(number)).read_bytes())
    assert len(files) == 1


def rewritten(path, change):
    """Change metadata and tensors of a ticket, and give it a right digest."""
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(facts, tensors)
    sealed.write(path, tensors, facts)


def nan(facts, tensors):
    tensors["statistics/1.running_mean"][0] = torch.nan


def outside(facts, tensors):
    tensors["found/0.weight"][:] = 255


CRAFTED = {
    "'description' is no JSON (is nested too deeply)": lambda f, t: f.update(
        description="[" * 10**5
    ),
    "'description' is no JSON (names 'a' twice)": lambda f, t: f.update(
        description='{"a": 1, "a": 2}'
    ),
    "'description' is a list, no mapping": lambda f, t: f.update(description="[]"),
    "'shapes' is no JSON (Expecting value": lambda f, t: f.pop("shapes"),
    "'weights' is no digest": lambda f, t: f.update(weights="x"),
    "has no mask 'er/3'": lambda f, t: t.pop("er/3"),
    "has an entry 'more'": lambda f, t: t.update(more=torch.ones(1)),
    "has an entry 'er/'": lambda f, t: t.update({"er/": torch.ones(1)}),
    "the shape of 'er/0' is not one of sizes": lambda f, t: f.update(
        shapes=f["shapes"].replace("[8, 3, 3, 3]", "[-8, -3, 3, 3]")
    ),
    "'er/0' is uint8 [27], not the bits of a mask [8, 3, 3, 3000000000]": lambda f, t: f.update(
        shapes=f["shapes"].replace("[8, 3, 3, 3]", "[8, 3, 3, 3000000000]")
    ),
    "'found/0.weight' is float32 [27], not the bits": lambda f, t: t.update(
        {"found/0.weight": t["found/0.weight"].float()}
    ),
    "'statistics/1.running_mean' is negative or not finite": nan,
    "its mask of '0' does not lie inside the random mask": outside,
    "'found/7.bias' has bits beyond its mask": lambda f, t: t["found/7.bias"].fill_(255),
}


@pytest.mark.parametrize("message", CRAFTED)
def test_a_right_digest_of_wrong_content(saved, message):
    _, path = saved
    rewritten(path, CRAFTED[message])
    with pytest.raises(UserError) as error:
        load_ticket(path)
    assert str(error.value).startswith(f"{path}: not a ticket that this project wrote: {message}")
    assert "\n" not in str(error.value)


def test_a_ticket_of_an_older_version_is_read(saved):
    """Its metadata have another order."""
    _, path = saved
    expected, file = load_ticket(path), path.read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    digest, blank = header["__metadata__"]["sha256"], sealed._BLANK
    text = json.dumps(header, separators=(",", ":")).replace(digest, blank).ljust(end - 8).encode()
    file = file[:8] + text + file[end:]
    path.write_bytes(file.replace(blank.encode(), hashlib.sha256(file).hexdigest().encode()))
    found = load_ticket(path)
    assert found.description == expected.description
    assert all(torch.equal(found.er_masks[n], mask) for n, mask in expected.er_masks.items())


def test_a_pipe_is_no_ticket(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe or a device, not a file"):
        load_ticket(tmp_path / "pipe")
