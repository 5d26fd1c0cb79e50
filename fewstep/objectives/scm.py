"""Continuous-time consistency, simplified and stabilised (sCM, Lu and Song 2024, arXiv 2410.11081), from any teacher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.losses import flat_mean, push, unit
from fewstep.matched import Matched
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, register
from fewstep.objectives.grids import scales
from fewstep.objectives.ranges import at_least, check_scales, part, positive
from fewstep.schedules import TrigFlow, like
from fewstep.stream import Stream
from fewstep.tangents import DERIVATIVES, Derivative
from fewstep.times import LogNormal

TRIG = TrigFlow()
ANGLE = torch.pi / 2  # the angle at TrigFlow's t = 1


@register("scm")
@final
@dataclass(frozen=True, kw_only=True)
class SCM(Objective):
    """Along the teacher's trajectory the student's x0 must not change: its field F is pushed along cos u df/du, the limit of
    discrete consistency for vanishing steps (equations 6 to 8, section 4). Any schedule, by matching noise ratios to TrigFlow.

    mean, std: of ln(sigma / alpha) in training (the paper's -1.0, 1.4 at a data deviation of 0.5 are -0.3, 1.4 at 1, which
    latents are taken to have). warmup: rounds over which the tangent's second half is let in (paper: 10,000 of 400,000).
    floor: c of the tangent normalisation. weighting: adaptive has a role of that name learn the log-weights w(t) under which the
    loss has one size at every level; none is w = 0, which it is near after normalisation (rCM, arXiv 2510.08431). noise_share:
    share of samples put at the noise end, where this loss does not ask: for an adversarial wrapper (SANA-Sprint's max-time
    weighting, arXiv 2503.09641). guidance: range of the scales that SANA-Sprint draws, guides the teacher at and feeds to the
    student's network, which needs full weights (None: the teacher's one scale, nothing fed). derivative: jvp, or difference for
    kernels without forward differentiation. Images (latents) are needed.
    Deviations: half the paper's loss; w is linear in waves of t, not in the student's own time embedding, and not asked where
    nothing pushes, at the noise end and in masked rows (see `tangent`), where it would rise for ever; the norm is a root mean
    square, so that floor means the same at every resolution; scales are uniform in their range, not among three (SANA-Sprint),
    and its fresh draw of times for its adversarial half is the same draw here.
    """

    steps: int = 2
    sampler: str | None = None
    mean: float = -0.3
    std: float = 1.4
    warmup: int = 100
    floor: float = 0.1
    weighting: Literal["adaptive", "none"] = "adaptive"
    noise_share: float = 0.0
    guidance: tuple[float, float] | None = None
    derivative: Literal["jvp", "difference"] = "jvp"

    def __post_init__(self) -> None:
        LogNormal(self.mean, self.std)
        at_least(0, warmup=self.warmup)
        positive(floor=self.floor)
        check_scales(self.guidance)
        part("samples", noise_share=self.noise_share)

    @property
    def needs(self) -> Needs:
        told = ("guidance_scale",) if self.guidance else ()
        return Needs(roles=self._others, images=True, inputs=told, scales=self.guidance, rounds=max(1, self.warmup))

    @property
    def _others(self) -> tuple[str, ...]:
        return ("weighting",) if self.weighting == "adaptive" else ()

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("renoise",)  # x0 is a sample at every time, and no point of a trajectory

    def round(self, step: int) -> list[Turn]:
        loss = partial(self.student_loss, warm=min(1.0, (step + 1) / max(1, self.warmup)))
        return [Turn("student", loss, self._others, sample=self.sample)]

    def student_loss(self, nets: Nets, batch: Batch, rng: Stream, warm: float = 1.0) -> Losses:
        """(e^w |F - sg(F + tangent)|^2 - w) / 2 in two terms, whose gradient in F is -e^w tangent (half of equation 8)."""
        x_t, t, scale, resting = self._start(nets, batch, rng)
        g, stats = tangent(nets, batch, x_t, t, warm, DERIVATIVES[self.derivative], scale)
        prediction = Matched(nets.student, TRIG)(x_t, t, batch.cond, g=scale)
        # At the noise end cos is 0 on a flow alone: a table of a VP teacher ends above it, and would push there.
        resting = resting.to(g.device)
        loss = torch.where(resting, 0.0, push(prediction.v, -unit(g, self.floor)))
        if self.weighting == "none":
            return Losses({"scm": loss}, stats, prediction.x0)
        assert nets.weighting is not None
        pushed = g.flatten(1).any(1) & ~resting
        w = torch.where(pushed, nets.weighting(t), 0.0)
        return Losses({"scm": w.exp() * loss, "weighting": -w / 2}, stats | {"weight": w.exp().mean()}, prediction.x0)

    def sample(self, nets: Nets, batch: Batch, rng: Stream) -> Tensor:
        """The student's x0 at the places where `student_loss` would take its tangent."""
        x_t, t, scale, _ = self._start(nets, batch, rng)
        return Matched(nets.student, TRIG)(x_t, t, batch.cond, g=scale).x0

    def _start(self, nets: Nets, batch: Batch, rng: Stream) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(x_t on TrigFlow, its times (B,), the scales that are fed, whether each was put at the noise end (B,))."""
        assert batch.latents is not None
        n, student = len(batch.latents), Matched(nets.student, TRIG)
        t, scale = times(LogNormal(self.mean, self.std), n, rng, student), scales(self.guidance, n, rng)
        resting = rng.uniform(n) < self.noise_share
        t = torch.where(resting, student.highest, t)
        return TRIG.add_noise(batch.latents, rng.normal_like(batch.latents), t), t, scale, resting


def times(law: LogNormal, n: int, rng: Stream, student: Matched) -> Tensor:
    """Times of TrigFlow (n,) between the lowest level of a table of a thousand and the student's own noise end."""
    return law.sample(n, rng, TRIG).clamp(student.lowest, student.highest)


