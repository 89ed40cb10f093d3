"""Layer-wise ratios: layer shapes and a target density give a density per layer.

With n_l weights in layer l and N in all, the target p asks for sum(p_l n_l) = p N. Research code
scales a profile to that sum and then clips it at 1, which silently loses edges: for a target of
0.5, a balanced ResNet18 has 0.27. Here saturated layers are fixed at 1 and the others are solved
again, so the sum is met exactly. ``budget="clip"`` gives the clipped densities of old runs.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Shape = Sequence[int]  # (outputs, inputs, *kernel)


def uniform(shapes: Sequence[Shape]) -> np.ndarray:
    """The same density in every layer."""
    return np.ones(len(shapes))


def erk(shapes: Sequence[Shape]) -> np.ndarray:
    """Erdos-Renyi-Kernel: p_l ~ sum(shape) / prod(shape) (RigL, Evci et al. 2020, sec. 3)."""
    return np.array([sum(shape) / math.prod(shape) for shape in shapes])


def er(shapes: Sequence[Shape]) -> np.ndarray:
    """Erdos-Renyi as in SET: p_l ~ (n_in + n_out) / (n_in n_out) (Mocanu et al. 2018, eq. 1)."""
    return np.array([(shape[0] + shape[1]) / (shape[0] * shape[1]) for shape in shapes])


def balanced(shapes: Sequence[Shape]) -> np.ndarray:
    """The same number of weights in every layer: p_l ~ 1 / n_l (Gadhikar et al. 2023)."""
    return np.array([1 / math.prod(shape) for shape in shapes])


PROFILES: dict[str, Callable[[Sequence[Shape]], np.ndarray]] = {
    "uniform": uniform,
    "ERK": erk,
    "ER": er,
    "balanced": balanced,
}
# `pyramidal` has its own solver, and `network` takes its profile from a saved network.
METHODS = (*PROFILES, "pyramidal", "network")
# Names of the same ratios in the three original scripts.
ALIASES = {
    "ER_same_params": "balanced",
    "ER_same_params_per_layer": "balanced",
    "pyramid": "pyramidal",
    "pyramid_sparsity": "pyramidal",
    "str-induced-er": "network",
}
BUDGETS = ("exact", "clip")


def layer_densities(
    method: str,
    shapes: Sequence[Shape],
    density: float,
    *,
    budget: str = "exact",
    dense: Sequence[int] = (),
    profile: Sequence[float] | None = None,
) -> np.ndarray:
    """The density p_l in [0, 1] of each layer, in the order of ``shapes``.

    Args:
        method: one of `METHODS`.
        shapes: weight shapes (outputs, inputs, *kernel) in forward order.
        density: target p in (0, 1] over all weights of ``shapes``.
        budget: ``exact`` solves again after a layer saturates, so that sum(p_l n_l) = p N;
            ``clip`` only cuts at 1, as the paper's research code does.
        dense: positions of layers kept at density 1; they count towards p.
        profile: for ``network``: density of each layer of that network.

    Raises:
        ValueError: a density outside (0, 1], or one that no p_l <= 1 can meet.
    """
    if not 0 < density <= 1:
        raise ValueError(f"a density must be in (0, 1], not {density:g}")
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=float)
    free = np.ones(len(shapes), dtype=bool)
    free[list(dense)] = False
    nnz = density * sizes.sum() - sizes[~free].sum()
    if nnz <= 0 and free.any():
        least = sizes[~free].sum() / sizes.sum()
        raise ValueError(f"density {density:g} is below {least:.4g}, the dense layers' share alone")
    result = np.ones(len(shapes))
    if method == "pyramidal":
        result[free] = _geometric(sizes[free], nnz)
    else:
        full = np.asarray(profile, float) if method == "network" else PROFILES[method](shapes)
        solve = _solve if budget == "exact" else _clip
        result[free] = solve(full[free], sizes[free], nnz)
    return result


def _clip(profile: np.ndarray, sizes: np.ndarray, nnz: float) -> np.ndarray:
    profile = np.ldexp(profile, -np.frexp(profile.max())[1])  # as in `_solve`
    return np.minimum(1, nnz / (profile @ sizes) * profile)


def _solve(profile: np.ndarray, sizes: np.ndarray, nnz: float) -> np.ndarray:
    """min(1, c profile) with c such that it sums to ``nnz``: saturate, solve the rest, repeat."""
    reachable = sizes[profile > 0].sum()
    if reachable < nnz * (1 - 1e-9):
        most = reachable / sizes.sum()
        raise ValueError(f"the layers that are not empty hold a share of {most:.4g} of the weights")
    full = np.zeros(len(sizes), dtype=bool)
    while True:
        # A power of two changes no digit, and keeps tiny profiles from overflowing the scale.
        rest = np.ldexp(profile * ~full, -np.frexp((profile * ~full).max())[1])
        scale = (nnz - sizes[full].sum()) / (rest * sizes).sum() if rest.any() else 0.0
        over = ~full & (scale * rest > 1)
        if not over.any():
            return np.where(full, 1.0, scale * rest)
        full |= over


def _geometric(sizes: np.ndarray, nnz: float) -> np.ndarray:
    """r^l for l = 1..L with sum(n_l r^l) = nnz. The sum grows with r: bisect."""
    depth = np.arange(1, len(sizes) + 1)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if sizes @ middle**depth < nnz else (low, middle)
    return high**depth


def file_of(path: Path) -> Path:
    """The file of layer densities that a path means.

    In a run folder it is ratios.json, a ratio found by a pruner, or without one layers.json, the
    densities of its network. Any other path is the file itself.
    """
    if not path.is_dir():
        return path
    ratio = path / "ratios.json"
    return ratio if ratio.exists() else path / "layers.json"
