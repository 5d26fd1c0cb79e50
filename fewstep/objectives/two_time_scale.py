"""The game of most distribution matching: a critic that learns what the student draws, in more turns than the student has (the
two-time-scale update rule of DMD2, Yin et al. 2024, arXiv 2405.14867, section 4.2)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.losses import flat_mean
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, denoise, simulate
from fewstep.stream import Stream
from fewstep.times import Uniform


@dataclass(frozen=True, kw_only=True)
class TwoTimeScale(Objective):
    """A round is critic_turns updates of the critic, then one of the student.

    critic_turns: critic updates a student update. low, high: range of the re-noising time of the student's loss; critic_low: the
    critic's own is in (critic_low, 1]. shift: k, which moves both towards noise by k u / (1 + (k - 1) u); 1 is uniform (DMD2);
    for flow models 5 in Self Forcing, 7 in LightX2V, 8 in CausVid.
    ida: what the critic keeps of its weights when the student has moved, the rest being the student's (SenseFlow, arXiv
    2506.00523: 0.97); 1 is all, which leaves the critic to its own turns, and is needed where their weights differ in kind.
    Raises ValueError for what is no range, no share or no number of turns.
    """

    critic_turns: int = 5
    low: float = 0.02
    high: float = 0.98
    critic_low: float = 0.001
    shift: float = 1.0
    ida: float = 1.0

    def __post_init__(self) -> None:
        _ = self.times, self.critic_times  # they raise for what is no range
        if self.critic_turns < 1:
            raise ValueError(f"critic_turns must be at least 1, not {self.critic_turns}: a critic that never learns misleads")
        if not 0 <= self.ida <= 1:
            raise ValueError(f"ida is the share of its weights that the critic keeps, in [0, 1] (1: all), not {self.ida}")

    @property
    def needs(self) -> Needs:
        return Needs(roles=("critic",))

    @property
    def walks(self) -> bool:
        return True

    @property
    def times(self) -> Uniform:
        """Where the student's samples are compared."""
        return Uniform(self.low, self.high, self.shift)

    @property
    def critic_times(self) -> Uniform:
        """Where the critic learns."""
        return Uniform(self.critic_low, 1.0, self.shift)

    @property
    def apprentices(self) -> tuple[str, ...]:
        """Who learns beside the critic, from the same loss."""
        return ()

    def round(self, step: int) -> list[Turn]:
        followers = {"critic": 1 - self.ida} if self.ida < 1 else {}
        critic = Turn("critic", self.critic_loss, self.apprentices)
        return [critic] * self.critic_turns + [Turn("student", self.student_loss, followers=followers)]

    @abstractmethod
    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """What the student lowers."""

    def critic_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Denoising loss of the critic on the student's samples, in the network's native target."""
        assert nets.critic is not None
        with torch.no_grad():
            x = simulate(nets, batch, rng).x0
        return denoise(nets.critic, batch, x, self.critic_times, rng)

    def noised(self, nets: Nets, batch: Batch, rng: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """(x, x_t, t): a sample of the student's and what noise makes of it at `times`, both with the student's graph."""
        x = simulate(nets, batch, rng).x0
        t = self.times.sample(len(x), rng)
        return x, nets.student.schedule.add_noise(x, rng.normal_like(x), t), t


@torch.no_grad()
def scored(nets: Nets, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(the guided teacher's x0, the critic's x0) at x_t (B, C, *S), without a graph."""
    assert nets.critic is not None
    return nets.teacher(x_t, t, batch.cond).x0, nets.critic(x_t, t, batch.cond).x0


def size(difference: Tensor) -> Tensor:
    """The mean size of what pushes the student, to be watched where a loss itself says little."""
    return flat_mean(difference.detach().abs()).mean()
