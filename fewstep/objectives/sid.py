"""Score identity distillation (SiD, arXiv 2404.04057), with long and short guidance (SiD-LSG, arXiv 2406.01561) and few steps
(arXiv 2505.12674)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.losses import distance, flat_mean
from fewstep.objectives.base import Batch, Losses, Needs, Nets, denoise, register, simulate
from fewstep.objectives.ranges import part, positive
from fewstep.objectives.two_time_scale import TwoTimeScale, size
from fewstep.stream import Stream


@register("sid")
@final
@dataclass(frozen=True, kw_only=True)
class SiD(TwoTimeScale):
    """The student lowers the squared difference of two scores at noised samples of its own, the teacher's minus the critic's, by
    a gradient that passes through the inputs of both networks. Prompts only.

    steps: of the deployed student; each of them draws from one law in the end, so a round trains one of them, chosen evenly, and
    the critic, which is not told the step, knows the mixture. alpha: how much of the square is taken off again; 1/2 gives half of
    the square's own gradient where the critic is at its optimum, 1.2 is SiD's choice for small pictures, 1 that of LSG.
    kappa1..4: guidance of the critic in its own turn, of the critic in the score difference, of the critic as denoiser of the
    sample, and of the teacher (None: `teacher.guidance`). (1, 1, 1, None) guides the teacher alone; (k, k, k, k) is "long and
    short" (k 1.5 for variety, 4.5 for adherence); kappa1-3 = 0 with kappa4 = 1 is Zero-CFG, whose critic never reads a prompt;
    kappa1-3 below 0 with kappa4 = 1 is Anti-CFG. dropout: share of prompts left out in the critic's turn, where it is guided.
    floor: least normaliser. The other settings are those of TwoTimeScale.
    Deviations: 5 critic turns where SiD, with batches of 256 to 8192, does with 1; a one-step student starts from unit noise at
    the deployed time (LSG: 0.625, noise scaled by its sigma); steps are joined as they are deployed, with fresh noise only where
    the sampler puts it; means over a sample in the place of sums; the critic's time is in (critic_low, 1] as for dmd,
    with an unweighted loss in its native target.
    """

    steps: int = 4
    sampler: str | None = None
    alpha: float = 1.0
    kappa1: float = 1.0
    kappa2: float = 1.0
    kappa3: float = 1.0
    kappa4: float | None = None
    dropout: float = 0.1
    floor: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(floor=self.floor)
        part("prompts", dropout=self.dropout)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, mixes=not self.audible or self.kappa4 is not None)

    @property
    def audible(self) -> bool:
        return (self.kappa1, self.kappa2, self.kappa3) == (1, 1, 1)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """delta ((f_real - x) - alpha delta) with delta = f_real - f_fake; where kappa2 and kappa3 differ, f_real - x is delta
        and the other critic's f_fake - x. At the critic's optimum it averages (1 - alpha) E[delta^2]: 0 for alpha = 1."""
        x, x_t, t = self.noised(nets, batch, rng)
        teacher = nets.teacher
        if self.kappa4 is not None:
            assert isinstance(teacher, Guided)
            teacher = replace(teacher, scale=self.kappa4)
        real = teacher(x_t, t, batch.cond).x0
        short, long = self._fakes(nets, x_t, t, batch.cond)
        delta = real - short
        loss = flat_mean(delta * ((1 - self.alpha) * delta + (long - x))) / distance(x, real, self.floor)
        return Losses({"sid": loss}, {"delta": size(delta)}, x)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss on the student's samples, of the critic as guided by kappa1."""
        with torch.no_grad():
            x = simulate(nets, batch, rng).x0
        if not self.audible:
            keep = rng.uniform(len(x)) >= self.dropout
            batch = replace(batch, cond=batch.cond.where(keep, _as_teacher(nets, 0).null.expand(len(x))))
        assert nets.critic is not None
        return denoise(nets.critic, batch, x, self.critic_times, rng, by=_guided(nets, self.kappa1))

    def _fakes(self, nets: Nets, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The critic's x0 under kappa2 and under kappa3, from one call."""
        if self.kappa2 == self.kappa3:
            x0 = _guided(nets, self.kappa2)(x_t, t, cond).x0
            return x0, x0
        short, long = (_as_teacher(nets, kappa) for kappa in (self.kappa2, self.kappa3))
        c, u = short.both(x_t, t, cond)
        return short.mixed(x_t, t, c, u).x0, long.mixed(x_t, t, c, u).x0


def _guided(nets: Nets, kappa: float) -> Denoiser | Guided:
    """The critic, under guidance where kappa is some."""
    assert nets.critic is not None
    return nets.critic if kappa == 1 else _as_teacher(nets, kappa)


def _as_teacher(nets: Nets, kappa: float) -> Guided:
    """The critic under guidance, with the null condition and the renorm of the teacher's."""
    assert nets.critic is not None and isinstance(nets.teacher, Guided), "kappas were refused for a teacher that is fed its scale"
    return replace(nets.teacher, denoiser=nets.critic, scale=kappa)
