"""Files are whole or not there, and a bad checkpoint is one line."""

import pytest
import torch
from torch import nn

from startsparse import checkpoint
from startsparse.atomic import replacing
from startsparse.errors import UserError


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    with replacing(path) as temporary:
        temporary.write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "flipped", "missing"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    path = tmp_path / "a.pt"
    checkpoint.save_by_rank_0(path, {"model": {"w": torch.randn(1000)}})
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(data) // 2  # among the tensor's bytes
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        damages = {"empty": b"", "truncated": data[:middle], "text": b"hello", "flipped": flipped}
        path.write_bytes(damages[damage])
    with pytest.raises(
        UserError, match=r"a\.pt: (not a complete checkpoint|no such|damaged)"
    ) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    assert "executed" not in capsys.readouterr().out


def test_another_file_of_torch_is_not_a_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 5), "'weight' is .5, 3. instead of .4, 3."),
        (nn.Linear(3, 4, bias=False), "the checkpoint has no 'bias'"),
        (nn.Sequential(nn.Linear(3, 4)), "the network has no '0.bias'"),
    ],
)
def test_a_checkpoint_of_another_network_is_named(tmp_path, other, message):
    path = tmp_path / "a.pt"
    checkpoint.save_by_rank_0(path, {"model": other.state_dict()})
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(nn.Linear(3, 4), checkpoint.load(path), path)
