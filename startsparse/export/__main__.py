"""``python -m startsparse.export``."""

from startsparse.errors import run_script
from startsparse.export.command import main

if __name__ == "__main__":
    run_script(main)
