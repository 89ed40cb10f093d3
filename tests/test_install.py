"""What is installed: the dependencies, the wheel in an environment of its own, any platform."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

import startsparse
from startsparse import held
from startsparse.data import data_root

ROOT = Path(__file__).parents[1]
PACKAGES = ("startsparse", "STR", "ER_DST", "ER_SLT")
SUFFIXES = {".py", ".yaml", ".cpp", ".h", ".typed"}


def test_requirements_and_dependencies_are_the_same():
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[.*?\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    assert re.findall(r'"(.*?)"', block) == lines[:-2]
    assert lines[-2:] == ["-e .", ""]


def test_the_version_is_the_package_s():
    assert f'\nversion = "{startsparse.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


# --- the wheel ------------------------------------------------------------------------------------


def sources():
    """Every file that the packages are made of, relative to the root."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            inside = path.relative_to(ROOT)
            if path.suffix in SUFFIXES and inside.parts[1] not in ("runs", "results"):
                yield inside


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Folder of an environment with the wheel in it, and of what it depends on, the files here."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in (*sources(), *map(Path, ("pyproject.toml", "README.md", "LICENSE"))):
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "source" / path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*pip, *build, str(folder / "source")], check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    site = Path(
        sysconfig.get_path("purelib", "venv", {"base": folder / "env", "platbase": folder / "env"})
    )
    # A line of a .pth file is a folder; .pth files inside it, as of an install by -e, do not count.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return folder / "env", site


def test_the_wheel_has_every_file(environment):
    _, site = environment
    own = list(sources())
    assert {path.suffix for path in own} == SUFFIXES
    assert [str(path) for path in own if not (site / path).exists()] == []


def test_scripts_run_from_the_wheel(environment, tmp_path):
    folder, site = environment
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "STARTSPARSE_DATA")}

    def say(*argv):
        command = [str(folder / "bin/python"), "-m", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = say("STR.main", "--set", "karate", "--epochs", "1", "--passes", "1")
    assert f"config   {site / 'STR/configs/karate.yaml'}\n" in said
    (run,) = tmp_path.glob("runs/karate/*/seed-1")
    assert (run / "summary.json").exists()
    assert '"git_commit": ""' in (run / "environment.json").read_text()
    sweep = ["--dry-run", "--config", "configs/digits-imp.yaml", "--target", "0.2"]
    assert "runs, " in say("STR.run_imp", *sweep)
    assert "python -m ER_DST.main " in say("startsparse.sweep", "ER_DST", "--dry-run")


def test_data_lies_in_the_working_folder_without_a_checkout(monkeypatch):
    monkeypatch.delenv("STARTSPARSE_DATA", raising=False)
    monkeypatch.setattr(startsparse, "__file__", "/site-packages/startsparse/__init__.py")
    assert data_root("") == Path("data")


# --- platforms ------------------------------------------------------------------------------------


def test_every_module_imports_without_what_only_unix_has():
    """No fcntl, resource, SIGHUP, SIGPIPE or affinity of processes."""
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in sources()
        if path.suffix == ".py" and path.name != "__main__.py"
    ]
    code = (
        "import importlib, os, signal, sys\n"
        "for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp'): sys.modules[name] = None\n"
        "for name in ('SIGHUP', 'SIGPIPE'): vars(signal).pop(name, None)\n"
        "vars(os).pop('sched_getaffinity', None)\n"
        f"for name in {sorted(modules)}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_of_a_sweep_that_another_process_has_is_busy(tmp_path):
    lock = str(tmp_path / "lock")
    with FileLock(lock), pytest.raises(SystemExit) as stop:
        held.main(lock, "1", "STR.main", [])
    assert stop.value.code == held.BUSY


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    commands = re.findall(r"^\t\$\(BIN\)/(.*)$", lint, re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert len(hooks) == len(commands)
    for hook, command in zip(hooks, commands):  # pre-commit adds the names of files itself
        own = command if hook.get("pass_filenames") is False else command.split(" startsparse/")[0]
        assert hook["entry"] == own
