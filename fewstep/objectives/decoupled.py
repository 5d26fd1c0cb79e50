"""Decoupled DMD: guidance and distribution matching as two terms, each at noise levels of its own (Z-Image team 2025,
arXiv 2511.22677)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.denoiser import Guided
from fewstep.losses import moments_kl, normalised, push
from fewstep.objectives.base import Batch, Losses, Nets, register, simulate_steps
from fewstep.objectives.ranges import at_least, positive
from fewstep.objectives.two_time_scale import TwoTimeScale, size
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("decoupled")
@final
@dataclass(frozen=True, kw_only=True)
class Decoupled(TwoTimeScale):
    """critic - guided teacher = (critic - teacher) - (w - 1) (teacher - teacher without prompt). The first, distribution matching
    (DM), is taken over the full range of times; the second, the augmentation by guidance (CA), which does the converting to few
    steps, only at times cleaner than the student's own. Each is divided by its own distance. Prompts only.

    w is `teacher.guidance`; a teacher that is not guided gives the first term alone. steps: of the deployed student.
    matching: weight of DM. moments: weight of a milder shield against what CA overdoes, the divergence of each sample's mean and
    spread from `mean` and `std`, those of clean latents. low, high: the full range; CA ends at
    the student's time where that is less. floor: least normaliser. critic_turns, critic_low, shift, ida: see TwoTimeScale.
    Deviation: the paper's normaliser could not be checked; here each term's is the mean distance to the unguided teacher there.
    """

    steps: int = 4
    sampler: str | None = None
    matching: float = 1.0
    moments: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    floor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(floor=self.floor, std=self.std)
        at_least(0, matching=self.matching, moments=self.moments)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """(f_fake - f_c) / N at t_DM, minus (w - 1) (f_c - f_u) / N at t_CA <= the student's time, each at noise of its own."""
        start, prediction = simulate_steps(nets, batch, rng)
        x, schedule = prediction.x0, nets.student.schedule
        t = self.times.sample(len(x), rng)
        x_t = schedule.add_noise(x, rng.normal_like(x), t)  # with the student's graph, so that heads may judge it, too
        with torch.no_grad():
            direction = self.matching * matching(nets, batch, x, x_t, t, self.floor)
            stats = {"direction": size(direction)}
            if isinstance(nets.teacher, Guided) and nets.teacher.scale != 1:
                t = self.below(nets.level(start), rng)
                x_t = schedule.add_noise(x, rng.normal_like(x), t)
                more = augmentation(nets.teacher, batch, x, x_t, t, self.floor)
                stats["augmentation"] = size(more)
                direction = direction + more
        terms = {"dm": push(x, direction)}
        if self.moments:
            terms["moments"] = self.moments * moments_kl(x, self.mean, self.std)
        return Losses(terms, stats, x)

    def below(self, start: Tensor, rng: Stream) -> Tensor:
        """CA's times (B,), each no noisier than the student's own input at `start` (B,)."""
        low, high = (start / 2).clamp(max=self.low), start.clamp(max=self.high)
        return low + (high - low) * Uniform(shift=self.shift).sample(len(start), rng)


def matching(nets: Nets, batch: Batch, x: Tensor, x_t: Tensor, t: Tensor, floor: float) -> Tensor:
    """(critic - unguided teacher) / the mean distance of x to the latter, at x_t (B, C, *S)."""
    assert nets.critic is not None
    plain = nets.teacher.denoiser if isinstance(nets.teacher, Guided) else nets.teacher
    real = plain(x_t, t, batch.cond).x0
    return normalised(nets.critic(x_t, t, batch.cond).x0 - real, x, real, floor)


def augmentation(teacher: Guided, batch: Batch, x: Tensor, x_t: Tensor, t: Tensor, floor: float) -> Tensor:
    """(teacher - guided teacher) / the mean distance of x to the former, at x_t: -(w - 1) (teacher - teacher without prompt) but
    for families that renorm what guidance makes. No critic is asked."""
    c, u = teacher.both(x_t, t, batch.cond)
    return normalised(c.x0 - teacher.mixed(x_t, t, c, u).x0, x, c.x0, floor)
