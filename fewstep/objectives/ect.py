"""Consistency training from data alone, no teacher, at ECT's continuous pairs of times, on any schedule.

It is written in sigma / alpha, the level n of x_t / alpha = x0 + n eps, which every schedule has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from fewstep.losses import sample_huber
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.ranges import at_least, positive, share
from fewstep.schedules import NoiseSchedule, like
from fewstep.stream import Stream
from fewstep.times import LogNormal

LEAST = 0.001  # the least time that a network is asked at, the first level of a DDPM table; below it all is clean


@register("ect")
@final
@dataclass(frozen=True, kw_only=True)
class ECT(Objective):
    """x0 predicted at level n must be x0 predicted at a lower level m of the same noise, with m growing towards n: Easy
    Consistency Tuning, Geng et al. 2024, arXiv 2406.14548. At first m = 0 up to n = 1.9, which is to learn as a diffusion model.

    mean, std: of ln n (the paper's -1.1, 2). q, stage_rounds: after j stages of that many rounds, eight in the authors' runs,
    m / n = 1 - q^-(j + 1) (1 + 8 sigmoid(-n)), neither below 0 nor above `closest`. huber: c of the distance of whole samples.
    top: share of samples that lie at the noisiest deployed time, where the student starts; highest: the level that stands for
    infinite noise in n. Images (latents) are needed; the teacher only lends its weights.
    Deviations: `top` (log-normal levels hardly visit the end of a flow, whose level is infinite); no dropout.
    """

    steps: int = 2
    sampler: str | None = None
    mean: float = -1.1
    std: float = 2.0
    q: float = 2.0
    stage_rounds: int = 75
    closest: float = 0.999
    huber: float = 0.0
    top: float = 0.1
    highest: float = 80.0

    def __post_init__(self) -> None:
        LogNormal(self.mean, self.std)
        at_least(1, stage_rounds=self.stage_rounds)
        at_least(0, huber=self.huber)
        positive(highest=self.highest)
        share(top=self.top)
        if not self.q > 1 or not 0 <= self.closest < 1:
            raise ValueError(f"pairs come closer up to a ratio below 1: q > 1, 0 <= closest < 1, not {self.q} and {self.closest}")

    @property
    def needs(self) -> Needs:
        return Needs(images=True, rounds=self.stage_rounds + 1)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("renoise",)  # x0 is a sample at every time, and no point of a trajectory

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", partial(self.student_loss, stage=step // self.stage_rounds))]

    def lower(self, n: Tensor, stage: int) -> Tensor:
        """The level m below n (B,) in a stage."""
        ratio = 1 - self.q ** -(stage + 1.0) * (1 + 8 * torch.sigmoid(-n))
        return n * ratio.clamp(0, self.closest)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream, stage: int = 0) -> Losses:
        """(sqrt(|f(x_n) - sg f(x_m)|^2 + c^2) - c) / (n - m), f(x_0) = x0."""
        assert batch.latents is not None
        schedule, count = nets.student.schedule, len(batch.latents)
        n = (self.mean + self.std * rng.gaussian(count)).exp()
        t = schedule.t_of_ratio(n).clamp(LEAST, nets.grid[0])
        t = torch.where(rng.uniform(count) < self.top, nets.grid[0], t)
        n = level(schedule, t).clamp(max=self.highest)
        m = self.lower(n, stage)
        return from_data(nets, batch, rng, t, schedule.t_of_ratio(m), n, m, self.huber)


def level(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma / alpha at t."""
    alpha, sigma = schedule.alpha_sigma(t)
    return sigma / alpha


def from_data(nets: Nets, batch: Batch, rng: Stream, t: Tensor, s: Tensor, n: Tensor, m: Tensor, huber: float) -> Losses:
    """The student's x0 at t against its x0, without a graph, at s < t of the same noise (the data itself below `LEAST`), over the
    gap of their levels n and m (that of the data is 0)."""
    assert batch.latents is not None
    schedule, x0 = nets.student.schedule, batch.latents
    eps, clean = rng.normal_like(x0), s < LEAST
    with torch.no_grad():  # where s is clean the network is asked at t instead, and not listened to
        asked = torch.where(clean, t, s)
        target = nets.student(schedule.add_noise(x0, eps, asked), asked, batch.cond).x0
        target = torch.where(like(clean, x0).bool(), x0.to(target.dtype), target)
    prediction = nets.student(schedule.add_noise(x0, eps, t), t, batch.cond)
    loss = sample_huber(prediction.x0, target, huber)
    gap = n - torch.where(clean, 0.0, m)
    return Losses({"consistency": loss / gap.to(loss)}, {}, prediction.x0)
