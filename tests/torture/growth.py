"""What a long run, or many runs in one process, may not need more and more of."""

import contextlib
import gc
import io
import os
import threading
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import strategies as st

from ER_DST import main as dst
from ER_SLT import main as slt
from startsparse import plots
from startsparse.phases import Phase
from startsparse.tabular import program
from startsparse.trainer import Trainer
from STR import main as str_
from torture.promises import promise

EPOCHS = 60
NET = ["--arch", "mlp", "--width", "8", "--batch-size", "500"]
LONG = {
    "STR": (str_, ["--config", "", *NET, "--epochs", str(EPOCHS), "--conv-type", "STRConvER"]),
    "ER_DST": (dst, ["--sparse", *NET, "--epochs", str(EPOCHS), "--method", "DST"]),
    "ER_SLT": (slt, ["--dataset", "DIGITS", *NET, "--levels", "2", "--epochs", str(EPOCHS // 2)]),
}


def used() -> dict[str, int]:
    """Open files, threads and bytes of memory of this process; {} where /proc is not there."""
    if not Path("/proc/self/statm").exists():
        return {"threads": threading.active_count()}
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def check_flat(seen: list[dict[str, int]]) -> None:
    """Compare the last fifth with the one before. Before that, levels and libraries open things."""
    fifth = len(seen) // 5
    for name in seen[0]:
        # The least: what Python and the allocator keep for later goes up and down.
        before, after = (
            min(one[name] for one in part) for part in (seen[-2 * fifth : -fifth], seen[-fifth:])
        )
        slack = {"bytes": 8 << 20, "maps": 8}.get(name, 0)
        assert after <= before + slack, (name, before, after)


def places(folder: Path) -> list[str]:
    return ["--log-dir", f"{folder}/runs", "--result-dir", str(folder), "--sparse-compute", "off"]


@promise(
    "Memory, open files, threads and time are flat over 60 epochs, in every script",
    st.sampled_from(sorted(LONG)),
    cases=len(LONG),
    sample=0,
)
def epochs(name, folder):
    script, argv = LONG[name]
    seen, epoch = [], Trainer._epoch

    def look(trainer: Trainer, phase: Phase) -> None:
        epoch(trainer, phase)
        seen.append(used())

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Trainer, "_epoch", look)
        patch.setattr(plots, "plot_run_by_rank_0", lambda *_: None)
        script.main([*argv, *places(folder)])
    check_flat(seen)
    seconds = pd.read_csv(next(folder.glob("runs/*/*/*/epochs.csv")))["cpu_seconds"].diff()
    early, late = seconds[10:30].median(), seconds[40:].median()
    assert late < 1.2 * early, (early, late)


@promise(
    "Memory, open files and threads are flat over 50 runs in one process",
    st.sampled_from(sorted(LONG)),
    cases=len(LONG),
    sample=0,
)
def runs(name, folder):
    script, argv = LONG[name]
    seen = []
    for _ in range(50):
        with contextlib.redirect_stdout(io.StringIO()):
            script.main([*argv, "--epochs", "1", *places(folder)])
        seen.append(used())
    check_flat(seen)


@promise(
    "Memory, open files and threads are flat over 200 networks on tables in one process",
    st.just("200 networks"),
    cases=1,
    sample=0,
)
def networks(_, folder):
    seen = []
    for number in range(10):
        where = folder / str(number)
        argv = ["--seeds", *map(str, range(20)), "--starts", "0.5", "--densities", "0.3"]
        argv += ["--reset", "True", "--epochs", "1", "--final-epochs", "1", "--width", "8"]
        program.main([*argv, "--result-dir", str(where)], say=lambda _: None)
        seen.append(used())
    check_flat(seen)
