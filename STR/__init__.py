"""STR: random ER networks, trained as they are, pruned on, or with soft thresholds."""
