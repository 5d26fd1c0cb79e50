"""Any denoiser on another schedule: the same network, asked where the ratio of noise to signal is the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Prediction
from fewstep.sampling import Predictor
from fewstep.schedules import NoiseSchedule, like


@dataclass(frozen=True)
class Matched:
    """`denoiser` heard on `schedule`: sigma/alpha says where its own network is asked, the two norms how its input is scaled.

    x0 and eps are opinions about the same picture on every schedule, so they come back as they are, guided or not (guidance is
    affine in them). On TrigFlow, `Prediction.v` is sCM's F and `x0` is its f; on RectifiedFlow, `velocity` is the flow's field
    (SANA-Sprint, arXiv 2503.09641, section 3.1; Lee et al., arXiv 2405.20320, section 3.2). Differentiable in x and t."""

    denoiser: Predictor
    schedule: NoiseSchedule

    @cached_property
    def highest(self) -> float:
        """The t of this schedule where the denoiser's own ends; a hair below 1 where that is infinite noise."""
        alpha, sigma = self.denoiser.schedule.alpha_sigma(torch.ones(1, dtype=torch.float64))
        # One-sided derivatives at the very end of a table would be zero.
        return min(float(self.schedule.t_of_ratio(sigma / alpha)), 1.0) - 1e-9

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The prediction at x_t (B, C, *S) on this schedule and t (B,) in (0, highest]."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        own = self.denoiser.schedule
        t_own = own.t_of_ratio(sigma / alpha)
        found = self.denoiser(like(_norm(*own.alpha_sigma(t_own)) / _norm(alpha, sigma), x_t) * x_t, t_own, cond)
        return Prediction(found.x0, found.eps, like(alpha, found.x0), like(sigma, found.x0))


def _norm(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 + sigma**2).sqrt()
