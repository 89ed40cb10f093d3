"""Runs scripts as users start them, a fork for each, after the slow imports were done once.

python script_server.py reads one JSON request a line and answers with one line; `torture.scripts`
is its other side. A script ends when it has taken its first optimizer step, unless it should run to
its end. The digits are few, `torch.compile` does nothing, and there is no network.
"""

import contextlib
import ctypes
import io
import json
import locale
import os
import resource
import runpy
import select
import signal
import sys
import time
import traceback
import urllib.error
import urllib.request
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib.pyplot  # noqa: E402, F401
import sklearn.datasets  # noqa: E402
import sklearn.model_selection  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from script_runs import few_digits  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import ER_DST.main  # noqa: E402, F401
import ER_SLT.main  # noqa: E402, F401
import startsparse.export.command  # noqa: E402
import startsparse.jobs  # noqa: E402
import startsparse.report  # noqa: E402
import startsparse.sweep  # noqa: E402
import startsparse.tabular.report  # noqa: E402
from startsparse import data  # noqa: E402
from startsparse.engine import choice  # noqa: E402

WAIT = 4  # seconds of wall clock for a second of CPU: others use the machine too
TRAINED = 99  # exit code: an optimizer has taken a step
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # capabilities by which root ignores permissions


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(request: dict) -> dict:
    """Run a script; its exit code (minus a signal; None: it hung) and seconds."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _child(**request)
        except BaseException:
            Path(request["output"], "traceback").write_text(traceback.format_exc())
        os._exit(code)
    ended = os.pidfd_open(pid)
    hung = not select.select([ended], [], [], WAIT * request["limit"])[0]
    os.close(ended)
    if hung:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it started
    _, status = os.waitpid(pid, 0)
    code = None if hung else os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": time.monotonic() - start}


def _child(
    *,
    module: str,
    argv: list[str],
    folder: str,
    output: str,
    environment: dict[str, str],
    without: list[str],
    umask: int,
    closed: list[int],
    encoding: str,
    unprivileged: bool,
    whole: bool,
    limit: int,
) -> int:
    """Run ``module`` in ``folder``; its exit code. Output goes to stdout and stderr in ``output``.

    Args:
        environment, without: variables to set, and to unset.
        closed: descriptors among 0, 1 and 2 that the user closed.
        encoding: of the terminal, and of files that are opened without naming one; "": UTF-8.
        unprivileged: permissions count for root, too.
        whole: do not stop after the first optimizer step.
        limit: CPU seconds after which it counts as hung.
    """
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    os.environ.update(environment)
    for name in without:
        os.environ.pop(name, None)
    os.umask(umask)
    os.chdir(folder)
    _redirect(Path(output), closed, encoding)
    if encoding:
        locale.setlocale(locale.LC_CTYPE, "C")
    if unprivileged:
        _respect_permissions()
    _few_and_offline()
    if not whole:
        register_optimizer_step_post_hook(lambda *_: _stop())
    warnings.filterwarnings("ignore", module="runpy")  # that the module was imported before
    sys.argv = [module, *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 0
    try:
        if module.endswith("cifar_main"):
            runpy.run_path(str(ROOT / "ER_SLT/cifar_main.py"), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        code = 70
        with contextlib.suppress(Exception):
            (Path(output) / "traceback").write_text(traceback.format_exc(), encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code if isinstance(code, int) else int(code is not None)


def _redirect(output: Path, closed: list[int], encoding: str) -> None:
    """What an interpreter does about its three streams when it starts."""
    sys.stdout.flush()
    sys.stderr.flush()
    opened = [os.open(os.devnull, os.O_RDONLY)]
    opened += [
        os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for name in ("stdout", "stderr")
    ]
    streams = []
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
        errors = "backslashreplace" if number == 2 else "strict"
        raw = io.FileIO(number, "w" if number else "r", closefd=False)
        buffered = io.BufferedWriter(raw) if number else io.BufferedReader(raw)
        streams.append(
            None
            if number in closed
            else io.TextIOWrapper(buffered, encoding or "utf-8", errors, line_buffering=number == 2)
        )
        if number in closed:
            os.close(number)
    sys.stdin, sys.stdout, sys.stderr = streams
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams


def _respect_permissions() -> None:
    """Drop root's right to ignore them, from the effective capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
        libc.capset(header, sets)


def _few_and_offline() -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("there is no network")

    def first_job(jobs: list, *_: object) -> list:
        sys.modules[jobs[0].module].main(jobs[0].argv)  # the others differ in numbers only
        return []

    choice._SHORTEST = choice._LONGEST = 0.0  # layers are tried twice, and no longer
    urllib.request.urlopen = no_network
    torch.compile = lambda model, **_: model
    startsparse.jobs.run_all = first_job
    data.SETS["digits"] = few_digits(40, 20)


def _stop() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(TRAINED)


if __name__ == "__main__":
    serve()
