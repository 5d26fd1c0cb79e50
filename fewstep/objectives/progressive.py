"""Progressive distillation: one step of the student lands where several of its teacher's do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fewstep.losses import mse, snr_weight
from fewstep.objectives.base import Batch, Landing, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.grids import nested_times, scales
from fewstep.objectives.ranges import check_scales
from fewstep.sampling import ddim
from fewstep.schedules import like
from fewstep.stream import Stream


@register("progressive")
@final
@dataclass(frozen=True, kw_only=True)
class Progressive(Objective):
    """At a deployed time t the student predicts the x0 whose DDIM jump to the next time s lands where `factor` DDIM steps of the
    teacher land. Salimans and Ho 2022, arXiv 2202.00512, algorithm 2; with factor 4 the first stage of SDXL-Lightning, arXiv
    2402.13929. One halving a stage: the next one is taught by its student (`teacher: previous`).

    steps: of the deployed student; the teacher takes factor * steps, at the times at which as many are deployed, where a student
    of the stage before was trained. guidance: range of scales fed to the student's network and to a teacher that takes them,
    which is stage 2 of Meng et al. 2022 (arXiv 2210.03142); a teacher that takes none is guided at them. None: the teacher's one
    scale, nothing fed. Images (latents) are needed.
    """

    lands: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    local: ClassVar[bool] = True
    steps: int = 4
    sampler: str | None = "ddim"
    factor: int = 2
    guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_scales(self.guidance)
        if self.factor < 1:
            raise ValueError(f"factor counts the teacher's steps in one of the student's and is at least 1, not {self.factor}")

    @property
    def needs(self) -> Needs:
        return Needs(images=True, inputs=("guidance_scale",) if self.guidance else (), scales=self.guidance)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # each step lands where deterministic ones of the teacher do

    @property
    def asks(self) -> int:
        return self.factor * self.steps

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """max(SNR, 1) |x0(x_t) - x0*|^2, x0* = (z_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)."""
        assert batch.latents is not None
        schedule, x0 = nets.student.schedule, batch.latents
        times = nested_times(nets, self.steps * self.factor)
        i = self.factor * (1 + rng.integers(self.steps, len(x0)))
        t, s, g = times[i], times[i - self.factor], scales(self.guidance, len(x0), rng)
        x_t = z = schedule.add_noise(x0, rng.normal_like(x0), t)
        with torch.no_grad():
            for k in range(self.factor):
                z = ddim(schedule, nets.teacher(z, times[i - k], batch.cond, g=g), times[i - k - 1], rng)
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        ratio = sigma_s / sigma
        target = (z - like(ratio, z) * x_t) / like(alpha_s - ratio * alpha, z)
        prediction = nets.student(x_t, t, batch.cond, g=g)
        loss = mse(prediction.x0, target)
        landing = Landing(x_t, t, ddim(schedule, prediction, s, rng), z, s)
        return Losses({"progressive": snr_weight(alpha, sigma).to(loss) * loss}, {}, prediction.x0, landing)
