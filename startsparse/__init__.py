"""What the script packages STR, ER_DST and ER_SLT share: masks, ratios, data, training, runs."""

from pathlib import Path

from startsparse.threads import wait_shortly

__version__ = "0.1.0"

wait_shortly()


def checkout() -> Path | None:
    """The root of the checkout that this package lies in; None if it was installed without one."""
    root = Path(__file__).parents[1]
    return root if (root / "pyproject.toml").exists() else None
