"""Names, YAML, --help, folders and first lines, alike in the three scripts."""

import dataclasses
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from script_runs import ROOT

import ER_DST.main
import ER_SLT.main
import STR.main
from ER_DST.options import DSTOptions
from ER_SLT.options import SLTOptions
from startsparse import data, finding, recipe
from startsparse.commandline import from_flags, parse, read_yaml, write_yaml
from startsparse.errors import OptionError, run_script
from startsparse.fields import normal, shown
from startsparse.tabular.options import TabularOptions
from STR.options import STROptions
from STR.run_imp import SweepOptions

SCRIPTS = {
    "STR": (STROptions, STR.main.CONFIGS),
    "ER_DST": (DSTOptions, ER_DST.main.CONFIGS),
    "ER_SLT": (SLTOptions, ER_SLT.main.CONFIGS),
}


def parsed(script, *argv):
    return parse(*SCRIPTS[script], argv)


# --- YAML -----------------------------------------------------------------------------------------


def from_file(tmp_path, content, script="STR"):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    return parsed(script, "--config", str(path))


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("amp: off", "amp", "off"),
        ("sparse_compute: on", "sparse_compute", "on"),
        ("sparse_compute: 'off'", "sparse_compute", "off"),
        ("name: 007", "name", "007"),
        ("name: no", "name", "no"),
        ("name: 1e3", "name", "1e3"),
        ("name: 1:30", "name", "1:30"),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("name: null", "name", "null"),
        ("name: ''", "name", ""),
        ("name:", "name", ""),
        ("name: 'a: b # c'", "name", "a: b # c"),
        ("lr: 5e-4", "lr", 5e-4),
        ("lr: .5", "lr", 0.5),
        ("epochs: 010", "epochs", 10),
        ("nesterov: yes", "nesterov", True),
        ("nesterov: off", "nesterov", False),
        ("no_bn_decay: true", "no_bn_decay", True),
        ("no-bn-decay: True", "no_bn_decay", True),
        ("threshold_list: [1e-1, 5e-2]", "threshold_list", (0.1, 0.05)),
        ("threshold_list: 0.1", "threshold_list", (0.1,)),
        ("threshold_list:\n- 0.1\n- 0.05", "threshold_list", (0.1, 0.05)),
        ("threshold_list:", "threshold_list", ()),
        ("threshold_list: []", "threshold_list", ()),
        ("conv_type: STRConv\nst_decay: 1e-3", "st_decay", 1e-3),
        ("conv_type: STRConv\nst_decay:", "st_decay", None),
        ("conv_type: STRConv\nst_decay: null", "st_decay", None),
    ],
)
def test_values_are_what_is_written(tmp_path, line, field, value):
    found = getattr(from_file(tmp_path, line), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 0.1\nseed: 2\nlr: 0.2", "line 3: names lr again"),
        ("model: mlp\narch: mlp", "names arch again, after model"),
        ("er_sparse_init: 0.1\ner-sparse-init: 0.2", "names er-sparse-init again, after er_sparse"),
        ("lr:", "--lr: '' is not a number"),
        ("set:", "--set: '' is none of digits"),
        ("set: no", "--set: 'no' is none of digits"),
        ("nesterov:", "nesterov: '' should be true or false"),
        ("nesterov: maybe", "nesterov: 'maybe' should be true or false"),
        ("amp: no", "--amp: 'no' is none of auto, bf16, off"),
        ("epochs: 1e2", "--epochs: '1e2' is not a whole number"),
        ("? [a, b]\n: 3", "line 1: should be one 'option: value'"),
        ("lr: [[1]]", "lr: should be one value"),
        ("lr: .inf", "--lr: '.inf' is not a number"),
        ("lr: NaN", "--lr: 'NaN' is not a finite number"),
        ("lr: null", "--lr: 'null' is not a number"),
        ("epochs: 1_000", "--epochs: '1_000' is not a whole number"),
        ("epochs: 0x10", "--epochs: '0x10' is not a whole number"),
        ("epochs: 1:30", "--epochs: '1:30' is not a whole number"),
        ('threshold_list: ["0.1", "--seed=7"]', "threshold_list: a value cannot begin with a dash"),
        ("threshold_list: [-b, 3]", "threshold_list: a value cannot begin with a dash, as '-b'"),
        ("threshold_list: ['--']", "threshold_list: a value cannot begin with a dash, as '--'"),
        ("threshold_list: [0.1, x]", "--threshold-list: 'x' is not a number"),
        ("threshold_list: 0.5 0.3", "--threshold-list: '0.5 0.3' is not a number"),
        ('name: "a\\0b"', "'--name=a\\x00b': contains a NUL character"),
        ('name: "\\ud800"', "'--name=\\ud800': is not UTF-8 text"),
        ("epochs:\t3", "is not YAML: "),
        ("<<: {epochs: 3}", "<<: should be one value"),
    ],
)
def test_values_that_are_none_are_one_line(tmp_path, content, message):
    with pytest.raises(OptionError) as error:
        from_file(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'x.yaml'}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["off", "no", "1e3", "007", "", "null", "~", "a: b", "- x", "-x", "--y", "'", '"', "#", "é",
     " padded ", "[1]", "{a}", "a\nb", "x" * 200 + " y" * 50, "=", "1.0", "0x10", "!tag", "&a",
     "*a"],
)  # fmt: skip
def test_every_value_goes_around(tmp_path, name):
    made = STROptions(name=name, expt_setup=name, lr=1e-7, lr_min=1e22, clip_norm=3e38)
    (tmp_path / "x.yaml").write_text(write_yaml(made))
    assert read_yaml(STROptions, tmp_path / "x.yaml") == made
    assert yaml.safe_load((tmp_path / "x.yaml").read_text())["name"] == name


