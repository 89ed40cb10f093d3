"""The largest of many scores, found slowly."""

import torch


def by_hand(magnitudes, allowed, keep):
    """`selection.top_masks` by a stable sort in Python."""
    entries = []
    for part, (m, a) in enumerate(zip(magnitudes, allowed)):
        inside = torch.ones(m.numel()) if a is None else a.flatten()
        rows = zip(m.flatten().tolist(), inside.tolist())
        entries += [(-v, part, i) for i, (v, ok) in enumerate(rows) if ok]
    masks = [torch.zeros(m.numel()) for m in magnitudes]
    for _, part, i in sorted(entries)[:keep]:
        masks[part][i] = 1
    return [mask.view(m.shape) for mask, m in zip(masks, magnitudes)]
