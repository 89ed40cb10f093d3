"""``python -m startsparse.tabular``."""

from startsparse.processes import run_script
from startsparse.tabular.program import main

if __name__ == "__main__":
    run_script(main)
