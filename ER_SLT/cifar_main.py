"""`main.py` under the name in the published command; the default set is CIFAR10."""

from startsparse import stopping  # before torch

if __name__ == "__main__":
    stopping.watch()

from functools import partial

from ER_SLT import main as script
from ER_SLT.options import CIFAROptions
from startsparse.processes import run_script

CONFIGS, OPTIONS = script.CONFIGS, CIFAROptions  # for sweeps, too
main = partial(script.main, kind=CIFAROptions)

if __name__ == "__main__":
    run_script(main)
