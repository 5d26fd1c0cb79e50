"""TwinFlow: one network is generator, real and fake score, told apart by the sign of a time (arXiv 2512.05150)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.denoiser import Cond
from fewstep.losses import mse, push
from fewstep.matched import Matched
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, full, register
from fewstep.objectives.meanflow import FLOW
from fewstep.objectives.ranges import part
from fewstep.objectives.rcgm import check_order, jumps
from fewstep.stream import Stream


@register("twinflow")
@final
@dataclass(frozen=True, kw_only=True)
class TwinFlow(Objective):
    """The student learns jumps as in `rcgm`, and besides, told the end -t, the velocity at t of the flow to its own one-step
    samples. The difference of that fake velocity and its own at t, told the end t, moves those samples to where the real flow
    goes: distribution matching (DMD) without a critic, heads or a second network.

    order, delta, average: as in `rcgm`. fake, rectify: weights of the two terms. The student's network is fed the jump's end and
    needs full weights. Any schedule, by matching noise ratios to the straight path. Images (latents) are needed.
    Deviations: those of `rcgm`; the negative end alone says which flow is asked, where the paper's network is fed -t as its time,
    too; a batch is not cut into four, but all of it jumps and as many samples are drawn from noise; fake
    and real velocity are compared where the fake one is learned, which saves a pass. Two gradients are not brought to one size
    for each sample: that of the fake velocity, whose optimum is then the mean that the comparison wants, and that of the
    comparison, which so vanishes with the difference (of about 0.25; hence its weight is not the paper's 0.5).
    """

    steps: int = 1
    sampler: str | None = "ddim"
    order: int = 2
    delta: float = 0.01
    average: float | None = 0.99
    fake: float = 1.0
    rectify: float = 2.0

    def __post_init__(self) -> None:
        check_order(self.order, self.delta)
        part("the average's weights", average=self.average)
        if self.fake <= 0 or self.rectify <= 0:
            raise ValueError("fake and rectify are positive weights; without these terms the objective is rcgm")

    @property
    def needs(self) -> Needs:
        return Needs(images=True, inputs=("end_time",), average=self.average)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # a student that is told the end of its jump goes there itself

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """Of the jumps, of the fake flow, and of the samples, whose velocity F has the gradient fake - real: scores differ by
        -alpha / sigma times as much, and dx / dF is negative, so that it is DMD's gradient in x times a positive number."""
        jumped, stats, _ = jumps(nets, batch, rng, self.order, self.delta)
        n, noise = batch.shape[0], nets.student.schedule.prior(rng.normal(batch.shape))
        drawn = nets.student(noise, full(1.0, n), batch.cond, r=full(0.0, n))
        learned, direction = twins(Matched(nets.student, FLOW), drawn.x0.detach(), batch.cond, rng)
        terms = {
            "rcgm": jumped,
            "fake": self.fake * learned,
            "rectify": self.rectify * push(drawn.velocity, direction),
        }
        return Losses(terms, {**stats, "twins_apart": direction.abs().mean()}, drawn.x0)


def twins(student: Matched, x: Tensor, cond: Cond, rng: Stream) -> tuple[Tensor, Tensor]:
    """(the loss (B,) of the fake velocity at noised samples x (B, C, *S), without a graph the fake velocity less the real one
    there, within +-1)."""
    t = student.lowest + (student.highest - student.lowest) * rng.uniform(len(x))
    eps = rng.normal_like(x)
    x_t = FLOW.add_noise(x, eps, t)
    fake = student(x_t, t, cond, r=-t).velocity
    with torch.no_grad():
        real = student(x_t, t, cond, r=t).velocity
    return mse(fake, eps - x), (fake.detach() - real).clamp(-1, 1)
