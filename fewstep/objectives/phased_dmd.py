"""Phased DMD: distribution matching within subintervals of the noise, an expert for each (arXiv 2510.27684)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from fewstep.losses import mse, normalised, push
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, full, register, simulate
from fewstep.objectives.ranges import at_least, positive
from fewstep.objectives.two_time_scale import scored, size
from fewstep.schedules import like
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("phased_dmd")
@final
@dataclass(frozen=True, kw_only=True)
class PhasedDMD(Objective):
    """The steps are shared out over phases, each with an expert of its own, learnt one after the other from noise to data.

    Phase k carries samples down to the level s where phase k + 1 begins, not to clean data, and is judged there: critic and
    guided teacher are compared above s, whither its samples x_s are brought by the exact forward law. Prompts only.

    steps, phases: of the deployed student; steps is a multiple of phases. phase_rounds: rounds of each phase; the last one takes
    all that are left. critic_turns: critic updates a student update. low, high: range of the re-noising time, as shares of the
    way from s to 1; critic_low: the same of the critic's; shift: of both to noise, see TwoTimeScale. floor: least normaliser.
    most: a critic's sample weighs min(1, most std^2 / sigma_t^2), std that of the law from s to t: its target's variance is
    sigma_t^2 / std^2.
    Earlier experts only draw: without a graph none of their weights moves, and their average tends to those very weights. The
    critic starts anew in every phase. With one phase this is `dmd` to the bit.
    The learning rate of a schedule falls over all rounds, not in each phase; constant is what suits several.
    Deviations from the paper: the direction is normalised a sample as in DMD (arXiv 2311.18828, eq. 8), in the place of the
    weight alpha_t scale / (alpha_t sigma_t + sigma_t^2); the clamped weight of the critic is relative to sigma_t^2.
    """

    steps: int = 4
    sampler: str | None = "ddim"
    phases: int = 2
    phase_rounds: int = 150
    critic_turns: int = 5
    low: float = 0.02
    high: float = 0.98
    critic_low: float = 0.001
    shift: float = 1.0
    floor: float = 1e-4
    most: float = 10.0

    def __post_init__(self) -> None:
        Uniform(self.low, self.high, self.shift)
        Uniform(self.critic_low, 1.0)
        at_least(1, critic_turns=self.critic_turns)
        positive(floor=self.floor, most=self.most)
        if self.phases < 1 or self.phase_rounds < 1 or self.steps % self.phases:
            raise ValueError(f"{self.steps} steps cannot be shared out over {self.phases} phases; choose a multiple")

    @property
    def needs(self) -> Needs:
        last = (self.phases - 1) * self.phase_rounds
        return Needs(roles=("critic",), phases=self.phases, restarts=("critic",) * (self.phases > 1), rounds=last + 1)

    def round(self, step: int) -> list[Turn]:
        phase = min(step // self.phase_rounds, self.phases - 1)
        begins = phase > 0 and step == phase * self.phase_rounds
        critic, student = partial(self.critic_loss, phase), partial(self.student_loss, phase)
        turns = [Turn("critic", critic, fresh=begins and i == 0) for i in range(self.critic_turns)]
        return [*turns, Turn("student", student)]

    def student_loss(self, phase: int, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """E[grad] = weighted grad KL(student_t || teacher_t) in x_s at levels t above s."""
        assert nets.critic is not None
        x_s, x0, s = self._arrive(phase, nets, batch, rng)
        level = float(s[0])
        t = Uniform(level + (1 - level) * self.low, level + (1 - level) * self.high, self.shift).sample(len(x0), rng)
        x_t = nets.student.schedule.forward_kernel(x_s, rng.normal_like(x_s), s, t)
        real, fake = scored(nets, batch, x_t, t)
        direction = normalised(fake - real, x0, real, self.floor)
        return Losses({"dm": push(x_s, direction)}, {"direction": size(direction)}, x0)

    def critic_loss(self, phase: int, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss above s on the student's x_s, with the target that is unbiased for any law of x_s."""
        critic, schedule = nets.critic, nets.student.schedule
        assert critic is not None
        with torch.no_grad():
            x_s, x0, s = self._arrive(phase, nets, batch, rng)
        level = float(s[0])
        t = Uniform(level + (1 - level) * self.critic_low, 1.0, self.shift).sample(len(x0), rng)
        noise = rng.normal_like(x_s)
        prediction = critic(schedule.forward_kernel(x_s, noise, s, t), t, batch.cond)
        loss = mse(critic.native(prediction, t), critic.aim(*schedule.kernel_target(x_s, noise, s, t), t))
        share = (schedule.kernel(s, t)[1] / schedule.alpha_sigma(t)[1]) ** 2
        weight = like((self.most * share).clamp(max=1.0), loss)
        linear = weight * critic.linear_loss(x_s, t, s).to(loss)
        return Losses({"denoise": weight * loss}, {"denoise_linear": linear.mean()}, x0)

    def _arrive(self, phase: int, nets: Nets, batch: Batch, rng: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """(x_s, x0, s): where the deployed step takes the student from a random step of the phase, the x0 it stood on, and s
        (B,), the level at which the next phase begins (0 after the last)."""
        each = len(nets.grid) // self.phases
        stop = (phase + 1) * each
        prediction = simulate(nets, batch, rng, range(phase * each, stop))
        x0 = prediction.x0
        s = full(nets.grid[stop] if stop < len(nets.grid) else 0.0, len(x0))
        return (x0 if stop == len(nets.grid) else nets.step(nets.student.schedule, prediction, s, rng)), x0, s
