"""Score-regularised continuous-time consistency (rCM, Zheng et al. 2025, arXiv 2510.08431)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.denoiser import Prediction, linear_loss
from fewstep.losses import mse, normalised, push, unit
from fewstep.matched import Matched
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.ranges import at_least, positive
from fewstep.objectives.scm import TRIG, tangent, times
from fewstep.objectives.two_time_scale import size
from fewstep.schedules import like
from fewstep.stream import Stream
from fewstep.tangents import DERIVATIVES
from fewstep.times import LogNormal


@register("rcm")
@final
@dataclass(frozen=True, kw_only=True)
class RCM(Objective):
    """scm, which covers every mode, and on the student's own samples the score difference of dmd, which keeps them sharp.

    mean, std: of ln(sigma / alpha) for the consistency half (the paper's for images: -0.8, 1.6); score_mean, score_std: of the
    times at which samples are noised again, for scores and in rollouts (0, 1.6). score_weight: lambda, 0.01 (small teachers want
    more: configs/sprites-sd-rcm-2step-full.yaml has 0.2). rollout_steps: most steps of the rollout that a sample comes from, at
    random times. critic_turns: critic updates a student update (4 or 9). warmup: rounds of consistency alone, its tangent let in
    slowly (the authors find it dispensable). floor, derivative: see scm.
    Images (latents) are needed. Deviations: the tangent's warm-up is sCM's, which is the same once it is over; a batch without
    a finite tangent is not masked, but the trainer's to skip; a rollout's length is drawn, not cycled through.
    """

    steps: int = 2
    sampler: str | None = None
    mean: float = -0.8
    std: float = 1.6
    score_mean: float = 0.0
    score_std: float = 1.6
    score_weight: float = 0.01
    rollout_steps: int = 4
    critic_turns: int = 4
    warmup: int = 0
    floor: float = 0.1
    derivative: Literal["jvp", "difference"] = "jvp"

    def __post_init__(self) -> None:
        LogNormal(self.mean, self.std)
        LogNormal(self.score_mean, self.score_std)
        at_least(1, rollout_steps=self.rollout_steps, critic_turns=self.critic_turns)
        at_least(0, warmup=self.warmup, score_weight=self.score_weight)
        positive(floor=self.floor)

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",), images=True, rounds=self.warmup + 1)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("renoise",)  # x0 is a sample at every time, and no point of a trajectory

    def round(self, step: int) -> list[Turn]:
        if step < self.warmup:
            return [Turn("student", partial(self.consistency, warm=(step + 1) / self.warmup))]
        return [Turn("critic", self.critic_loss)] * self.critic_turns + [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """L_sCM + lambda L_DMD (the paper's algorithm 1)."""
        forward, reverse = self.consistency(nets, batch, rng), self.score(nets, batch, rng)
        return Losses({**forward.terms, **reverse.terms}, {**forward.stats, **reverse.stats}, reverse.sample)

    def consistency(self, nets: Nets, batch: Batch, rng: Stream, warm: float = 1.0) -> Losses:
        """sCM's loss, without its adaptive weight: after normalisation it would be constant."""
        assert batch.latents is not None
        student = Matched(nets.student, TRIG)
        t = times(LogNormal(self.mean, self.std), len(batch.latents), rng, student)
        x_t = TRIG.add_noise(batch.latents, rng.normal_like(batch.latents), t)
        g, stats = tangent(nets, batch, x_t, t, warm, DERIVATIVES[self.derivative])
        prediction = student(x_t, t, batch.cond)
        return Losses({"scm": push(prediction.v, -unit(g, self.floor))}, stats, prediction.x0)

    def score(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """lambda x the critic's minus the guided teacher's x0 at a noised sample, normalised as in DMD."""
        assert nets.critic is not None
        x = self._sample(nets, batch, rng).x0
        t = self._score_times(nets, len(x), rng)
        with torch.no_grad():
            x_t = TRIG.add_noise(x.detach(), rng.normal_like(x), t)
            real, fake = (Matched(net, TRIG)(x_t, t, batch.cond).x0 for net in (nets.teacher, nets.critic))
            direction = normalised(fake - real, x, real, 1e-5)
        return Losses({"dm": self.score_weight * push(x, direction)}, {"direction": size(direction)}, x)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """The critic's F against that of the student's noised samples: ||x0 - f||^2 / sin^2."""
        assert nets.critic is not None
        with torch.no_grad():
            x = self._sample(nets, batch, rng).x0
        t, eps = self._score_times(nets, len(x), rng), rng.normal_like(x)
        cos, sin = TRIG.alpha_sigma(t)
        alpha, sigma, linear = like(cos, x), like(sin, x), linear_loss(x, cos, sin, -sin, cos)
        prediction = Matched(nets.critic, TRIG)(TRIG.add_noise(x, eps, t), t, batch.cond)
        return Losses({"denoise": mse(prediction.v, alpha * eps - sigma * x)}, {"denoise_linear": linear.mean()}, x)

    def _score_times(self, nets: Nets, n: int, rng: Stream) -> Tensor:
        return times(LogNormal(self.score_mean, self.score_std), n, rng, Matched(nets.student, TRIG))

    def _sample(self, nets: Nets, batch: Batch, rng: Stream) -> Prediction:
        """The end of a rollout from noise at 1 to rollout_steps falling random times, with a graph of its last step only."""
        student, n = Matched(nets.student, TRIG), batch.shape[0]
        x, t = rng.normal(batch.shape), torch.full((n,), student.highest, dtype=torch.float64)
        for _ in range(rng.shared.integer(self.rollout_steps)):
            with torch.no_grad():
                x0 = student(x, t, batch.cond).x0
            t = torch.minimum(t, self._score_times(nets, n, rng))
            x = TRIG.add_noise(x0, rng.normal_like(x0), t)
        return student(x, t, batch.cond)
