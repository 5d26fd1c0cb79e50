"""Variational score distillation with a guided critic: SwiftBrush (Nguyen and Tran 2023, arXiv 2312.05239) and SNOOPI's random
guidance, PG-SB (arXiv 2412.02687)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fewstep.denoiser import TARGETS, Denoiser, Guided, linear_loss
from fewstep.losses import mse, push
from fewstep.objectives.base import Batch, Losses, Needs, Nets, register, simulate
from fewstep.objectives.ranges import part
from fewstep.objectives.two_time_scale import TwoTimeScale, size
from fewstep.stream import Stream


@register("vsd")
@final
@dataclass(frozen=True, kw_only=True)
class VSD(TwoTimeScale):
    """The student follows sigma^2 (eps_teacher - eps_critic), both under the same guidance, without a normaliser. Prompts only;
    the critic is meant to be an adapter on the teacher (critic: {weights: lora}).

    steps: of the deployed student. kappa: range that the guidance of both is drawn from, one number a turn (PG-SB: [0.5, 4] for
    SD, [0.5, 3] for PixArt); None: `teacher.guidance` throughout (SwiftBrush: 4.5). A teacher without guidance goes unguided.
    dropout: share of prompts left out in the critic's turns, since it is asked without one, too. The other settings are those of
    TwoTimeScale.
    Deviations: five critic turns, not one, which would need a critic_lr far above the student's (SwiftBrush: 1e-3 and 1e-6); the
    critic comes first; its time is continuous in (critic_low, 1].
    """

    audible: ClassVar[bool] = False
    steps: int = 1
    sampler: str | None = None
    kappa: tuple[float, float] | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa is not None and not self.kappa[0] <= self.kappa[1]:
            raise ValueError(f"kappa is a range [low, high] of guidance, as in kappa: [0.5, 4.0], not {list(self.kappa)}")
        part("prompts", dropout=self.dropout)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, mixes=self.kappa is not None)

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """sigma^2 (eps_teacher - eps_critic) = alpha sigma (x0_critic - x0_teacher): alpha sigma times `diff_instruct`'s."""
        x, x_t, t = self.noised(nets, batch, rng)
        teacher, critic = self.guided(nets, rng)
        with torch.no_grad():
            real, fake = teacher(x_t, t, batch.cond), critic(x_t, t, batch.cond)
            direction = real.sigma.square() * (real.eps - fake.eps)
        return Losses({"dm": push(x, direction)}, {"direction": size(direction)}, x)

    def guided(self, nets: Nets, rng: Stream) -> tuple[Denoiser | Guided, Denoiser | Guided]:
        """Teacher and critic under one guidance, on which all processes agree."""
        assert nets.critic is not None
        if not isinstance(nets.teacher, Guided):
            return nets.teacher, nets.critic
        scale = nets.teacher.scale
        if self.kappa is not None:
            least, most = self.kappa
            scale = least + (most - least) * float(rng.shared.uniform(1))
        teacher = replace(nets.teacher, scale=scale)
        return teacher, replace(teacher, denoiser=nets.critic)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """alpha^2 (eps - critic's)^2 on the student's samples, some without their prompt (SwiftBrush's code)."""
        assert nets.critic is not None
        with torch.no_grad():
            x = simulate(nets, batch, rng).x0
        cond = batch.cond
        if isinstance(nets.teacher, Guided):
            cond = cond.where(rng.uniform(len(x)) >= self.dropout, nets.teacher.null.expand(len(x)))
        t = self.critic_times.sample(len(x), rng)
        eps = rng.normal_like(x)
        prediction = nets.critic(nets.critic.schedule.add_noise(x, eps, t), t, cond)
        weight = prediction.alpha.square().flatten()
        alpha, sigma = nets.critic.schedule.alpha_sigma(t)
        linear = weight * linear_loss(x, alpha, sigma, *TARGETS["epsilon"](alpha, sigma))
        return Losses({"denoise": weight * mse(prediction.eps, eps)}, {"denoise_linear": linear.mean()}, x)
