"""`main.py` by the name that the published command uses."""

from ER_SLT.main import main
from startsparse.processes import run_script

if __name__ == "__main__":
    run_script(main)
