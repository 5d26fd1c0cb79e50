"""RCGM: the mean velocity of a jump from a small step of the teacher and a rollout of the student, without derivatives
(Recursive Consistent Generation Model, the base of TwinFlow, arXiv 2512.05150)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.losses import flat_mean, tamed
from fewstep.matched import Matched
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.meanflow import FLOW
from fewstep.objectives.ranges import part
from fewstep.schedules import like
from fewstep.stream import Stream


@register("rcgm")
@final
@dataclass(frozen=True, kw_only=True)
class RCGM(Objective):
    """A jump from t to r must end where a small teacher step and then the student's own jumps, r told each, end. Of a batch one
    third of the samples goes from the noise end to the clean end, one takes small jumps (r within t / 20 of t), one any.
    The student's network is fed r and needs full weights. Any schedule, by matching noise ratios to the straight path. Images
    (latents) are needed.

    order: into how many jumps the student's part is split. delta: of the teacher's step. average: decay of the averaged
    student that rolls out (None: the student itself).
    Deviations: the velocity is the guided teacher's, not eps - x0 with the student's own guidance (distillation); the average
    has no ramp; at each draw the kind of jump is chosen for each sample, so that a batch may have any size.
    """

    draws: ClassVar[bool] = False
    steps: int = 1
    sampler: str | None = "ddim"
    order: int = 2
    delta: float = 0.01
    average: float | None = 0.99

    def __post_init__(self) -> None:
        check_order(self.order, self.delta)
        part("the average's weights", average=self.average)

    @property
    def needs(self) -> Needs:
        return Needs(images=True, inputs=("end_time",), average=self.average)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # a student that is told the end of its jump goes there itself

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """The distance of F to sg(F - clip(...)), see `residual`, weighed by the length of the jump."""
        term, stats, sample = jumps(nets, batch, rng, self.order, self.delta)
        return Losses({"rcgm": term}, stats, sample)


def check_order(order: int, delta: float) -> None:
    """Raises ValueError for a rollout that is none."""
    if order < 1 or not 0 < delta < 1:
        raise ValueError(f"order is at least 1 and delta a part of the time range, in (0, 1); not {order} and {delta}")


def jumps(nets: Nets, batch: Batch, rng: Stream, order: int, delta: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss (B,), scalars to log, x0 of the jumps with their graph) at jumps of the three kinds."""
    assert batch.latents is not None
    x0, student = batch.latents, Matched(nets.student, FLOW)
    t, r = drawn(len(x0), rng, student)
    x_t = FLOW.add_noise(x0, rng.normal_like(x0), t)
    error, told = residual(nets, batch, x_t, t, r, order, delta)
    prediction = student(x_t, t, batch.cond, r=told)
    weight = ((1 - (t - r)) * math.pi / 2.5).tan() + 1  # 4.1 where r = t, 1 for the whole trajectory
    term = like(weight, error.flatten(1)[:, 0]) * length(prediction.velocity, error.clamp(-1, 1))
    return term, {"residual": flat_mean(error.square()).sqrt().mean()}, prediction.x0


def length(x: Tensor, direction: Tensor) -> Tensor:
    """(B,), with the gradient of about the root mean square of a distance that grows along the direction (TwinFlow's code)."""
    return tamed(x, direction, 1e-6, 0.5)


def drawn(n: int, rng: Stream, student: Matched) -> tuple[Tensor, Tensor]:
    """(t, r) of the straight path (n,), r <= t, of the three kinds alike."""
    kind, share = rng.integers(3, n), rng.uniform(n)
    t = student.lowest + (student.highest - student.lowest) * rng.uniform(n)
    t = torch.where(kind == 0, student.highest, t)
    return t, torch.where(kind == 0, 0.0, t - t * share * torch.where(kind == 1, 0.05, 1.0))


@torch.no_grad()
def residual(nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, r: Tensor, order: int, delta: float) -> tuple[Tensor, Tensor]:
    """([(t - r) F - S] / delta - v at x_t on the straight path, the r that F was told); no graph.

    S is how far `order` equal jumps of the (averaged) student go from one teacher step of `delta` behind x_t down to r. At the
    exact mean velocity it is the curvature within delta, O(delta). A jump shorter than delta is an empty one: F(x, t, t) - v."""
    student, rolling = Matched(nets.student, FLOW), Matched(nets.average or nets.student, FLOW)
    v = Matched(nets.teacher, FLOW)(x_t, t, batch.cond).velocity
    r = torch.where(t - r < delta, t, r)
    x, at = x_t - like(torch.minimum(t - r, torch.full_like(t, delta)), x_t) * v, torch.maximum(t - delta, r)
    part, gone = (at - r) / order, torch.zeros_like(x_t)
    for _ in range(order):
        asked = at.clamp(min=student.lowest)  # lower, no network was trained
        jump = like(part, x) * rolling(x, asked, batch.cond, r=torch.minimum(at - part, asked).clamp(min=0)).velocity
        x, at, gone = x - jump, at - part, gone + jump
    field = student(x_t, t, batch.cond, r=r).velocity
    far = (like(t - r, x_t) * field - gone) / delta
    return torch.where(like(r < t, x_t).bool(), far, field) - v, r
