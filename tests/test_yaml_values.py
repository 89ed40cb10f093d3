"""YAML of options: what would run code elsewhere, or fill the memory, is refused by line."""

import pytest

from startsparse.errors import OptionError
from startsparse.yaml_values import read_values


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            "name: !!python/object/apply:os.system ['x']\n",
            "line 1: has the tag '!!python/obj",
        ),
        ("lr: 1\nname: !!python/name:os.system\n", "line 2: has the tag '!!python/name:os.system'"),
        ("!!python/object:os.x\nlr: 1\n", "line 1: has the tag '!!python/object:os.x'"),
        ("!mine lr: 1\n", "line 1: has the tag '!mine'"),
        ("lr: " + "[" * 9999, "is nested too deeply; one 'option: value' a line"),
        ("lr: &a [*a]\n", "lr: should be one value"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "b: should be one value"),
    ],
)
def test_yaml_that_would_run_or_fill_the_memory(tmp_path, content, what):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(OptionError) as error:
        read_values(path)
    assert str(error.value).startswith(f"{path}: {what}")
    assert "\n" not in str(error.value)


def test_tags_of_plain_values_are_values(tmp_path):
    (tmp_path / "x.yaml").write_text("!!map\nlr: !!float '0.1'\nname: !!str 7\n")
    assert read_values(tmp_path / "x.yaml") == {"lr": "0.1", "name": "7"}
