"""`main.py` by the name that the published command uses; the set is CIFAR10 if none is named."""

from functools import partial

from ER_SLT.main import main
from ER_SLT.options import CIFAROptions
from startsparse.processes import run_script

if __name__ == "__main__":
    run_script(partial(main, kind=CIFAROptions))
