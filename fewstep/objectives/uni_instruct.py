"""Uni-Instruct: any f-divergence by the score difference and the ratio of the two laws (Wang et al. 2025, arXiv 2505.20755)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from fewstep.divergences import divergence, ranges, relative
from fewstep.losses import distance, flat_mean
from fewstep.objectives.base import Batch, Losses, Needs, Nets, register
from fewstep.objectives.ranges import positive
from fewstep.objectives.two_time_scale import TwoTimeScale, size
from fewstep.stream import Stream


@register("uni_instruct")
@final
@dataclass(frozen=True, kw_only=True)
class UniInstruct(TwoTimeScale):
    """The student lowers an f-divergence from its teacher: what the divergence loses to noise is a squared score difference,
    weighted by the ratio of the two laws, and the gradient passes through the inputs of both networks and of the heads.

    steps: of the deployed student; a round trains one of them, chosen evenly, as in `sid`. divergence: a key of DIVERGENCES.
    "rkl" has no ratio in it: it is twice `sid` with alpha = 1/2, from prompts alone. Every other one needs heads on the critic
    that are trained along, so it is the `inner` of `adversarial` ("kl" is the paper's best). least, most: where a ratio is cut;
    bins: times over which it is averaged apart, to 1. floor: least normaliser. The other
    settings are those of TwoTimeScale.
    Deviations: the loss is the exact one for every f, where the released code leaves out its first term and takes a ratio from
    the heads' loss value; noise levels weigh as in `sid`; the ratio is that of the data, the score that of the guided teacher.
    """

    steps: int = 1
    sampler: str | None = None
    divergence: str = "rkl"
    least: float = 0.1
    most: float = 20.0
    bins: int = 4
    floor: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        divergence(self.divergence)
        positive(floor=self.floor)
        if not 0 < self.least < 1 < self.most:
            raise ValueError(f"ratios average 1 and are cut to least < 1 < most, not to [{self.least}, {self.most}]")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, not {self.bins}")

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",) if self.divergence == "rkl" else ("critic", "heads"))

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """phi'(rho) |delta|^2 + 2 (phi(rho) / rho) delta (f_fake - x) with delta = f_real - f_fake, rho = student / teacher: its
        gradient is that of E_teacher[phi(rho) |score difference|^2] whose critic and ratio follow the student."""
        x, x_t, t = self.noised(nets, batch, rng)
        real = nets.teacher(x_t, t, batch.cond).x0
        fake, log_ratio = self._judged(nets, batch, x_t, t)
        delta, f = real - fake, divergence(self.divergence)
        weight = f.weight(log_ratio)
        loss = f.slope(log_ratio) * flat_mean(delta.square()) + 2 * weight * flat_mean(delta * (fake - x))
        stats = {"delta": size(delta), "largest_weight": weight.detach().max()}
        return Losses({"uni": loss / distance(x, real, self.floor)}, stats, x)

    def _judged(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's x0, and log r (B,), r = teacher / student, with its graph; only its average to 1 has none."""
        assert nets.critic is not None
        if "heads" not in self.needs.roles:
            return nets.critic(x_t, t, batch.cond).x0, x_t.new_zeros(len(x_t))
        assert nets.judge is not None
        prediction, logits = nets.judge.both(x_t, t, batch.cond)
        logit = flat_mean(logits).clamp(math.log(self.least), math.log(self.most))
        place = ranges(t, self.low, self.high, self.bins)
        mean_one = relative(logit, place, self.bins, nets.everywhere, least=self.least, most=self.most)
        return prediction.x0, logit + (mean_one - logit).detach()
