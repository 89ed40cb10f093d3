"""What the script packages STR, ER_DST and ER_SLT share: masks, ratios, data, training, runs."""

__version__ = "0.1.0"
