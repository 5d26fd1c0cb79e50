"""Rectified flow on the teacher's own pairs, and the one-step student that such pairs teach by regression."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.losses import mse
from fewstep.matched import off_straight
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, full, register
from fewstep.objectives.ranges import at_least
from fewstep.sampling import ddim, rollout
from fewstep.schedules import like
from fewstep.stream import Stream
from fewstep.times import UShaped


@register("reflow")
@final
@dataclass(frozen=True, kw_only=True)
class Reflow(Objective):
    """Between a noise and what the teacher draws from it the student goes straight: its velocity anywhere on that line is
    sample - noise, so that trajectories stop crossing and few steps suffice (Liu et al., arXiv 2209.03003, eq. 1 with k = 2).

    slope: of the U-shaped times; huber: c of sqrt(|d|^2 + c^2) - c with |d| the root mean square of a sample's error (both: Lee
    et al., Improving the Training of Rectified Flows, arXiv 2405.20320, section 4; |d| is a Euclidean norm there).
    Teacher pairs (data.pairs) are needed. Any schedule: the student is asked where the noise ratio is the line's, at most at its
    own noise end, which gets the pure noise that a sampler starts from, though a table leaves a trace of data there.
    Deviation: no perceptual term (LPIPS), since latents have none.
    """

    draws: ClassVar[bool] = False
    asks: ClassVar[int] = 0
    steps: int = 2
    sampler: str | None = None
    slope: float = 4.0
    huber: float = 0.03

    def __post_init__(self) -> None:
        UShaped(self.slope)
        at_least(0, huber=self.huber)

    @property
    def needs(self) -> Needs:
        return Needs(pairs=True)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # what is learned is a velocity

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Pseudo-Huber of velocity - (noise - sample), which on the straight path at u is (sample - x0) / u."""
        assert batch.noise is not None
        term, sample = straight_line(nets, batch, batch.noise, self.slope, self.huber, rng)
        return Losses({"reflow": term}, {}, sample)


@register("regression")
@final
@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """From a noise the student lands where its teacher landed: knowledge distillation (Luhman and Luhman, arXiv 2101.02388), and
    InstaFlow's last stage where the teacher is a reflowed student (`teacher: previous`, whose own the pairs then are; arXiv
    2309.06380, eq. 8).

    huber: c of sqrt(|d|^2 + c^2) - c with |d| the root mean square of a sample's error; 0 the norm itself. Teacher pairs
    (data.pairs) are needed. With several steps one of them is taught, behind the student's own deterministic ones.
    Deviation: the distance is not perceptual (LPIPS in InstaFlow), since latents have no such network.
    """

    asks: ClassVar[int] = 0
    steps: int = 1
    sampler: str | None = None
    huber: float = 0.03

    def __post_init__(self) -> None:
        at_least(0, huber=self.huber)

    @property
    def needs(self) -> Needs:
        return Needs(pairs=True)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # as `walked` goes

    @property
    def walks(self) -> bool:
        return True

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """d(x0 at a deployed time of the student's walk from the pair's noise, the pair's sample)."""
        assert batch.latents is not None
        prediction = nets.student(*walked(nets, batch, rng), batch.cond)
        return Losses({"regression": huber(prediction.x0, batch.latents, self.huber)}, {}, prediction.x0)


def straight_line(nets: Nets, batch: Batch, noise: Tensor, slope: float, c: float, rng: Stream) -> tuple[Tensor, Tensor]:
    """(pseudo-Huber (B,) of the velocity against noise - sample anywhere on the line from the batch's samples to `noise`, the
    student's x0). On the straight path at u the velocity is (x_t - x0) / u."""
    assert batch.latents is not None
    schedule, x0 = nets.student.schedule, batch.latents
    u = UShaped(slope).sample(len(x0), rng)
    t = off_straight(schedule, u).clamp(1e-3, 1.0)
    alpha, sigma = schedule.alpha_sigma(t)
    start = t >= 1
    x_t = torch.where(like(start, x0).bool(), schedule.prior(noise), schedule.add_noise(x0, noise, t))
    prediction = nets.student(x_t, t, batch.cond)
    steep = like(torch.where(start, 1.0, (alpha + sigma) / sigma), prediction.x0)
    return huber(steep * prediction.x0, steep * x0, c), prediction.x0


def walked(nets: Nets, batch: Batch, rng: Stream) -> tuple[Tensor, Tensor]:
    """(x, t) at a deployed time that all samples share, where the student's own deterministic steps from the pairs' noise lead;
    without a graph."""
    assert batch.noise is not None
    k, x = rng.shared.integer(len(nets.grid)), nets.student.schedule.prior(batch.noise)
    with torch.no_grad():
        for visit in islice(rollout(nets.student, x, nets.grid, batch.cond, step=ddim, rng=rng), k):
            x = visit.x_s
    return x, full(nets.grid[k], len(x))


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(mean d^2 + c^2) - c of each sample (B,)."""
    return (mse(a, b) + max(c * c, 1e-12)).sqrt() - c
