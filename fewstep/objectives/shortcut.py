"""Shortcut models: a jump is two of half its length, the shortest is the teacher's (Frans et al. 2024, arXiv 2410.12557)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser
from fewstep.losses import mse
from fewstep.matched import straight
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.grids import nested_times
from fewstep.objectives.ranges import part
from fewstep.sampling import ddim
from fewstep.schedules import like
from fewstep.stream import Stream


@register("shortcut")
@final
@dataclass(frozen=True, kw_only=True)
class Shortcut(Objective):
    """Time is cut into `solver_steps` parts, where as many steps would be deployed, and the student learns jumps over 1, 2, 4,
    ... and all of them, each from one of its own multiples: over one part it goes as the (guided) teacher's DDIM step does, over
    more where two jumps of half the length go (equation 5). Such a student serves every number of steps that is a power of two.

    solver_steps: a power of two, as `steps` must be one. instant: share of samples at the shortest jump, the others take one of
    the longer lengths alike. average: decay of the averaged student that goes the half jumps (None: the student itself). The
    student's network is fed the jump's end and needs full weights. Any schedule: what is compared is eps - x0, the velocity on
    the straight path through the same noise ratios. Images (latents) are needed.
    Deviations: the shortest jump learns from the teacher, not from eps - x0 (distillation), so that it needs fewer samples than
    the paper's three of four; the end is told, not log2 of the length; nothing is cut at +-4, for latents have any scale.
    """

    draws: ClassVar[bool] = False
    steps: int = 1
    sampler: str | None = "ddim"
    solver_steps: int = 128
    instant: float = 0.25
    average: float | None = 0.99

    def __post_init__(self) -> None:
        part("the average's weights", average=self.average)
        for name, n in (("steps", self.steps), ("solver_steps", self.solver_steps)):
            if n < 1 or n & (n - 1):
                raise ValueError(f"{name} must be a power of two, not {n}: a jump is two jumps of half its length")
        if self.solver_steps < max(2, self.steps):
            raise ValueError(f"solver_steps ({self.solver_steps}) must be at least 2 and at least steps ({self.steps})")
        if not 0 < self.instant < 1:
            raise ValueError(f"instant is a share of samples in (0, 1), not {self.instant}")

    @property
    def needs(self) -> Needs:
        return Needs(images=True, inputs=("end_time",), average=self.average)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # a student that is told the end of its jump goes there itself

    @property
    def asks(self) -> int:
        return self.solver_steps

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """|u(x_t, t, r) - sg(goal)|^2, see `goals` (equation 5)."""
        assert batch.latents is not None
        x0, times = batch.latents, nested_times(nets, self.solver_steps)
        i, length = self.drawn(len(x0), rng)
        x_t = nets.student.schedule.add_noise(x0, rng.normal_like(x0), times[i])
        goal = goals(nets, batch.cond, x_t, times, i, length, rng)
        prediction = nets.student(x_t, times[i], batch.cond, r=times[i - length])
        return Losses({"shortcut": mse(prediction.velocity, goal)}, {}, prediction.x0)

    def drawn(self, n: int, rng: Stream) -> tuple[Tensor, Tensor]:
        """Where jumps start, and how many parts long they are (n,); the start is a multiple of the length, at least once it."""
        levels = self.solver_steps.bit_length() - 1
        length = torch.where(rng.uniform(n) < self.instant, 1, 2 ** (1 + rng.integers(levels, n)))
        return length * (1 + (rng.uniform(n) * (self.solver_steps // length)).long()), length


@torch.no_grad()
def goals(nets: Nets, cond: Cond, x_t: Tensor, times: Tensor, i: Tensor, length: Tensor, rng: Stream) -> Tensor:
    """The velocity (B, C, *S) of the jumps that start at times[i] (B,): over one part the teacher's, else that of two half jumps
    of the (averaged) student. Each network is asked about its own samples only."""
    goal = torch.zeros_like(x_t, dtype=torch.promote_types(x_t.dtype, torch.float32))
    if (short := length == 1).any():
        goal[short] = nets.teacher(x_t[short], times[i[short]], cond[short]).velocity
    if (long := ~short).any():
        i, length = i[long], length[long]
        t, m, r = times[i], times[i - length // 2], times[i - length]
        goal[long] = halves(nets.average or nets.student, cond[long], x_t[long], t, m, r, rng)
    return goal


def halves(jumper: Denoiser, cond: Cond, x_t: Tensor, t: Tensor, m: Tensor, r: Tensor, rng: Stream) -> Tensor:
    """The mean velocity on the straight path of a jump from t to m and one from where it lands to r."""
    first = jumper(x_t, t, cond, r=m)
    second = jumper(ddim(jumper.schedule, first, m, rng).to(x_t.dtype), m, cond, r=r)
    t, m, r = (straight(jumper.schedule, u) for u in (t, m, r))
    return torch.lerp(first.velocity, second.velocity, like((m - r) / (t - r), first.x0))
