"""Any command line, file and environment, for each script and command."""

import dataclasses
import functools
import shutil
from pathlib import Path
from tempfile import mkdtemp

import yaml
from hypothesis import strategies as st

from startsparse.commandline import parse
from startsparse.errors import UserError
from torture.command_lines import (
    ENVIRONMENTS,
    MLP,
    SCRIPTS,
    Case,
    cases,
    in_environment,
    values,
)
from torture.promises import promise
from torture.scripts_tried import Start, check, run

MAINS = ["STR.main", "ER_DST.main", "ER_SLT.main"]


@functools.cache
def _template() -> Path:
    """A folder with files of every kind, and a finished run."""
    folder = Path(mkdtemp())
    (folder / "w").mkdir()
    argv = [*MLP, "--epochs", "1", "--warmup-length", "0", "--log-dir", "{tmp}/runs"]
    start = Start("STR.main", [*argv, "--result-dir", "{tmp}/results"], whole=True)
    ended = run(start, folder, folder / "w")
    assert ended.code == 0, ended
    (run_folder,) = (folder / "runs").glob("*/*/seed-1")
    run_folder.rename(folder / "run")
    shutil.rmtree(folder / "runs")
    (folder / "file").write_text("x\n")
    (folder / "small.yaml").write_text("arch: mlp\nwidth: 8\n")
    (folder / "a b, é").mkdir()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty.yaml").touch()
    (folder / "empty.csv").touch()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nosuch")
    (folder / "table.csv").write_text(
        "a,b,y\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(40))
    )
    return folder


def _try(case: Case, folder: Path) -> None:
    shutil.copytree(_template(), folder, symlinks=True, dirs_exist_ok=True)
    where = folder / case.where
    where.mkdir(exist_ok=True)
    closed = folder / "closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o500)
    if case.text is not None:
        (folder / "x.yaml").write_bytes(case.text)
    try:
        check(run(case.start, folder, where), case.start)
    finally:
        closed.chmod(0o700)


def _enter(module: str, what: str, sample: int) -> None:
    """The promise of one script."""

    def tried(case: Case, folder: Path) -> None:
        _try(case, folder)

    tried.__name__ = module.replace(".", "_")
    text = f"{what}: any command line, file and environment trains a step or ends with one line"
    promise(text, cases(module), cases=1000, sample=sample)(tried)


_enter("STR.main", "STR/main.py", 3)
_enter("ER_DST.main", "ER_DST/main.py", 3)
_enter("ER_SLT.main", "ER_SLT/main.py", 3)
_enter("ER_SLT.cifar_main", "ER_SLT/cifar_main.py", 1)
_enter("STR.run_imp", "STR/run_imp.py", 3)
_enter("startsparse.sweep", "startsparse.sweep", 3)
_enter("startsparse.tabular", "startsparse.tabular", 3)
_enter("startsparse.report", "startsparse.report", 3)
_enter("startsparse.export", "startsparse.export", 3)


@promise(
    "A run of an epoch ends well in any environment, or with one line",
    st.tuples(st.sampled_from(MAINS), st.sampled_from(ENVIRONMENTS)),
    cases=200,
    sample=2,
)
def a_whole_run(both, folder):
    module, settings = both
    argv = [*SCRIPTS[module][1][0], "--epochs", "1", "--warmup-length", "0"]
    argv += ["--levels", "1"] if module == "ER_SLT.main" else []
    case = in_environment(module, argv, settings)
    case.start.whole = True
    _try(case, folder)


@promise(
    "A YAML file means what the same options mean on the command line",
    st.sampled_from(MAINS).flatmap(
        lambda module: st.tuples(st.just(module), values(SCRIPTS[module][0]))
    ),
    cases=3000,
    sample=20,
)
def yaml_is_the_command_line(both, folder):
    module, (argv, content) = both
    kind = SCRIPTS[module][0]
    file = folder / "x.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    found = [_meaning(kind, words) for words in (argv, ["--config", str(file)])]
    if isinstance(found[0], str) and "has no effect" in found[0]:
        return  # a file may hold an option without effect at its default
    if isinstance(found[0], str):
        assert isinstance(found[1], str), found
        return
    assert not isinstance(found[1], str), found
    assert dataclasses.replace(found[1], config="") == dataclasses.replace(found[0], config="")


def _meaning(kind: type, argv: list[str]) -> object:
    """The options that a command line means, or the error."""
    try:
        return parse(kind, Path("/nosuch"), argv)
    except UserError as error:
        return str(error)
