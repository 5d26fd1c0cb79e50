"""Distribution matching distillation with a two-time-scale critic (DMD2, Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fewstep.losses import normalised, push
from fewstep.objectives.base import Batch, Losses, Nets, register
from fewstep.objectives.ranges import positive
from fewstep.objectives.two_time_scale import TwoTimeScale, scored, size
from fewstep.stream import Stream


@register("dmd")
@final
@dataclass(frozen=True, kw_only=True)
class DMD(TwoTimeScale):
    """The student follows the difference of two scores at noised samples of its own: the critic's (what it draws) minus the
    guided teacher's (what it should draw). Prompts only.

    steps: of the deployed student. critic_turns (DMD2: 5; 10 for SD1.5), low, high (20..980 of 1000), critic_low, shift, ida: see
    TwoTimeScale. floor: least normaliser.
    Deviations from the paper: critic turns come first and draw their own samples instead of reusing the student's; a batch is
    shared out over the steps, see `simulate`; the critic's time is continuous in (critic_low, 1]; the normaliser has a floor
    where the reference code relies on nan_to_num.
    """

    steps: int = 4
    sampler: str | None = None
    floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(floor=self.floor)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """E[grad] = (sigma / alpha)^2 grad KL(student_t || teacher_t) (DMD, eq. 7), normalised a sample (eq. 8)."""
        x, x_t, t = self.noised(nets, batch, rng)
        real, fake = scored(nets, batch, x_t, t)
        direction = normalised(fake - real, x, real, self.floor)
        return Losses({"dm": push(x, direction)}, {"direction": size(direction)}, x)
