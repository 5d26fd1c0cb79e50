"""Consistency training from data alone, no teacher, between neighbours on iCT's grids, on any schedule; see `ect`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.ect import LEAST, from_data, level
from fewstep.objectives.ranges import at_least, positive
from fewstep.stream import Stream
from fewstep.times import LogNormal


@register("ict")
@final
@dataclass(frozen=True, kw_only=True)
class ICT(Objective):
    """Consistency training between neighbours on a grid of levels that doubles its fineness: improved consistency training, Song
    and Dhariwal 2023, arXiv 2310.14189.

    first, last: intervals at the start and at the end; rounds: of the whole curriculum, in equal stages. mean, std: of ln n.
    low, high, rho: of the grid (Karras et al. 2022, eq. 5); its top is the noisiest deployed time. huber: c over the square root
    of a sample's size (the paper: 0.00054). Images (latents) are needed; the teacher only lends its weights.
    Deviations: levels are sigma / alpha of any schedule; no dropout.
    """

    steps: int = 2
    sampler: str | None = None
    first: int = 10
    last: int = 1280
    rounds: int = 300
    mean: float = -1.1
    std: float = 2.0
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0
    huber: float = 0.00054

    def __post_init__(self) -> None:
        LogNormal(self.mean, self.std)
        at_least(1, first=self.first, last=self.last, rounds=self.rounds)
        at_least(0, huber=self.huber)
        positive(low=self.low, rho=self.rho)
        if not self.low < self.high or self.last < self.first:
            raise ValueError(
                f"levels rise from low to high and their number from first to last, not from {self.low} to {self.high} "
                f"and from {self.first} to {self.last}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(images=True, rounds=self.rounds)

    def intervals(self, step: int) -> int:
        """N(k) = min(first 2^floor(k / K'), last), K' = rounds / (log2(last / first) + 1)."""
        stage = max(1, math.floor(self.rounds / (math.log2(self.last / self.first) + 1)))
        return min(self.first * 2 ** (step // stage), self.last)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("renoise",)  # x0 is a sample at every time, and no point of a trajectory

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", partial(self.student_loss, intervals=self.intervals(step)))]

    def levels(self, intervals: int, high: float) -> tuple[Tensor, Tensor]:
        """(levels (intervals + 1,) rising to `high`; the chance (intervals,) of each pair of neighbours, log-normal)."""
        a, b = self.low ** (1 / self.rho), min(self.high, high) ** (1 / self.rho)
        n = torch.linspace(a, b, intervals + 1, dtype=torch.float64) ** self.rho
        mass = torch.erf((n.log() - self.mean) / (self.std * math.sqrt(2))).diff()
        return n, mass / mass.sum()

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream, intervals: int = 10) -> Losses:
        """d(f(x_n'), sg f(x_n)) / (n' - n), n < n' neighbours."""
        assert batch.latents is not None
        schedule = nets.student.schedule
        n, chance = self.levels(intervals, float(level(schedule, torch.tensor([nets.grid[0]]))))
        times = schedule.t_of_ratio(n)
        t = times.clamp(LEAST, nets.grid[0])
        t[-1] = nets.grid[0]
        told = level(schedule, t).clamp(max=n[-1])  # a table's first level may lie above the grid's
        i = torch.searchsorted(chance.cumsum(0), rng.uniform(len(batch.latents))).clamp(max=intervals - 1)
        huber = self.huber * math.sqrt(batch.latents[0].numel())
        return from_data(nets, batch, rng, t[i + 1], times[i], told[i + 1], n[i], huber)
