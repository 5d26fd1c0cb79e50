"""Distribution matching distillation with a two-time-scale critic (DMD2, Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

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
    ida: what the critic keeps of its weights when the student has moved, the rest being the student's (SenseFlow, arXiv
    2506.00523: 0.97); 1 is all, which leaves the critic to its own turns.
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
    ida: float = 1.0

    def __post_init__(self) -> None:
        following(self.ida)

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",))

    def round(self, step: int) -> list[Turn]:
        student = Turn("student", self.student_loss, followers=following(self.ida))
        return [Turn("critic", self.critic_loss)] * self.critic_turns + [student]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """E[grad] = (sigma / alpha)^2 grad KL(student_t || teacher_t) (DMD, eq. 7), normalised a sample (eq. 8)."""
        x = simulate(nets, batch, rng).x0
        t = Uniform(self.low, self.high).sample(len(x), rng)
        real, fake = scored(nets, batch, x, t, rng)
        direction = normalised(fake - real, x, real, self.floor)
        return Losses({"dm": push(x, direction)}, statistics(x, direction), x)

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss of the critic on the student's samples, in the network's native target."""
        return learn(nets, batch, rng, self.critic_low)


@torch.no_grad()
def scored(nets: Nets, batch: Batch, x: Tensor, t: Tensor, rng: Stream) -> tuple[Tensor, Tensor]:
    """(the guided teacher's x0, the critic's x0) at a fresh noising of samples x (B, C, *S) to t (B,); no graph."""
    assert nets.critic is not None
    x_t = nets.student.schedule.add_noise(x, rng.normal_like(x), t)
    return nets.teacher(x_t, t, batch.cond).x0, nets.critic(x_t, t, batch.cond).x0


def learn(nets: Nets, batch: Batch, rng: Stream, low: float) -> Losses:
    """The critic's denoising loss on samples of the student's, at times in (low, 1]."""
    assert nets.critic is not None
    with torch.no_grad():
        x = simulate(nets, batch, rng).x0
    return denoise(nets.critic, batch, x, low, rng)


def statistics(x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """What to watch: the spread of the samples, and the mean size of the direction they are pushed in."""
    return {"x0_std": x.detach().std(), "direction": flat_mean(direction.abs()).mean()}


def following(ida: float) -> dict[str, float]:
    """Who follows the student, and by what share of the way, where the critic keeps `ida` of itself. Raises ValueError for what
    is no share."""
    if not 0 <= ida <= 1:
        raise ValueError(f"ida is the share of its weights that the critic keeps, in [0, 1] (1: all), not {ida}")
    return {"critic": 1 - ida} if ida < 1 else {}
