"""A script as a process of a sweep: it holds the lock file of its run until it ends.

python -m startsparse.held LOCK PROCESSES MODULE [flags of the script]

MODULE is the script, as STR.main. With more than one of PROCESSES torchrun starts that many.
"""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

import importlib
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from filelock import Timeout

from startsparse.locks import locked

BUSY = 75  # exit code: another process holds the lock
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def main(lock: str, processes: str, module: str, argv: list[str]) -> None:
    """Run a script with ``argv`` while ``lock`` is held; exit code `BUSY` if another holds it."""
    try:
        with locked(Path(lock), "run this sweep", 0):
            if int(processes) > 1:
                _several([*TORCHRUN, processes, "-m", module, *argv])
            script = importlib.import_module(module)  # slow: the lock comes first
            from startsparse.processes import run_script

            sys.argv = [str(script.__file__), *argv]
            run_script(partial(script.main, argv))
    except Timeout:
        sys.exit(BUSY)


def _several(torchrun: list[str]) -> NoReturn:
    """Start torchrun, stop it if this process is asked to stop, and exit as it does."""
    with stopping.StopSignal() as stop:
        process = subprocess.Popen([sys.executable, *torchrun], start_new_session=True)
        stopping.adopt(process)
        asked = False
        while process.poll() is None:
            if stop.received and not asked:
                process.terminate()  # the one signal that it hands on to its processes
                asked = True
            time.sleep(0.1)
        sys.exit(128 + stop.received if process.returncode and asked else process.returncode)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
