"""Trajectory consistency with random ends: TCD with one segment, a stage of Hyper-SD's TSCD with several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.consistency import Start, compared
from fewstep.objectives.grids import check_grid, first_of_segment, scales, solver_times
from fewstep.objectives.ranges import check_scales, part, positive
from fewstep.objectives.solvers import SOLVERS
from fewstep.stream import Stream


@register("tcd")
@final
@dataclass(frozen=True, kw_only=True)
class TCD(Objective):
    """The student's jump from x_t to a random end must meet its own jump to that end from the teacher's next point x_s; ends lie
    between the lower edge of t's segment and s. TCD, arXiv 2402.19159; with segments 8, 4, 2, 1 in turn the stages of
    TSCD (Hyper-SD, arXiv 2404.13686, algorithm 1).

    steps, solver_steps, huber, guidance, average: as in `consistency`. segments: 1 is TCD; it must divide `steps`.
    end_input: the network is told the end (TCD's "S+"), without which no student can meet every end at once; its export has the
    pipeline that tells it, `told.py`. order: of the teacher's solver; 2 asks it twice a step. Images (latents) are needed.
    Of the two only the teacher's order is a choice: the student's jumps are of first order (the papers' default). TCF(2) asks the
    student again at the middle of a jump's log-SNR, which a jump to clean data has not, nor one from pure noise on a path that
    ends there (flow): of one step on VP, or two on flow, none would be of second order. The nearest stock one, KDPM2Discrete
    (2 n - 1 passes for n steps, the last of first order), starts from sigma_T times the noise, students from the noise itself.
    Deviations: the deployed steps are `ddim` (gamma 0) or `renoise` (gamma 1), since the stock TCDScheduler ends at its table's
    first level and not at clean; TSCD's adversarial part of the distance is the wrapper `adversarial_distance` around this.
    """

    lands: ClassVar[bool] = True
    steps: int = 4
    sampler: str | None = None
    segments: int = 1
    solver_steps: int = 40
    huber: float | None = 0.001
    guidance: tuple[float, float] | None = None
    average: float | None = None
    end_input: bool = False
    order: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        check_grid(self.steps, self.segments, self.solver_steps)
        check_scales(self.guidance)
        positive(huber=self.huber)
        part("the average's weights", average=self.average)
        if self.order not in SOLVERS:
            raise ValueError(f"order of the teacher's solver is 1 or 2, not {self.order}")

    @property
    def needs(self) -> Needs:
        told = (*(("guidance_scale",) if self.guidance else ()), *(("end_time",) if self.end_input else ()))
        return Needs(images=True, inputs=told, scales=self.guidance, average=self.average)

    @property
    def samplers(self) -> tuple[str, ...] | None:
        """Of one segment any end is reached, with noise put back or not, but for a student that is told where to go."""
        return None if self.segments == 1 and not self.end_input else ("ddim",)

    @property
    def draws(self) -> bool:
        return self.segments == 1 and not self.end_input

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss, sample=self.sample)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """d(jump(x_t, t -> end), sg jump(x_s, s -> end)), the end uniform on the teacher's times in [edge, s]."""
        return compared(nets, batch.cond, rng, self._start(nets, batch, rng), self.huber, SOLVERS[self.order])

    def sample(self, nets: Nets, batch: Batch, rng: Stream) -> Tensor:
        """The student's x0 at the place where `student_loss` would begin."""
        return self._start(nets, batch, rng).asked(nets.student, batch.cond).x0

    def _start(self, nets: Nets, batch: Batch, rng: Stream) -> Start:
        assert batch.latents is not None
        times = solver_times(nets.grid, self.solver_steps)
        i = 1 + rng.integers(self.solver_steps, len(batch.latents))
        edge = first_of_segment(self.solver_steps, self.segments)[i]
        end = times[edge + (rng.uniform(len(i)) * (i - edge)).long()]
        g, r = scales(self.guidance, len(i), rng), end if self.end_input else None
        x_t = nets.student.schedule.add_noise(batch.latents, rng.normal_like(batch.latents), times[i])
        return Start(x_t, times[i], times[i - 1], end, g, r)