# --- numbers --------------------------------------------------------------------------------------

BEYOND = ["3000000000", "-3000000000", "1e39"]


@pytest.mark.parametrize("value", ["inf", "nan", "1_0", *BEYOND])
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_takes_a_number_that_no_computation_holds(script, value):
    kind, _ = SCRIPTS[script]
    hints = {field: {hint, *get_args(hint)} for field, hint in get_type_hints(kind).items()}
    whole = {field for field, types in hints.items() if int in types} - {"seed", "seeds"}
    real = {field for field, types in hints.items() if float in types}
    assert {"lr", "lr_min", "weight_decay", "clip_norm", "momentum"} <= real
    assert {"width", "epochs", "batch_size"} <= whole
    for field in real | whole if value not in BEYOND else real if "e" in value else whole:
        name = "--" + shown(kind)[field].replace("_", "-")
        with pytest.raises(OptionError, match=f"^{name}: '{value}' is (not|beyond) .*number"):
            from_flags(kind, [f"{name}={value}"], kind())


@pytest.mark.parametrize("value", [str(2**63 - 1), str(-(2**63)), "-5", "+7", "007"])
def test_seeds_have_64_bits(value):
    assert parsed("STR", "--seed", value).seed == int(value)
    with pytest.raises(OptionError, match="--seed: '.*' is beyond the whole numbers that fit"):
        parsed("STR", "--seed", str(2**63))


def test_a_value_of_a_list_is_named():
    with pytest.raises(OptionError, match="^--threshold-list: 'x' is not a number$"):
        parsed("STR", "--threshold-list", "0.1", "x")
    with pytest.raises(OptionError, match="^--seeds: '1.5' is not a whole number$"):
        from_flags(SweepOptions, ["--seeds", "1", "1.5"], SweepOptions())
    with pytest.raises(OptionError, match="^--reset: 'maybe' should be True or False$"):
        from_flags(TabularOptions, ["--reset", "no", "maybe"], TabularOptions())


@pytest.mark.parametrize(("word", "message"), [
    ("--name=\udcff", "is not UTF-8 text"), ("\udcff", "is not UTF-8 text"), ("--", "no meaning"),
])  # fmt: skip
def test_words_that_are_no_text(word, message):
    with pytest.raises(OptionError, match=message):
        parsed("STR", word)


