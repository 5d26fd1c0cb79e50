"""Diff-Instruct: the integral KL divergence without a normaliser (Luo et al. 2023, arXiv 2305.18455)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fewstep.losses import push
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register, simulate
from fewstep.objectives.dmd import learn, scored, statistics
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("diff_instruct")
@final
@dataclass(frozen=True, kw_only=True)
class DiffInstruct(Objective):
    """The student follows the critic's x0 minus the guided teacher's, as it is: `dmd` without its normaliser. Far from the
    teacher it moves faster, and noise levels weigh by how far the two networks are apart there. Prompts only.

    steps: of the deployed student. critic_turns: critic updates a student update. low, high: range of the re-noising time.
    Deviations: five critic turns, not one, which only keep up at one rate for both (one needs a higher train.critic_lr); times
    are uniform, not log-normal in sigma; the mean over a sample stands for the sum (a constant factor); no dropout is on in
    either network (the paper's code shares one mask between them).
    """

    steps: int = 1
    sampler: str | None = None
    critic_turns: int = 5
    low: float = 0.02
    high: float = 0.98
    critic_low: float = 0.001

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",))

    def round(self, step: int) -> list[Turn]:
        return [Turn("critic", self.critic_loss)] * self.critic_turns + [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """E[grad] = (sigma / alpha)^2 grad KL(student_t || teacher_t) (theorem 3.1, weighted so that x0 is compared)."""
        x = simulate(nets, batch, rng).x0
        t = Uniform(self.low, self.high).sample(len(x), rng)
        real, fake = scored(nets, batch, x, t, rng)
        return Losses({"dm": push(x, fake - real)}, statistics(x, fake - real), x)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss of the critic on the student's samples, in the network's native target."""
        return learn(nets, batch, rng, self.critic_low)
