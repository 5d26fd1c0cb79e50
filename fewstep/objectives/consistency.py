"""Trajectory-segmented consistency: LCM with one segment, PCM and TSCD edges with several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, Prediction
from fewstep.losses import mse, pseudo_huber
from fewstep.objectives.base import Batch, Landing, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.grids import check_grid, first_of_segment, scales, solver_times
from fewstep.objectives.ranges import check_scales, part, positive
from fewstep.objectives.solvers import Solver, first_order
from fewstep.sampling import ddim
from fewstep.schedules import like
from fewstep.stream import Stream


@register("consistency")
@final
@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """On a segment [edge, next edge] of the teacher's trajectory, every point is mapped to the segment's lower edge: the
    student's jump from x_t must end where its own jump from the teacher's next point x_s ends.

    steps: of the deployed student. segments: how many, 1 (LCM, arXiv 2310.04378) or `steps` (None; PCM, arXiv 2405.18407), which
    then meet at the deployed times; jumps past some of these, to the edges of fewer segments, are known to no sampler (`tcd`'s
    are). solver_steps: teacher steps from noise to clean (a multiple of `steps`). huber: c of the pseudo-Huber distance (None:
    mean squared error). guidance: range of the scales g = 1 + w that LCM with full weights draws and feeds to the student's
    network (None: the teacher's one scale, nothing fed).
    average: decay of the averaged student that targets come from (LCM with full weights: 0.95; None: the student itself, the
    papers' choice for LoRA). Images (latents) are needed: x_t is made from them.
    Deviations: the boundary is held by the jump itself, which is the identity at the edge, not by c_skip (whose part at the first
    grid point is 7e-6); w is embedded through a layer that starts at zero, not at random.
    """

    lands: ClassVar[bool] = True
    steps: int = 4
    sampler: str | None = None
    segments: int | None = None
    solver_steps: int = 40
    huber: float | None = 0.001
    guidance: tuple[float, float] | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        check_grid(self.steps, self.steps if self.segments is None else self.segments, self.solver_steps)
        if self.segments not in (None, 1, self.steps):
            raise ValueError(
                f"segments: no sampler draws in {self.steps} steps with jumps to the edges of {self.segments} segments; "
                f"set steps to {self.segments}, or objective: {{name: tcd, segments: {self.segments}}}, whose jumps end anywhere"
            )
        check_scales(self.guidance)
        positive(huber=self.huber)
        part("the average's weights", average=self.average)

    @property
    def needs(self) -> Needs:
        told = ("guidance_scale",) if self.guidance else ()
        return Needs(images=True, inputs=told, scales=self.guidance, average=self.average)

    @property
    def samplers(self) -> tuple[str, ...]:
        """Of one segment x0 is a sample at every time, and no point of a trajectory; of several only the edges are reached."""
        return ("renoise",) if (self.segments or self.steps) == 1 else ("ddim",)

    @property
    def draws(self) -> bool:
        return (self.segments or self.steps) == 1

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss, sample=self.sample)]

    def times(self, grid: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(times (N + 1,) rising from 0, lower edge (N + 1,) of the segment that *ends* at each): a time on an edge belongs to
        the segment below it, otherwise the jump from it would be empty (Hyper-SD's ties)."""
        times = solver_times(grid, self.solver_steps)
        return times, times[first_of_segment(self.solver_steps, self.segments or self.steps)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """d(jump(x_t, t -> edge), sg jump(x_s, s -> edge)) with x_s one guided teacher step below (PCM, eq. 9; LCM, eq. 9)."""
        return compared(nets, batch.cond, rng, self._start(nets, batch, rng), self.huber)

    def sample(self, nets: Nets, batch: Batch, rng: Stream) -> Tensor:
        """The student's x0 at the place where `student_loss` would begin."""
        return self._start(nets, batch, rng).asked(nets.student, batch.cond).x0

    def _start(self, nets: Nets, batch: Batch, rng: Stream) -> Start:
        assert batch.latents is not None
        times, edges = self.times(nets.grid)
        i = 1 + rng.integers(self.solver_steps, len(batch.latents))
        g = scales(self.guidance, len(i), rng)
        x_t = nets.student.schedule.add_noise(batch.latents, rng.normal_like(batch.latents), times[i])
        return Start(x_t, times[i], times[i - 1], edges[i], g)


class Start(NamedTuple):
    """Where jumps begin and end: x_t at the times t (B,), the teacher's next times s, the ends; g and r are what the student's
    network is fed besides, the scale that the teacher is guided at and the end."""

    x_t: Tensor
    t: Tensor
    s: Tensor
    end: Tensor
    g: Tensor | None = None
    r: Tensor | None = None

    def asked(self, student: Denoiser, cond: Cond) -> Prediction:
        """The student's prediction at x_t."""
        return student(self.x_t, self.t, cond, g=self.g, r=self.r)


def compared(nets: Nets, cond: Cond, rng: Stream, start: Start, huber: float | None, solver: Solver = first_order) -> Losses:
    """The distance of the student's jump t -> end from the target's s -> end, which has no graph and starts at x_s, one teacher
    step below x_t. huber: c of the pseudo-Huber distance (None: mean squared error). solver: how the teacher steps."""
    schedule, (x_t, t, s, end, g, r) = nets.student.schedule, start
    with torch.no_grad():
        x_s = solver(nets, cond, x_t, t, s, g, rng)
        # Where s is the end the target is x_s itself; the network is asked at t instead, and not listened to.
        arrived = s <= end
        ahead = (nets.average or nets.student)(x_s, torch.where(arrived, t, s), cond, g=g, r=r)
        target = torch.where(like(arrived, x_s).bool(), x_s, ddim(schedule, ahead, end, rng))
    prediction = start.asked(nets.student, cond)
    landed = ddim(schedule, prediction, end, rng)
    apart = mse(landed, target) if huber is None else pseudo_huber(landed, target, huber)
    return Losses({"consistency": apart}, {}, prediction.x0, Landing(prediction.x_t.detach(), t, landed, target, end))
