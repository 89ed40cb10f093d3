"""The README: every option value of its table is taken, every command of it is understood."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from startsparse.commandline import normal
from STR import main as script
from STR import run_imp
from STR.options import STROptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def table():
    """(option, value) of every row of the table."""
    pairs, option = [], None
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.split("|")][1:-1]
        if cells and (cells[0].startswith("`--") or not cells[0]):
            option = cells[0].strip("`") or option
            pairs += [(option, value) for value in re.findall(r"`(.*?)`", cells[1])]
    return pairs


NEEDS = {
    "mask-ref": ["--target-expt-name", "some-run"],
    "network": ["--er-sparsity-file", "layers.json"],
    "str-induced-er": ["--er-sparsity-file", "layers.json"],
}


@pytest.mark.parametrize(("option", "value"), table())
def test_every_value_of_the_table_is_taken(option, value):
    for spelling in (value, value.upper(), value.replace("_", "-")):
        options = script.parse(
            STROptions, script.CONFIGS, [option, spelling, *NEEDS.get(value, [])]
        )
        taken = getattr(options, option.strip("-").replace("-", "_"))
        first = script.parse(STROptions, script.CONFIGS, [option, value, *NEEDS.get(value, [])])
        assert taken == getattr(first, option.strip("-").replace("-", "_"))


def test_the_table_is_complete():
    """Every option with a list of values is in the table, with every one of them."""
    shown = {}
    for option, value in table():
        shown.setdefault(normal(option.strip("-")), set()).add(normal(value))
    choices = {}
    for name, hint in get_type_hints(STROptions, include_extras=True).items():
        for extra in get_args(hint)[1:]:
            if str(getattr(extra, "metavar", "")).startswith("{"):
                choices[normal(name)] = {normal(v) for v in extra.metavar.strip("{}").split(",")}
    assert set(choices) == set(shown)
    for option, values in choices.items():
        assert values <= shown[option] | ({"multistep"} if option == "prune-scheduler" else set())


def test_every_command_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT / "STR")
    commands = re.findall(r"^python main\.py(.*)$", README, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        options = script.parse(STROptions, script.CONFIGS, command.split())
        assert options.set == "cifar10"


def test_every_sweep_is_understood(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "STR")
    commands = re.findall(r"^python run_imp\.py(.*)$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert run_imp.main(["--dry-run", *command.split()]) == 0
        assert "runs, " in capsys.readouterr().out


def test_the_original_commands_are_in_it_word_by_word():
    from str_runs import original_commands

    for command in original_commands().values():
        assert f"\npython main.py {command}\n" in README
