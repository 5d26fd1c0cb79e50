"""Diff-Instruct: the integral KL divergence without a normaliser (Luo et al. 2023, arXiv 2305.18455)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fewstep.losses import push
from fewstep.objectives.base import Batch, Losses, Nets, register
from fewstep.objectives.two_time_scale import TwoTimeScale, scored, size
from fewstep.stream import Stream


@register("diff_instruct")
@final
@dataclass(frozen=True, kw_only=True)
class DiffInstruct(TwoTimeScale):
    """The student follows the critic's x0 minus the guided teacher's, as it is: `dmd` without its normaliser. Far from the
    teacher it moves faster, and noise levels weigh by how far the two networks are apart there. Prompts only.

    steps: of the deployed student; the other settings are those of TwoTimeScale.
    Deviations: five critic turns, not one, which only keep up at one rate for both (one needs a higher train.critic_lr); times
    are uniform, not log-normal in sigma; the mean over a sample stands for the sum (a constant factor); no dropout is on in
    either network (the paper's code shares one mask between them).
    """

    steps: int = 1
    sampler: str | None = None

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """E[grad] = (sigma / alpha)^2 grad KL(student_t || teacher_t) (theorem 3.1, weighted so that x0 is compared)."""
        x, x_t, t = self.noised(nets, batch, rng)
        real, fake = scored(nets, batch, x_t, t)
        return Losses({"dm": push(x, fake - real)}, {"direction": size(fake - real)}, x)
