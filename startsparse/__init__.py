"""What the script packages STR, ER_DST and ER_SLT share: masks, ratios, data, training, runs."""

import os
import sys
from pathlib import Path

from startsparse.threads import wait_shortly

from startsparse import stopping

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and any(w.startswith("startsparse.") for w in sys.orig_argv):
    stopping.watch()  # Python is about to find startsparse.export, say, to run it
wait_shortly()


def checkout() -> Path | None:
    """The root of the checkout that this package lies in; None if it was installed without one."""
    root = Path(__file__).parents[1]
    return root if (root / "pyproject.toml").exists() else None


def cache_folder() -> Path | None:
    """Where what can be made again is kept: $STARTSPARSE_CACHE, or startsparse in the user's.

    None: the user has no home. The folder may not exist, and writing there may fail.
    """
    own = os.environ.get("STARTSPARSE_CACHE")
    try:
        if own:
            return Path(own).expanduser().absolute()
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return home.absolute() / "startsparse"
    except RuntimeError:  # an account without a home
        return None
