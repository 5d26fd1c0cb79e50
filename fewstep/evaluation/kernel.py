"""Kernel inception distance: the unbiased squared MMD under a cubic kernel. Meaningful at any sample count."""

from __future__ import annotations

import numpy as np


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD of x (n, d) and y (m, d) under (x.y / d + 1)^3; may be negative. Binkowski et al. 2018, eq. 4."""
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kid(x: np.ndarray, y: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard error of `mmd` over seeded random subsets of x (n, d) and y (m, d).

    Subsets hold `size` samples, at most a quarter of the smaller set: overlapping subsets vary too little to show an error.
    The error is the delete-d jackknife's plus that of drawing finitely many subsets. Raises ValueError for fewer than 8 samples.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    fewest = min(len(x), len(y))
    if fewest < 8 or x.shape[1] != y.shape[1] or subsets < 2:
        raise ValueError(f"KID needs 8 samples a side of equal width and 2 subsets, not {x.shape}, {y.shape} and {subsets}")
    size = min(size, fewest // 4)
    rng = np.random.default_rng(seed)
    pick = lambda a: a[rng.choice(len(a), size, replace=False)]  # noqa: E731
    values = np.array([mmd(pick(x), pick(y)) for _ in range(subsets)])
    spread = values.std(ddof=1)
    return float(values.mean()), float(spread * np.sqrt(1 / subsets + 1 / (fewest / size - 1)))
