"""Score implicit matching (SIM, Luo et al. 2024, arXiv 2410.16794)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fewstep.losses import flat_mean
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.dmd import learn
from fewstep.objectives.sid import noised, statistics
from fewstep.stream import Stream


@register("sim")
@final
@dataclass(frozen=True, kw_only=True)
class SIM(Objective):
    """The student lowers a distance of two scores that grows like their difference, not like its square, by a gradient that
    passes through the inputs of both networks: a sample weighs no more for being far off. Prompts only.

    steps: of the deployed student; a round trains one of them, chosen evenly, as in `sid`. huber: c of the pseudo-Huber distance
    sqrt(|delta|^2 + c^2) - c of x0 predictions, in units of their root mean square over a sample, so that it means the same at
    every resolution; as it grows, the loss becomes that of `sid` with alpha = 1 and no normaliser, over c.
    critic_turns: critic updates a student update. low, high: range of the re-noising time.
    Deviations: the paper's c, weights of noise levels and ratio of turns could not be checked; here each level weighs as its
    difference of x0 predictions does. A few steps are as in few-step SiD (arXiv 2505.12674); SIM is a one-step method.
    """

    steps: int = 4
    sampler: str | None = None
    huber: float = 0.01
    critic_turns: int = 5
    low: float = 0.02
    high: float = 0.98
    critic_low: float = 0.001

    def __post_init__(self) -> None:
        if self.huber <= 0:
            raise ValueError(f"huber must be positive, not {self.huber}: at 0 the distance has no gradient where the scores meet")

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",))

    def round(self, step: int) -> list[Turn]:
        return [Turn("critic", self.critic_loss)] * self.critic_turns + [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """delta (f_fake - x) / sqrt(|delta|^2 + c^2) with delta = f_real - f_fake, the root differentiated too."""
        assert nets.critic is not None
        x, x_t, t = noised(nets, batch, rng, self.low, self.high)
        fake = nets.critic(x_t, t, batch.cond).x0
        delta = nets.teacher(x_t, t, batch.cond).x0 - fake
        loss = flat_mean(delta * (fake - x)) / (flat_mean(delta.square()) + self.huber**2).sqrt()
        return Losses({"sim": loss}, statistics(x, delta), x)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss of the critic on the student's samples, in the network's native target."""
        return learn(nets, batch, rng, self.critic_low)
