"""README and docs/options.md: option values are taken, and commands understood."""

import re
import shlex
from pathlib import Path

import dst_runs
import pytest
import slt_runs
from option_names import SCRIPTS, shown_names
from script_runs import original_commands

from ER_SLT.options import CIFAROptions
from startsparse.commandline import parse
from startsparse.fields import normal

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPTIONS = (ROOT / "docs/options.md").read_text()


def section(script, text=OPTIONS):
    """What a text says of a script package, under a heading of its own."""
    return re.search(rf"^(##+) {script}: .*?(?=^\1 )", f"{text}\n## ", re.M | re.S)[0]


def table(script):
    """(option, value) of every row of the script's table."""
    pairs, option = [], None
    for line in section(script).splitlines():
        cells = [cell.strip() for cell in line.split("|")][1:-1]
        if cells and (cells[0].startswith("`--") or not cells[0]):
            option = cells[0].strip("`") or option
            pairs += [(option, value) for value in re.findall(r"`(.*?)`", cells[1])]
    return pairs


NEEDS = {  # what an option, or a value of one, counts beside
    **{o: ["--threshold-list", "0.1"] for o in ("--pruner", "--rewind", "--prune-scheduler")},
    "--sparse-function": ["--conv-type", "STRConv"],
    "network": ["--er-sparsity-file", "layers.json"],
    "str-induced-er": ["--er-sparsity-file", "layers.json"],
    "folder": ["--data", "."],
    "mask-ref": ["--target-expt-name", "some-run"],
}


ROWS = [(script, *row) for script in SCRIPTS for row in table(script)]


@pytest.mark.parametrize(("script", "option", "value"), ROWS)
def test_every_value_of_the_tables_is_taken(script, option, value):
    kind, configs = SCRIPTS[script]
    names, _ = shown_names(kind)
    taken = {
        getattr(
            parse(kind, configs, [option, spelling, *NEEDS.get(option, []), *NEEDS.get(value, [])]),
            names[normal(option.strip("-"))],
        )
        for spelling in {value, value.upper(), value.replace("_", "-")}
    }
    assert len(taken) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_is_complete(script):
    """Every option is in the tables with each of its values; those of STR are not said again."""
    names, choices = shown_names(SCRIPTS[script][0])
    shown = shown_values(script)
    for option, values in choices.items():
        field = names[option]
        assert values <= shown.get(field, set()) | shown_values("STR").get(field, set()), option


def shown_values(script):
    """Field -> the values of it in the script's table."""
    names, shown = shown_names(SCRIPTS[script][0])[0], {}
    for option, value in table(script):
        shown.setdefault(names[normal(option.strip("-"))], set()).add(normal(value))
    return shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_understood(script, monkeypatch):
    monkeypatch.chdir(ROOT / script)
    commands = re.findall(r"^python (cifar_)?main\.py(.*)$", section(script, README), re.MULTILINE)
    assert len(commands) == {"STR": 3, "ER_DST": 2, "ER_SLT": 2}[script]
    kind, configs = SCRIPTS[script]
    for cifar, command in commands:
        options = parse(CIFAROptions if cifar else kind, configs, command.split())
        assert options.set == ("cifar10" if command else "digits")


def test_the_commands_that_name_a_set_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT / "STR")
    commands = re.findall(r"^python main\.py (--set .*)$", README, re.MULTILINE)
    argvs = [command.replace("DIR", ".").split() for command in commands]
    sets = [parse(*SCRIPTS["STR"], argv).set for argv in argvs]
    assert sets == ["cifar10", "folder", "karate", "modular-addition"]


def test_the_readme_is_short():
    assert README.count("\n") <= 200


def test_the_original_commands_are_in_it_word_by_word():
    for command in [*original_commands().values(), dst_runs.PUBLISHED]:
        assert f"\npython main.py {command}\n" in README
    assert "\npython run_imp.py\n" in README
    assert f"\npython cifar_main.py {shlex.join(slt_runs.PUBLISHED)}\n" in README
