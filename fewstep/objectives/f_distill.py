"""Distribution matching for other divergences than the reverse KL, by the ratio that discriminator heads see (f-distill, Xu et
al. 2025, arXiv 2502.15681)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.divergences import divergence, ranges, relative
from fewstep.heads import Heads
from fewstep.losses import CONTESTS, flat_mean, non_saturating, normalised, push
from fewstep.objectives.base import Batch, Losses, Needs, Nets, register
from fewstep.objectives.contest import contest, noised
from fewstep.objectives.ranges import at_least, positive
from fewstep.objectives.two_time_scale import TwoTimeScale, scored, size
from fewstep.schedules import like
from fewstep.stream import Stream


@register("f_distill")
@final
@dataclass(frozen=True, kw_only=True)
class FDistill(TwoTimeScale):
    """`dmd` with its GAN term, whose direction weighs h(r) times as much where real data are r times as likely as the student's
    samples. Images, since heads learn r from them.

    divergence: which f, and so which h. rkl is `dmd`; kl, jeffreys cover what the student misses; neyman, softened leave what it
    alone draws; js and squared_hellinger lie between. steps: of the deployed student. critic_turns: updates of critic and heads a
    student update. heads, taps: as for `adversarial`. weight: of the GAN term; judge_weight: of the heads' loss beside the
    critic's. bins: ranges of time in each of which r is made to average 1. floor: as for
    `dmd`; low, high, critic_low, shift, ida: see TwoTimeScale.
    Deviations: the averages of r and of h are those of the batches at hand, not moving ones, so these should hold several samples
    a bin (the paper: 10 bins, batches of 512); heads and critic move together, by an optimizer each; judge_weight (the paper: 1).
    """

    steps: int = 4
    sampler: str | None = None
    divergence: Literal["js", "kl", "rkl", "softened", "squared_hellinger", "neyman", "jeffreys"] = "js"
    heads: Literal["dmd2", "ladd", "projected"] = "dmd2"
    taps: tuple[str, ...] = ()
    weight: float = 3e-3
    judge_weight: float = 1e-2
    bins: int = 4
    floor: float = 1e-4

    def __post_init__(self) -> None:
        divergence(self.divergence)
        super().__post_init__()
        positive(floor=self.floor)
        at_least(0, weight=self.weight, judge_weight=self.judge_weight)
        if self.bins < 1:
            raise ValueError(f"bins is a number of ranges of time, at least 1, not {self.bins}")

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic", "heads"), images=True, heads=Heads(self.heads, self.taps))

    @property
    def apprentices(self) -> tuple[str, ...]:
        return ("heads",)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """h x `dmd`'s direction (theorem 1), and weight x softplus(-D) at the same x_t."""
        assert nets.judge is not None
        x, x_t, t = self.noised(nets, batch, rng)
        if self.needs.heads.backbone == "critic":  # one pass gives the score and the features
            prediction, logits = nets.judge.both(x_t, t, batch.cond, graph=False)
            with torch.no_grad():
                real, fake = nets.teacher(x_t, t, batch.cond).x0, prediction.x0
        else:
            (real, fake), logits = scored(nets, batch, x_t, t), nets.judge.logits(x_t, t, batch.cond)
        with torch.no_grad():
            h = self.weights(logits, t, nets.everywhere)
            direction = like(h, x) * normalised(fake - real, x, real, self.floor)
            ratio = flat_mean(logits).exp().mean()  # 1 in the mean at the heads' optimum
        terms = {"dm": push(x, direction), "adversary": self.weight * flat_mean(non_saturating(logits))}
        return Losses(terms, {"direction": size(direction), "largest_weight": h.max(), "ratio": ratio}, x)

    def weights(self, logits: Tensor, t: Tensor, everywhere: Callable[[Tensor], Tensor]) -> Tensor:
        """h(r) (B,), averaging 1 over all processes' batches, of r = exp(mean logit) that averages 1 in each bin of t (algorithm
        1); everywhere: see `Nets`."""
        place = ranges(t, self.low, self.high, self.bins)
        h = divergence(self.divergence).weight(relative(flat_mean(logits), place, self.bins, everywhere))
        return h / everywhere(h.mean())

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss of the critic on the student's samples, and judge_weight x the heads' loss, which tells them, noised,
        from noised real data."""
        assert batch.latents is not None
        losses = super().critic_loss(nets, batch, rng)
        assert losses.sample is not None
        real, fake = (noised(nets, x, self.times.sample(len(x), rng), rng) for x in (batch.latents, losses.sample))
        rules = CONTESTS["non_saturating"]  # its best logit is log r
        told = contest(nets, batch.cond, real, fake, rules, rng, r1=0.0, r2=0.0, jitter=0.0)
        judged = {k: self.judge_weight * v for k, v in told.terms.items()}
        return replace(losses, terms={**losses.terms, **judged}, stats={**losses.stats, **told.stats})
