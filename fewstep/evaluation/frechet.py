"""Frechet distance between two sets of features, from moments that can be streamed, merged and stored."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep import __version__

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and covariance (d, d) of features, as float64 sums about a fixed point near the mean.

    extractor: the id of what made the features; source: sha256 of what they describe; n: None where a foreign file does not say.
    """

    n: int | None
    shift: np.ndarray
    total: np.ndarray
    outer: np.ndarray
    extractor: str = UNKNOWN
    source: str = ""
    fixed_cov: np.ndarray | None = None

    @classmethod
    def of(cls, features: np.ndarray, *, extractor: str = UNKNOWN, source: str = "") -> Moments:
        """Moments of features (N, d). Raises ValueError if they are not finite."""
        x = _features(features)
        shift = x.mean(0)
        return cls(0, shift, np.zeros_like(shift), np.zeros((len(shift),) * 2), extractor, source).update(x)

    @classmethod
    def known(
        cls, mean: np.ndarray, cov: np.ndarray, n: int | None = None, *, extractor: str = UNKNOWN, source: str = ""
    ) -> Moments:
        """Moments given as mean (d,) and unbiased covariance (d, d)."""
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean),) * 2:
            raise ValueError(f"a mean of shape (d,) and a covariance (d, d) are needed, not {mean.shape} and {cov.shape}")
        outer = cov * ((n or 0) - 1)
        return cls(n, mean, np.zeros_like(mean), outer, extractor, source, fixed_cov=cov if n is None else None)

    def update(self, features: np.ndarray) -> Moments:
        """These moments with a further batch (N, d)."""
        x = _features(features) - self.shift
        if self.n is None:
            raise ValueError("these moments do not say how many samples they hold, so nothing can be added to them")
        return Moments(self.n + len(x), self.shift, self.total + x.sum(0), self.outer + x.T @ x, self.extractor, self.source)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together. Raises ValueError if another extractor made the other."""
        _same_extractor(self, other)
        if self.n is None or other.n is None:
            raise ValueError("moments that do not say how many samples they hold cannot be merged; compute them from the images")
        step = other.shift - self.shift
        across = np.outer(other.total, step)
        outer = self.outer + other.outer + across + across.T + other.n * np.outer(step, step)
        total = self.total + other.total + other.n * step
        both = sorted({self.source, other.source} - {""})
        source = hashlib.sha256("".join(both).encode()).hexdigest() if len(both) > 1 else "".join(both)
        return Moments(self.n + other.n, self.shift, total, outer, self.extractor, source)

    @property
    def mean(self) -> np.ndarray:
        return self.shift + self.total / self.n if self.n else self.shift

    @property
    def cov(self) -> np.ndarray:
        """Unbiased (d, d). Raises ValueError for fewer than two samples."""
        if self.fixed_cov is not None:
            return self.fixed_cov
        if self.n is None or self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.n}; draw more images")
        return (self.outer - np.outer(self.total, self.total) / self.n) / (self.n - 1)

    def save(self, path: str | Path) -> None:
        """Writes an .npz that other FID tools read (mu, sigma), plus n, extractor and source_sha256; whole or not at all."""
        path = Path(path)
        extra: dict[str, Any] = {} if self.n is None else {"n": np.int64(self.n)}
        part = path.with_name(path.name + f".{os.getpid()}.tmp")
        with part.open("wb") as file:
            np.savez(
                file,
                mu=self.mean,
                sigma=self.cov,
                extractor=np.str_(self.extractor),
                source_sha256=np.str_(self.source),
                fewstep_version=np.str_(__version__),
                **extra,
            )
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path, *, extractor: str | None = None) -> Moments:
        """Reads an .npz, ours or a foreign {mu, sigma}; nothing is unpickled.

        extractor: the id in use; ValueError if the file was made with another. A file that does not say gets 'unknown'
        and a warning.
        """
        if not Path(path).is_file():
            raise ValueError(f"there are no reference moments at {path}; correct the path, or name a folder of images instead")
        if Path(path).suffix != ".npz":
            raise ValueError(
                f"{path} is no .npz file; reference moments are an .npz with mu and sigma (a pickle is never opened)"
            )
        damaged = f"{path} is damaged; make it again with np.savez(..., mu=mean, sigma=covariance), or name the folder of images"
        if not zipfile.is_zipfile(path):
            raise ValueError(damaged)
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {key: file[key] for key in file.files if key in ("mu", "sigma", "n", "extractor", "source_sha256")}
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise ValueError(damaged) from error
        except ValueError as error:
            raise ValueError(
                f"{path} holds pickled objects, which are never opened; save mu and sigma as plain arrays"
            ) from error
        if "mu" not in data or "sigma" not in data:
            raise ValueError(f"{path} lacks mu or sigma; compute the moments from the reference images instead")
        made = str(data.get("extractor", UNKNOWN))
        if made == UNKNOWN:
            warnings.warn(f"{path} does not say which extractor made it; its distances may compare unlike features", stacklevel=2)
        elif extractor is not None and made != extractor:
            raise ValueError(
                f"{path} was made with {made}, not with {extractor}; name that extractor, or compute the moments anew"
            )
        n = int(data["n"]) if "n" in data else None
        return cls.known(data["mu"], data["sigma"], n, extractor=made, source=str(data.get("source_sha256", "")))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians with these moments (FID if the extractor is Inception). Warns if n <= d.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr sqrt(A^.5 B A^.5), by two symmetric eigenproblems in float64 (evaluation.md 1.4).
    Raises ValueError for unlike extractors or sizes, or moments that are not finite.
    """
    _same_extractor(a, b)
    d = len(a.shift)
    for m in (a, b):
        if m.n is not None and m.n <= d:
            warnings.warn(
                f"{m.n} samples span less than the {d} feature dimensions: the distance is far above its limit", stacklevel=2
            )
    # torch, not numpy: its solver obeys torch.set_num_threads, and an oversubscribed one is fifty times slower
    cov_a, cov_b = torch.from_numpy(a.cov), torch.from_numpy(b.cov)
    gap = a.mean - b.mean
    trace = float(cov_a.trace() + cov_b.trace())
    if not np.isfinite(trace + gap.sum()):
        raise ValueError("the moments hold NaN or infinity; look at the features before comparing them")
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ cov_b @ root
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = float(gap @ gap) + trace - 2 * float(overlap)
    if distance < -1e-6 * trace:
        raise ValueError(
            f"the Frechet distance came out as {distance:.3g}: a covariance is not positive semi-definite; compute it anew"
        )
    return max(distance, 0.0)


def _features(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"features must have the shape (N, d), not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("the features hold NaN or infinity; look at the images before judging them")
    return x


def _same_extractor(a: Moments, b: Moments) -> None:
    if UNKNOWN not in (a.extractor, b.extractor) and a.extractor != b.extractor:
        raise ValueError(f"moments of {a.extractor} and of {b.extractor} do not compare; extract both sets with one extractor")
    if a.shift.shape != b.shift.shape:
        raise ValueError(
            f"features of {len(a.shift)} and of {len(b.shift)} dimensions do not compare; use one extractor for both"
        )
