"""Where training looks: distributions of t."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.schedules import NoiseSchedule
from fewstep.stream import Stream


@dataclass(frozen=True)
class Uniform:
    """u uniform in [0, 1], moved towards noise by `shift`, k u / (1 + (k - 1) u), then stretched onto [low, high]."""

    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"a time range needs 0 <= low < high <= 1, not [{self.low}, {self.high}]")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, not {self.shift}; 1 leaves times where they are")

    def sample(self, n: int, rng: Stream) -> Tensor:
        """n times (n,), float64."""
        t = rng.uniform(n)
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return self.low + (self.high - self.low) * t


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) normal, on any schedule (Karras et al. 2022, table 1; for data of unit variance)."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"the spread of ln(sigma / alpha) must be positive, not {self.std}")

    def sample(self, n: int, rng: Stream, schedule: NoiseSchedule) -> Tensor:
        """n times (n,) of the schedule, float64; ratios beyond its ends are its ends."""
        return schedule.t_of_ratio((self.mean + self.std * rng.gaussian(n)).exp())


@dataclass(frozen=True)
class UShaped:
    """Density proportional to e^(slope u) + e^(slope (1 - u)) on [0, 1]: most at both ends, where reflow is hard (Lee et al.,
    arXiv 2405.20320, section 4.1; slope 4 there)."""

    slope: float = 4.0

    def __post_init__(self) -> None:
        if self.slope <= 0:
            raise ValueError(f"the slope of U-shaped times must be positive, not {self.slope}")

    def sample(self, n: int, rng: Stream) -> Tensor:
        """n times (n,), float64."""
        u = (rng.uniform(n) * math.expm1(self.slope)).log1p() / self.slope
        return torch.where(rng.uniform(n) < 0.5, u, 1 - u)
