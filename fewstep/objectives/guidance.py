"""Guidance distillation: one pass of the student draws what two passes of the teacher draw, at any scale of a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fewstep.losses import mse, snr_weight
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.grids import scales
from fewstep.objectives.ranges import check_scales
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("guidance")
@final
@dataclass(frozen=True, kw_only=True)
class GuidanceDistillation(Objective):
    """The student, fed the scale g, predicts what the guided teacher predicts at g: stage 1 of Meng et al. 2022,
    arXiv 2210.03142. It halves the cost of a step and not their number; `progressive` with the same `guidance`, as the next stage
    (teacher: previous), goes on with that.

    steps: of the deployed student, as many as its teacher needs. guidance: range of the scales (the paper's w + 1; w in [0, 4] on
    ImageNet). low: least time. Images (latents) are needed: x_t is made from them.
    """

    draws: ClassVar[bool] = False
    steps: int = 50
    sampler: str | None = "ddim"
    guidance: tuple[float, float] = (1.0, 8.0)
    low: float = 0.001

    def __post_init__(self) -> None:
        check_scales(self.guidance)
        Uniform(self.low, 1.0)

    @property
    def needs(self) -> Needs:
        return Needs(images=True, inputs=("guidance_scale",), scales=self.guidance)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # what is learned is the field, not its ends

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """max(SNR, 1) |x0(x_t, g) - x0 of the teacher at g|^2, which is the larger of the errors in x0 and in eps."""
        assert batch.latents is not None
        schedule, x0 = nets.student.schedule, batch.latents
        t, g = Uniform(self.low, 1.0).sample(len(x0), rng), scales(self.guidance, len(x0), rng)
        x_t = schedule.add_noise(x0, rng.normal_like(x0), t)
        with torch.no_grad():
            target = nets.teacher(x_t, t, batch.cond, g=g)
        prediction = nets.student(x_t, t, batch.cond, g=g)
        loss = mse(prediction.x0, target.x0)
        return Losses({"guidance": snr_weight(*schedule.alpha_sigma(t)).to(loss) * loss}, {}, prediction.x0)