def tangent(
    nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, warm: float, derivative: Derivative, scale: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-cos^2 (F - dx/du) - warm cos sin (x_t + dF/du) at x_t on TrigFlow, where dx/du is the guided teacher's F; no graph.

    With warm = 1 this is cos u df/du of f = cos u x - sin u F along the teacher's trajectory (sCM, section 4.1). The
    derivative is taken along cos sin (dx/du, 1), which stays bounded towards the noise end ("JVP rearrangement"). scale: of
    guidance (B,), for a student that is fed it. Rows that are not finite are zero, which is no push, and counted as `masked`
    (rCM, arXiv 2510.08431); where none is finite all stay as they are, for the trainer to skip and to stop at."""
    student, teacher = Matched(nets.student, TRIG), Matched(nets.teacher, TRIG)

    def field(x: Tensor, at: Tensor) -> Tensor:
        return student(x, at, batch.cond, g=scale).v

    with torch.no_grad():
        velocity = teacher(x_t, t, batch.cond, g=scale).v
        cos, sin = (like(c, x_t) for c in TRIG.alpha_sigma(t))
        rate = torch.cos(t * ANGLE) * torch.sin(t * ANGLE)
        f, slope = derivative(field, x_t, t, cos * sin * velocity, rate / ANGLE)
        g = -(cos**2) * (f - velocity) - warm * (cos * sin * x_t + slope)
        whole = g.isfinite().flatten(1).all(1)
        kept = whole | ~whole.any()
        sizes = {"tangent": flat_mean(g.square()).sqrt(), "velocity_gap": flat_mean((f - velocity).square())}
        stats = {name: torch.where(kept, size, 0.0).sum() / kept.sum() for name, size in sizes.items()}
        return torch.where(like(kept, g).bool(), g, 0.0), stats | {"masked": (~kept).sum()}
