"""Any denoiser on another schedule: the same network, asked where the ratio of noise to signal is the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.denoiser import TARGETS, Cond, Denoiser, Guided, Prediction
from fewstep.schedules import NoiseSchedule, like


@dataclass(frozen=True)
class Matched:
    """`denoiser` heard on `schedule`: sigma/alpha says where its own network is asked, the two norms how its input is scaled.

    x0 and eps are opinions about the same picture on every schedule, so they come back as they are, guided or not (guidance is
    affine in them). On TrigFlow, `Prediction.v` is sCM's F and `x0` is its f; on RectifiedFlow, `velocity` is the flow's field
    (SANA-Sprint, arXiv 2503.09641, section 3.1; Lee et al., arXiv 2405.20320, section 3.2). Differentiable in x and t."""

    denoiser: Denoiser | Guided
    schedule: NoiseSchedule

    @cached_property
    def highest(self) -> float:
        """The t of this schedule where the denoiser's own ends; a hair below 1 where that is infinite noise."""
        alpha, sigma = self.denoiser.schedule.alpha_sigma(torch.ones(1, dtype=torch.float64))
        # One-sided derivatives at the very end of a table would be zero.
        return min(float(self.schedule.t_of_ratio(sigma / alpha)), 1.0) - 1e-9

    @cached_property
    def lowest(self) -> float:
        """The t of this schedule at the lowest level of a table of a thousand, below which no network was asked."""
        alpha, sigma = self.denoiser.schedule.alpha_sigma(torch.full((1,), 1e-3, dtype=torch.float64))
        return float(self.schedule.t_of_ratio(sigma / alpha))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, *, g: Tensor | None = None, r: Tensor | None = None) -> Prediction:
        """The prediction at x_t (B, C, *S) on this schedule and t (B,) in (0, highest].

        g: the guidance scale (B,), for a network that takes it or a guided one. r: the end of the jump (B,), also on this
        schedule, for a network that takes it; its sign is handed on."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        own, t_own = self.denoiser.schedule, self.own(t)
        x_own = like(_norm(*own.alpha_sigma(t_own)) / _norm(alpha, sigma), x_t) * x_t
        if r is None:
            found = self.denoiser(x_own, t_own, cond, g=g)
        else:
            assert isinstance(self.denoiser, Denoiser)
            found = self.denoiser(x_own, t_own, cond, g=g, r=r.sign() * self.own(r.abs()))
        return Prediction(found.x0, found.eps, like(alpha, found.x0), like(sigma, found.x0))

    def own(self, t: Tensor) -> Tensor:
        """The t of the denoiser's own schedule at which the noise ratio is that of t here."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return self.denoiser.schedule.t_of_ratio(sigma / alpha)

    def lever(self, target: str, t: Tensor) -> Tensor:
        """How much larger (B,) an error of the network's own output is in `target`, a key of TARGETS, at t of this schedule; at
        least 1.

        A loss in `target` over it has a gradient of one size in the output, wherever it is taken: the velocity of a network that
        predicts epsilon holds its errors 1 + sigma / alpha times, 15 at the noise end of SD's table. float64."""
        assert isinstance(self.denoiser, Denoiser)
        alpha, sigma, a, b = self.denoiser.solve(self.own(t))
        here, there = self.schedule.alpha_sigma(t)
        c, d = TARGETS[target](here, there)
        # x_t is known, so that the two opinions err by sigma and -alpha, times a number which cancels.
        return ((c * sigma - d * alpha) / (a * sigma - b * alpha)).abs().clamp(min=1)


def straight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The time (B,) in [0, 1] on the straight path at which the noise ratio is that of a schedule at t."""
    alpha, sigma = schedule.alpha_sigma(t)
    return sigma / (alpha + sigma)


def off_straight(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """The inverse of `straight`: the schedule's t (B,) at which the noise ratio is that of u on the straight path."""
    return schedule.t_of_ratio(u / (1 - u))


def _norm(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 + sigma**2).sqrt()
