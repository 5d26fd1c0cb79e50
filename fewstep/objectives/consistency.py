"""Trajectory-segmented consistency: LCM with one segment, PCM and TSCD edges with several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.denoiser import Prediction
from fewstep.losses import pseudo_huber
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.sampling import ddim
from fewstep.stream import Stream


@register("consistency")
@final
@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """On a segment [edge, next edge] of the teacher's trajectory, every point is mapped to the segment's lower edge: the
    student's jump from x_t must end where its own jump from the teacher's next point x_s ends.

    steps: of the deployed student, whose times are also the places where segments may meet. segments: how many (None: `steps`, as
    in PCM, arXiv 2405.18407; 1 is LCM, arXiv 2310.04378; it must divide `steps`). solver_steps: teacher steps from noise to clean
    (a multiple of `steps`). huber: c of the pseudo-Huber distance. Images (latents) are needed: x_t is made from them.
    Deviations: the boundary is held by the jump itself, which is the identity at the edge, not by c_skip (whose part at the first
    grid point is 7e-6); the target network is the student without gradient (the papers' choice for LoRA).
    """

    steps: int = 4
    sampler: str | None = None
    segments: int | None = None
    solver_steps: int = 40
    huber: float = 0.001

    def __post_init__(self) -> None:
        if self.steps % (self.segments or self.steps):
            raise ValueError(
                f"segments ({self.segments}) must divide steps ({self.steps}), so that segments meet at deployed times"
            )
        if self.solver_steps % self.steps:
            raise ValueError(f"solver_steps ({self.solver_steps}) must be a multiple of steps ({self.steps})")

    @property
    def needs(self) -> Needs:
        return Needs(images=True)

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def times(self, grid: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(times (N + 1,) rising from 0, lower edge (N + 1,) of the segment that *ends* at each): a time on an edge belongs to
        the segment below it, otherwise the jump from it would be empty (Hyper-SD's ties)."""
        corners = torch.tensor((0.0, *reversed(grid)), dtype=torch.float64)
        fine = self.solver_steps // self.steps
        inner = torch.arange(self.solver_steps + 1, dtype=torch.float64) / fine
        low = inner.floor().clamp(max=self.steps - 1).long()
        times = torch.lerp(corners[low], corners[low + 1], inner - low)
        length = self.solver_steps // (self.segments or self.steps)
        first = (torch.arange(self.solver_steps + 1) - 1).clamp(min=0) // length * length
        return times, times[first]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """d(jump(x_t, t -> edge), sg jump(x_s, s -> edge)) with x_s one guided teacher step below (PCM, eq. 9; LCM, eq. 9)."""
        assert batch.latents is not None
        schedule, x0 = nets.student.schedule, batch.latents
        times, edges = self.times(nets.grid)
        i = 1 + rng.integers(self.solver_steps, len(x0))
        t, s, edge = times[i], times[i - 1], edges[i]
        x_t = schedule.add_noise(x0, rng.normal_like(x0), t)
        with torch.no_grad():
            x_s = ddim(schedule, nets.teacher(x_t, t, batch.cond), s, rng)
            # Where s is the edge the target is x_s itself; the network is asked at t instead, and not listened to.
            arrived = s <= edge
            ahead = nets.student(x_s, torch.where(arrived, t, s), batch.cond)
            target = torch.where(_wide(arrived, x_s), x_s, _jump(nets, ahead, edge, rng))
        prediction = nets.student(x_t, t, batch.cond)
        loss = pseudo_huber(_jump(nets, prediction, edge, rng), target, self.huber)
        return Losses({"consistency": loss}, {}, prediction.x0)


def _jump(nets: Nets, prediction: Prediction, edge: Tensor, rng: Stream) -> Tensor:
    return ddim(nets.student.schedule, prediction, edge, rng)


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(x.device).reshape(-1, *([1] * (x.ndim - 1)))