def test_an_error_is_one_line_whatever_it_names(capsys):
    def main():
        raise OptionError("--name: 'a\nb\x1b\u2028\udcff'")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --name: 'a\\nb\\x1b\\u2028\\udcff'\n"


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_the_other_scripts_are_taken_where_they_mean_no_other(script, tmp_path):
    kind, _ = SCRIPTS[script]
    sparse = ["--sparse"] if script == "ER_DST" else []
    plain = {
        "seed": ("--seed",),
        "set": ("--set", "--dataset"),
        "arch": ("--arch", "--model"),
        "er_sparse_method": ("--er-sparse-method", "--sparse-init"),
        "er_sparse_init": ("--er-sparse-init", "--init-density", "--er-init-density"),
        "weight_decay": ("--wd", "--l2", "--weight-decay"),
        "log_dir": ("--log-dir", "--save"),
        "name": ("--name", "--save-file", "--save_file"),
    }
    values = {"seed": 3, "set": "mnist", "arch": "vgg11", "er_sparse_method": "ERK"}
    values |= {"er_sparse_init": 0.3, "weight_decay": 0.01, "log_dir": "there", "name": "x"}
    for field, flags in plain.items():
        for flag in flags:
            argv = [flag, str(values[field]), *sparse]
            assert getattr(parsed(script, *argv), field) == values[field], flag
            (tmp_path / "x.yaml").write_text(
                f"{flag[2:]}: {values[field]}\n" + "sparse: true\n" * bool(sparse)
            )
            assert getattr(parsed(script, "--config", f"{tmp_path}/x.yaml"), field) == values[field]
    rule = {"STR": "orthogonal", "ER_DST": "uniform", "ER_SLT": "ortho-zero-bias"}[script]
    for flag in ("--init", "--init-method", "--initBias"):
        assert parsed(script, flag, rule).init == rule
    folder = ["--data-dir", str(tmp_path), "--set", "cifar10"]
    assert parsed(script, *folder).data == str(tmp_path)
    with pytest.raises(OptionError) as error:  # its own name
        parsed(script, "--arch", "vgg")
    assert str(error.value).startswith(f"--{shown(kind)['arch']}: 'vgg' is none of")


