"""The first distribution matching distillation, with a regression on the teacher's own samples (Yin et al. 2023,
arXiv 2311.18828)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fewstep.losses import mse, normalised, push
from fewstep.objectives.base import Batch, Losses, Needs, Nets, full, register
from fewstep.objectives.ranges import at_least, positive
from fewstep.objectives.two_time_scale import TwoTimeScale, scored, size
from fewstep.stream import Stream


@register("dmd1")
@final
@dataclass(frozen=True, kw_only=True)
class DMD1(TwoTimeScale):
    """Distribution matching as in `dmd`, held in place by pairs: from the noise that the teacher drew a sample from, the student
    draws that sample. Prompts, and pairs made from them.

    steps: of the deployed student; the paper's has one, and where there are more the pairs teach the first of them.
    regression: weight of the pairs. floor: as for `dmd`; the other settings are those of TwoTimeScale.
    Deviations: the distance of a pair is the mean square in latents, not LPIPS of decoded pictures, which would want a decoder
    and a perceptual network in every round; the paper's further factor alpha_t of the direction is left out, as in its authors'
    later code.
    """

    steps: int = 1
    sampler: str | None = None
    critic_turns: int = 1
    regression: float = 0.25
    floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(floor=self.floor)
        at_least(0, regression=self.regression)

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",), pairs=True)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """`dmd`'s term (DMD, eq. 7 and 8) on fresh noise, and regression x d(G(noise), teacher's sample) (eq. 9)."""
        assert batch.latents is not None and batch.noise is not None
        x, x_t, t = self.noised(nets, batch, rng)
        real, fake = scored(nets, batch, x_t, t)
        direction = normalised(fake - real, x, real, self.floor)
        start = nets.student.schedule.prior(batch.noise)
        again = nets.student(start, full(nets.grid[0], len(batch.noise)), batch.cond).x0
        terms = {"dm": push(x, direction), "regression": self.regression * mse(again, batch.latents)}
        return Losses(terms, {"direction": size(direction)}, x)
