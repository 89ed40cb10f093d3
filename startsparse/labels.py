"""The field's words for columns of tables, and values as people read them."""

import math
import re

import numpy as np

from startsparse.fields import normal
from startsparse.results import OTHER_NAMES

DENSITY = "density (kept / all weights)"
LABELS = {
    "density": DENSITY,
    "requested": "density asked for (kept / all weights)",
    "er_sparse_init": "density of the random mask (kept / all weights)",
    "final_density": "final density (kept / all weights)",
    "sparsity": "density of the ticket (kept / all weights)",
    "sparsity_start": "density that annealing starts from",
    "test_accuracy": "test accuracy (%)",
    "valid_accuracy": "validation accuracy (%)",
    "train_accuracy": "training accuracy (%)",
    "test_loss": "test loss (cross-entropy)",
    "inference_flops_share": "FLOPs of inference (share of dense)",
    "training_flops_share": "FLOPs of training (share of dense)",
    "er_sparse_method": "layer-wise ratio",
    "st_decay": "weight decay of s",
    "lr": "learning rate",
    "arch": "network",
    "set": "data set",
    "name": "setting",
}
CONTROLS = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
DENSITIES = {"density", "requested", "er_sparse_init", "final_density", "sparsity"}


def label(name: str) -> str:
    """A column in the field's words; accuracies are in percent."""
    field = OTHER_NAMES.get(normal(name), name)
    return LABELS.get(field, name.replace("_", " ") + " (%)" * ("accuracy" in name))


def is_density(name: str) -> bool:
    """Whether a column holds densities."""
    return OTHER_NAMES.get(normal(name), name) in DENSITIES


def shown(value: object) -> str:
    """A value of an option, numbers with four significant digits; always one line."""
    if isinstance(value, float | np.floating):
        x = float(value)
        if math.isnan(x):
            return ""
        return f"{x:.0f}" if abs(x) < 10**15 and x == round(x) else f"{x:.4g}"
    return re.sub(CONTROLS, lambda found: ascii(found[0])[1:-1], str(value))


def words(name: str) -> str:
    """`label` without units."""
    return label(name).partition(" (")[0]