@pytest.mark.parametrize("script", ["STR", "ER_SLT"])
def test_data_means_the_set_where_there_is_no_such_folder(script, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    own = "--set" if script == "STR" else "--dataset"
    for argv in (["--data", "CIFAR10"], ["--data=cifar10"]):
        options = parsed(script, *argv)
        assert (options.set, options.data) == ("cifar10", "")
    assert (options.arch, options.epochs) == ("resnet18", 160 if script == "STR" else 100)
    with pytest.raises(OptionError, match=f"--data: is the folder .* {own} names the set already"):
        parsed(script, "--data", "cifar10", own, "mnist")
    (tmp_path / "cifar10").mkdir()
    options = parsed(script, "--data", "cifar10", own, "mnist")
    assert (options.set, options.data) == ("mnist", "cifar10")


def test_that_data_is_read_as_the_set_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parsed("STR", "--data", "cifar10")
    assert capsys.readouterr().out == (
        "--data: there is no such folder; taken as the set cifar10\n"
    )


def test_in_er_dst_data_is_the_set_and_the_message_says_what_the_folder_is(tmp_path):
    with pytest.raises(
        OptionError, match="^--data: is the set; the folder of the sets is --data-d"
    ):
        parsed("ER_DST", "--data", str(tmp_path))


# --- the folder of the sets -----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_is_not_there_is_an_error_before_anything_is_loaded(script, monkeypatch):
    main = {"STR": STR.main, "ER_DST": ER_DST.main, "ER_SLT": ER_SLT.main}[script].main
    monkeypatch.setattr(recipe, "load_data", lambda *_: pytest.fail("loaded"))
    name = "--data-dir" if script == "ER_DST" else "--data"
    for sets in ([], ["--set", "cifar10"]):
        with pytest.raises(OptionError, match=f"^{name}: '/nowhere' is no folder; name, or "):
            main([*sets, "--data-dir", "/nowhere"])


def test_the_sets_lie_at_the_root_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.delenv("STARTSPARSE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert data.data_root("") == ROOT / "data"


# --- first lines ----------------------------------------------------------------------------------


class Loading(Exception):
    """Data is about to be loaded."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_lines_say_what_the_run_is(script, tmp_path, monkeypatch, capsys):
    main = {"STR": STR.main, "ER_DST": ER_DST.main, "ER_SLT": ER_SLT.main}[script].main
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(recipe, "load_data", lambda *_: (_ for _ in ()).throw(Loading))
    argv = ["--arch", "mlp", "--width", "16", "--name", "it is", "--seed", "3"]
    argv += ["--log-dir", str(tmp_path)]
    (tmp_path / "digits/it is/seed-3/levels").mkdir(parents=True)  # taken
    with pytest.raises(Loading):
        main(argv)
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[:5])
    _, configs = SCRIPTS[script]
    assert said["config"] == str(configs / "digits.yaml")
    assert said["run"] == f"{tmp_path}/digits/it is/seed-3-2"
    # 3072 x 16, 2 x 16 x 16, 16 x 10, 4 biases, 3 BatchNorm
    count = 3072 * 16 + 2 * 16 * 16 + 16 * 10 + 3 * 16 + 10 + 3 * 32
    assert said["network"] == f"mlp, {count:,} parameters"
    assert said["device"].startswith("cpu, ")
    own = {"STR": "--arch", "ER_DST": "--model", "ER_SLT": "--model"}[script]
    for words in (f"{own} mlp", "--width 16", "--seed 3", "'it is'", "--batch-size 64"):
        assert words in said["options"]
    assert "--momentum" not in said["options"]


def test_the_next_folder_is_the_one_that_is_made(tmp_path):
    options = dataclasses.replace(STROptions(), log_dir=str(tmp_path), name="n")
    for _ in range(3):
        expected = finding.next_folder(options)
        with finding.open_run(options) as run:
            assert run.folder == expected


# --- help -----------------------------------------------------------------------------------------


def help_of(script, capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parsed(script, *argv, "--help")
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_groups_and_the_names_of_the_script(script, capsys):
    kind, _ = SCRIPTS[script]
    text = help_of(script, capsys)
    titles = re.findall(r"^\W+ (\w[\w ]*) options \W+$", text, re.MULTILINE)
    assert titles == list(kind.groups)
    assert "run" in titles
    assert "hardware" in titles
    listed = {field for fields in kind.groups.values() for field in fields}
    flags = {normal(flag) for flag in re.findall(r"(?<=\W)--([\w-]+)", text)}
    assert {normal(shown(kind)[field]) for field in listed} <= flags
    assert "no-no-" not in text
    assert "no-help" not in text


def test_the_defaults_in_the_help_are_those_that_count(capsys, tmp_path, monkeypatch):
    def default_of(flag, *argv, script="STR"):
        words = " ".join(help_of(script, capsys, *argv).replace("│", " ").split())
        return re.search(rf" {flag} (?=[A-Z{{]).*?\(default: (.*?)\)", words)[1]

    monkeypatch.chdir(ROOT / "STR")
    assert default_of("--epochs") == "12"  # configs/digits.yaml
    assert default_of("--epochs", "--set", "mnist") == "20"
    config = ["--config", "configs/largescale/resnet18-cifar-str-3.yaml"]
    assert default_of("--conv-type", *config) == "STRConvER"
    assert default_of("--name", *config) == "cifar_0.3_ER_ERK_STR_2"
    assert default_of("--name") == "the network and its density"
    assert default_of("--update-frequency", script="ER_DST") == "10"
    assert default_of("--update-frequency", "--data", "mnist", script="ER_DST") == "100"
    assert default_of("--dataset", script="ER_SLT") == "digits"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reader_that_stops_early_is_no_error(script):
    """As in --help | head -1."""
    done = subprocess.run(
        [sys.executable, "-c",
         "import subprocess, sys\n"
         "p = subprocess.Popen([sys.executable, 'main.py', '--help'], stdout=subprocess.PIPE)\n"
         "p.stdout.close()\n"
         "sys.exit(p.wait() not in (0, 141))"],
        cwd=ROOT / script, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["--no-bn-decay"], True), (["--no-bn-decay", "False"], False), (["--bn-decay"], False),
     (["--no_bn_decay"], True), (["--no-bn-decay", "--bn-decay"], False)],
)  # fmt: skip
def test_decay_of_batchnorm_has_one_flag_and_its_opposite(argv, value):
    assert parsed("STR", *argv).no_bn_decay is value
    with pytest.raises(OptionError, match="--no-no-bn-decay: unknown option"):
        parsed("STR", "--no-no-bn-decay")


def test_config_and_a_run_to_resume_do_not_go_together(tmp_path):
    with pytest.raises(OptionError, match="^--config: has no effect, the options"):
        parsed("STR", "--config", "x.yaml", "--resume", str(tmp_path))
