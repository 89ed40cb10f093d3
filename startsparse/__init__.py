"""What the script packages STR, ER_DST and ER_SLT share: masks, ratios, data, training, runs."""

from startsparse.threads import sleep_while_waiting

__version__ = "0.1.0"

sleep_while_waiting()
