"""``python -m startsparse.tabular``."""

from startsparse.errors import run_script
from startsparse.tabular.experiment import main

if __name__ == "__main__":
    run_script(main)
