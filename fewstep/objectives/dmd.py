"""Distribution matching distillation with a two-time-scale critic (DMD2, Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from fewstep.losses import flat_mean, normalised, push
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, denoise, register, simulate
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("dmd")
@final
@dataclass(frozen=True, kw_only=True)
class DMD(Objective):
    """The student follows the difference of two scores at noised samples of its own: the critic's (what it draws) minus the
    guided teacher's (what it should draw). Prompts only.

    steps: of the deployed student. critic_turns: critic updates a student update (DMD2: 5; 10 for SD1.5).
    low, high: range of the re-noising time (20..980 of 1000). floor: least normaliser.
    Deviations from the paper: critic turns come first and draw their own samples instead of reusing the student's; the
    critic's time is continuous in (critic_low, 1]; the normaliser has a floor where the reference code relies on nan_to_num.
    """

    steps: int = 4
    sampler: str | None = None
    critic_turns: int = 5
    low: float = 0.02
    high: float = 0.98
    critic_low: float = 0.001
    floor: float = 1e-4

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",))

    def round(self, step: int) -> list[Turn]:
        return [Turn("critic", self.critic_loss)] * self.critic_turns + [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """E[grad] = sigma^2-weighted grad KL(student_t || teacher_t) (DMD, eq. 7), normalised a sample (eq. 8)."""
        assert nets.critic is not None
        x = simulate(nets, batch, rng).x0
        t = Uniform(self.low, self.high).sample(len(x), rng)
        with torch.no_grad():
            x_t = nets.student.schedule.add_noise(x.detach(), rng.normal_like(x), t)
            real, fake = nets.teacher(x_t, t, batch.cond), nets.critic(x_t, t, batch.cond)
            direction = normalised(fake.x0 - real.x0, x, real.x0, self.floor)
        stats = {"x0_std": x.detach().std(), "direction": flat_mean(direction.abs()).mean()}
        return Losses({"dm": push(x, direction)}, stats, x)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss of the critic on the student's samples, in the network's native target."""
        assert nets.critic is not None
        with torch.no_grad():
            x = simulate(nets, batch, rng).x0
        return denoise(nets.critic, batch, x, self.critic_low, rng)
