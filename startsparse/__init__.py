"""What the script packages STR, ER_DST and ER_SLT share: masks, ratios, data, training, runs."""

from startsparse.threads import wait_shortly

__version__ = "0.1.0"

wait_shortly()
