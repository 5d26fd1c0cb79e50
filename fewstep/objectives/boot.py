"""BOOT: data-free distillation by bootstrapping (Gu et al. 2023, arXiv 2306.05544)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.losses import mse
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, full, register
from fewstep.objectives.ranges import at_least
from fewstep.schedules import NoiseSchedule, like
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("boot")
@final
@dataclass(frozen=True, kw_only=True)
class Boot(Objective):
    """From pure noise e the student tells y_t = (x_t - sigma_t e) / alpha_t, the signal at t of the teacher's trajectory that
    starts at e; y_s is learned from y_t and the teacher at x_t = alpha_t y_t + sigma_t e, y_1 from the teacher's first guess.
    Prompts only: no data, no trajectories.

    delta: t - s (a 25th to a 50th of the range in the paper). boundary: weight of the first guess's loss. steps: 1 alone, for
    between its ends such a student tells signals, not pictures. Deviations: for the signal at t the student is fed the
    number of the time 1 - t / 2, so that the picture y_0 is told at the noise end, where one deployed step of a stock pipeline
    asks (the paper feeds t itself); the step is weighted by 1 / (1 - e^(l_s - l_t))^2, so that its
    size does not matter; the solver is of first order (the default of the paper).
    """

    draws: ClassVar[bool] = False
    steps: int = 1
    sampler: str | None = None
    delta: float = 0.04
    boundary: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is a part of the time range and lies between 0 and 1, not {self.delta}")
        at_least(0, boundary=self.boundary)

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def samplers(self) -> tuple[str, ...]:
        return ()

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """||(y(e, s) - sg y(e, t)) / (1 - k) - sg(x0_T - y(e, t))||^2 with k = e^(l_s - l_t), the exact step of the signal's ODE
        dy/dl = y - x0_T at a frozen x0_T, and boundary x ||y(e, 1) - x0_T(e, 1)||^2 (the paper's eq. 9 and 10)."""
        e, n = rng.normal(batch.shape), batch.shape[0]
        t = Uniform(self.delta, 1.0).sample(n, rng)
        s = t - self.delta
        with torch.no_grad():
            y_t = told(nets, e, t, batch.cond)
            x0 = nets.teacher(nets.student.schedule.add_noise(y_t, e, t), t, batch.cond).x0
            first = nets.teacher(nets.student.schedule.prior(e), full(1.0, n), batch.cond).x0
        y_s = told(nets, e, s, batch.cond)
        gain = like(1 - decay(nets.student.schedule, t, s), y_s)
        start = self.boundary * mse(told(nets, e, full(1.0, n), batch.cond), first)
        return Losses({"bootstrap": mse((y_s - y_t) / gain, x0 - y_t), "boundary": start}, {}, y_s)


def told(nets: Nets, e: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The student's y_t from pure noise e."""
    return nets.student(nets.student.schedule.prior(e), 1 - t / 2, cond).x0


def decay(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """(sigma_s / alpha_s) / (sigma_t / alpha_t): how much of y_t is left in y_s, s < t."""
    (a, sigma), (a_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    return sigma_s * a / (a_s * sigma)
