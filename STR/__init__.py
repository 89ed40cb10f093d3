"""STR: random ER networks, trained as they are, pruned iteratively, or with soft thresholds."""
