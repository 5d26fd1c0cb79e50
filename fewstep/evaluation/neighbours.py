"""Precision, recall, density and coverage from nearest neighbours in feature space."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK = 2000


def _squared(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of rows of x to all of y, (<=2000, len(y)) at a time; float64, exact for small integers."""
    norms = (y * y).sum(1)
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK]
        yield slice(start, start + len(part)), np.maximum((part * part).sum(1)[:, None] + norms - 2 * (part @ y.T), 0)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance (N,) of each row to its k-th neighbour, itself not counted."""
    found = np.empty(len(x))
    for rows, square in _squared(x, x):
        square[np.arange(len(square)), np.arange(rows.start, rows.stop)] = -1
        found[rows] = np.partition(square, k, axis=1)[:, k]
    return found


def prdc(real: np.ndarray, fake: np.ndarray, *, k: int = 5) -> dict[str, float]:
    """precision, recall, density, coverage of fake (N, d) against real (N, d); density may exceed 1. Naeem et al. 2020, eq. 3-8.

    Repeated rows count once (they would have neighbours at distance zero, and recall would vanish): report duplicates beside it.
    Recall is 0 if at most k distinct fakes remain. Raises ValueError for unequal N, or at most k distinct real rows.
    """
    if real.shape != fake.shape or real.ndim != 2:
        raise ValueError(
            f"equal numbers of real and generated features are compared, not {real.shape} and {fake.shape}; cut both to one N"
        )
    real, fake = (np.unique(np.asarray(x, np.float64), axis=0) for x in (real, fake))
    if len(real) <= k:
        raise ValueError(f"the reference has {len(real)} distinct features; more than k = {k} are needed")
    real_radii = _radii(real, k)
    fake_radii = _radii(fake, k) if len(fake) > k else np.zeros(len(fake))
    hits, nearest, reached = np.zeros(len(fake)), np.empty(len(real)), np.empty(len(real), bool)
    for rows, square in _squared(real, fake):
        hits += (square < real_radii[rows, None]).sum(0)
        nearest[rows] = square.min(1)
        reached[rows] = (square < fake_radii).any(1)
    return {
        "precision": float((hits > 0).mean()),
        "recall": float(reached.mean()),
        "density": float(hits.mean() / k),
        "coverage": float((nearest < real_radii).mean()),
    }
