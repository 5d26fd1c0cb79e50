"""SlimFlow: a student that is smaller than its teacher, first a straightened flow, then one step (arXiv 2407.12718)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.matched import off_straight, straight
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.ranges import at_least
from fewstep.objectives.reflow import huber, straight_line, walked
from fewstep.sampling import ddim
from fewstep.stream import Stream
from fewstep.times import UShaped


@register("annealed_reflow")
@final
@dataclass(frozen=True, kw_only=True)
class AnnealedReflow(Objective):
    """`reflow` for a student of another shape (student.network): a sample's noise is at first any, as when a flow is learned
    from scratch, and becomes its own, sqrt(1 - b^2) own + b fresh with b falling from 1 to 0 (Annealing Reflow).

    anneal: rounds in which b falls, in a straight line; then it is `reflow`. slope, huber: as there. Teacher pairs (data.pairs)
    are needed. Deviations: times are U-shaped, as in `reflow`, not uniform; the student starts from a part of its teacher's
    weights (see `slim.body`), not from random ones.
    """

    draws: ClassVar[bool] = False
    asks: ClassVar[int] = 0
    steps: int = 2
    sampler: str | None = None
    anneal: int = 100
    slope: float = 4.0
    huber: float = 0.03

    def __post_init__(self) -> None:
        UShaped(self.slope)
        at_least(0, huber=self.huber)
        if self.anneal < 1:
            raise ValueError(f"anneal counts rounds, at least 1, not {self.anneal}; without them the objective is reflow")

    @property
    def needs(self) -> Needs:
        return Needs(pairs=True, rounds=self.anneal + 1)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # what is learned is a velocity

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", partial(self.student_loss, fresh=max(0.0, 1 - step / self.anneal)))]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream, fresh: float = 0.0) -> Losses:
        """The loss of `reflow` to a noise of which `fresh`, b, in [0, 1] is not the pair's."""
        assert batch.noise is not None
        own = (1 - fresh**2) ** 0.5
        noise = own * batch.noise + fresh * rng.normal_like(batch.noise)
        term, sample = straight_line(nets, batch, noise, self.slope, self.huber, rng)
        return Losses({"reflow": term}, {"fresh_noise": sample.new_tensor(fresh)}, sample)


@register("flow_guided")
@final
@dataclass(frozen=True, kw_only=True)
class FlowGuided(Objective):
    """From a noise the student lands in one step where the first teacher landed (the pair), and where two steps of the one that
    teaches it land: a straightened flow of its own size, so best the student before (teacher: previous), whose two steps are near
    its many and cost little (Flow-Guided Distillation).

    guide: weight of the second. huber: c of sqrt(|d|^2 + c^2) - c with |d| the root mean square of a sample's error. With several
    steps one of them is taught, behind the student's own. Teacher pairs (data.pairs) are needed, of the first teacher whoever
    teaches. Any schedule: the two steps meet between 1/5 and 4/5 of the straight path, as in the authors' code. Deviations: the
    distance is not perceptual (LPIPS), since latents have no such network; the guiding steps start from the pairs' noise, not
    from another, which saves a pass.
    """

    steps: int = 1
    sampler: str | None = None
    guide: float = 1.0
    huber: float = 0.03

    def __post_init__(self) -> None:
        at_least(0, huber=self.huber)
        if self.guide <= 0:
            raise ValueError(f"guide is a positive weight, not {self.guide}; without it the objective is regression")

    @property
    def needs(self) -> Needs:
        return Needs(pairs=True, originals=True)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("ddim",)  # as `walked` goes

    @property
    def walks(self) -> bool:
        return True

    def round(self, step: int) -> list[Turn]:
        return [Turn("student", self.student_loss)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """d(x0, the pair's sample) + guide d(x0, sg where the teacher's two steps land)."""
        assert batch.latents is not None
        x, t = walked(nets, batch, rng)
        begins = nets.level(t)
        goal = two_steps(nets.teacher, x, begins, batch.cond, 0.2 + 0.6 * rng.uniform(len(x)), rng)
        x0 = nets.student(x, t, batch.cond).x0
        terms = {"regression": huber(x0, batch.latents, self.huber), "guide": self.guide * huber(x0, goal, self.huber)}
        return Losses(terms, {}, x0)


@torch.no_grad()
def two_steps(teacher: Denoiser | Guided, x: Tensor, t: Tensor, cond: Cond, share: Tensor, rng: Stream) -> Tensor:
    """Where a step from x (B, C, *S) at t to a `share` (B,) of its time on the straight path, and one from there, land."""
    u = share * straight(teacher.schedule, t)
    m = off_straight(teacher.schedule, u)
    return teacher(ddim(teacher.schedule, teacher(x, t, cond), m, rng).to(x.dtype), m, cond).x0
