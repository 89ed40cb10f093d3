"""main.py as a process of a sweep: it holds the lock file of its run until it ends.

python held.py LOCK [flags of main.py]
"""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

import sys
from functools import partial
from pathlib import Path

from filelock import Timeout

from startsparse.locks import locked

BUSY = 75  # exit code: another process holds the lock


def main(lock: str, argv: list[str]) -> None:
    """Run main.py with ``argv`` while ``lock`` is held; exit code `BUSY` if another holds it."""
    try:
        with locked(Path(lock), "run this sweep", 0):
            from startsparse.processes import run_script  # slow: the lock comes first
            from STR.main import main

            sys.argv = [str(Path(__file__).with_name("main.py")), *argv]
            run_script(partial(main, argv))
    except Timeout:
        sys.exit(BUSY)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
