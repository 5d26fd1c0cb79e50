"""MeanFlow: the average velocity of a jump, learned from its own derivative (Geng et al. 2025, arXiv 2505.13447)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from fewstep.losses import flat_mean, tamed
from fewstep.matched import Matched
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.ranges import part, positive
from fewstep.schedules import RectifiedFlow, like
from fewstep.stream import Stream
from fewstep.tangents import DERIVATIVES, Derivative
from fewstep.times import LogNormal

FLOW = RectifiedFlow()


@register("meanflow")
@final
@dataclass(frozen=True, kw_only=True)
class MeanFlow(Objective):
    """The student's velocity u(x_t, t, r) is the mean of the teacher's between t and r, so that x_t - (t - r) u is the teacher's
    point at r: u = v - (t - r) du/dt along the teacher's (guided) velocity v (equation 6). The student's network is fed r and
    needs full weights. Any schedule, by matching noise ratios to the straight path. Images (latents) are needed.

    mean, std: of ln(sigma / alpha), from which two times are drawn and sorted. instant: share of samples with r = t, where the
    student must have the teacher's own velocity. floor, power: c and p of the weight 1 / (|error|^2 + c)^p, where |error|^2 is a
    mean over the sample (a sum in the paper, whose p is 1). derivative: jvp, or difference (kernels without forward
    differentiation). Deviations: v is the guided teacher's velocity, not eps - x0 (distillation, as FastGen's `use_cd`), so a
    student that starts as its teacher needs fewer samples at r = t than the paper's three of four, and wider times (paper:
    -0.4, 1.0), nearer to the deployed ends. These are still all but never drawn (r = 0 of flow models once in 50,000 times); to
    draw the whole jump on purpose, a quarter of the samples, lost the student: its target is its own derivative times that jump.
    The network is fed r, not t - r; one that predicts no velocity is pushed as hard at every level (`Matched.lever`), or one that
    predicts epsilon would be lost at its noise end.
    """

    draws: ClassVar[bool] = False
    steps: int = 1
    sampler: str | None = "ddim"
    mean: float = 0.0
    std: float = 1.6
    instant: float = 0.25
    floor: float = 1e-3
    power: float = 0.5
    derivative: Literal["jvp", "difference"] = "jvp"

    def __post_init__(self) -> None:
        LogNormal(self.mean, self.std)
        positive(floor=self.floor)
        part("samples", instant=self.instant)

    @property
    def needs(self) -> Needs:
        return Needs(images=True, inputs=("end_time",))

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # a student that is told the end of its jump goes there itself

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """|u - sg(v - (t - r) du/dt)|^2, weighed by its own inverse (equations 9, 10 and 22) and that of `Matched.lever`."""
        assert batch.latents is not None
        x0, student = batch.latents, Matched(nets.student, FLOW)
        t, r = self.times(len(x0), rng, student)
        x_t = FLOW.add_noise(x0, rng.normal_like(x0), t)
        error, stats = residual(nets, batch, x_t, t, r, DERIVATIVES[self.derivative])
        prediction = student(x_t, t, batch.cond, r=r)
        loss = tamed(prediction.velocity, error, self.floor, self.power) / student.lever("flow", t).to(error)
        return Losses({"meanflow": loss}, stats, prediction.x0)

    def times(self, n: int, rng: Stream, student: Matched) -> tuple[Tensor, Tensor]:
        """(t, r) of the straight path (n,), r <= t."""
        law = LogNormal(self.mean, self.std)
        a, b = (law.sample(n, rng, FLOW).clamp(student.lowest, student.highest) for _ in range(2))
        t = torch.maximum(a, b)
        # Below the lowest level lies the clean end, where deployed trajectories arrive.
        low = torch.minimum(a, b)
        low = torch.where(low <= student.lowest, 0.0, low)
        return t, torch.where(rng.uniform(n) < self.instant, t, low)


def residual(
    nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, r: Tensor, derivative: Derivative
) -> tuple[Tensor, dict[str, Tensor]]:
    """u - v + (t - r) du/dt at x_t on the straight path, zero at the mean velocity of the guided teacher's flow; no graph.

    The derivative is taken along (t - r) (v, 1), which vanishes where r = t and never looks below r."""
    student, teacher = Matched(nets.student, FLOW), Matched(nets.teacher, FLOW)

    def field(x: Tensor, at: Tensor) -> Tensor:
        return student(x, at, batch.cond, r=r).velocity

    with torch.no_grad():
        velocity = teacher(x_t, t, batch.cond).velocity
        u, slope = derivative(field, x_t, t, like(t - r, x_t) * velocity, t - r)
        error = u - velocity + slope
    return error, {"residual": flat_mean(error.square()).sqrt().mean(), "slope": flat_mean(slope.square()).sqrt().mean()}
