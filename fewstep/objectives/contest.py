"""Real against fake before discriminator heads: what they see, what they lose, and what holds their slope."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoiser import Cond, Denoiser, Prediction, cat
from fewstep.heads import Point
from fewstep.losses import Contest, flat_mean, gradient_penalty, health, jitter_penalty
from fewstep.objectives.base import Batch, Judge, Losses, Nets, Turn, simulate
from fewstep.stream import Stream


@dataclass(frozen=True)
class View:
    """What heads are shown, x_t (B, C, *S) at t (B,), and the logits (B, K) where a pass has given them already."""

    x_t: Tensor
    t: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Overheard(Denoiser):
    """The denoiser that a judge listens to, its passes judged on the way: one pass gives the score and the features.

    cond: only passes under these very conditions count; in others prompts are left out, which would tell fake from real."""

    judge: Judge
    cond: Cond

    @classmethod
    def of(cls, denoiser: Denoiser, judge: Judge, cond: Cond) -> Overheard:
        return cls(**{f.name: getattr(denoiser, f.name) for f in fields(denoiser)}, judge=judge, cond=cond)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, *, g: Tensor | None = None, r: Tensor | None = None) -> Prediction:
        otherwise = g is not None or r is not None or cond is not self.cond
        graph = torch.is_grad_enabled()
        if otherwise or not (graph or x_t.requires_grad):  # a network asked otherwise, or about what nobody can change
            return super().__call__(x_t, t, cond, g=g, r=r)
        with torch.enable_grad():
            return self.judge.both(x_t, t, cond, graph=graph)[0]


@dataclass(frozen=True)
class Listening:
    """A judge that keeps what it has said of samples under these conditions, for whoever asks the same afterwards."""

    judge: Judge
    cond: Cond
    views: list[View] = field(default_factory=list)

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.judge.logits(x_t, t, cond)

    def beside(self, points: Sequence[Point], origin: Point | None, cond: Cond) -> list[Tensor]:
        return self.judge.beside(points, origin, cond)

    def both(self, x_t: Tensor, t: Tensor, cond: Cond, *, graph: bool = True) -> tuple[Prediction, Tensor]:
        prediction, logits = self.judge.both(x_t, t, cond, graph=graph)
        if cond is self.cond:
            self.views.append(View(x_t, t, logits))
        return prediction, logits


def overheard(turn: Turn, nets: Nets, batch: Batch, rng: Stream, shares: bool) -> tuple[Losses, View | None]:
    """A turn's losses, and its critic's pass, judged on the way, where that is shared and there is exactly one with a graph."""
    if nets.critic is None or not shares:
        return turn.loss(nets, batch, rng), None
    assert nets.judge is not None
    judge = Listening(nets.judge, batch.cond)  # the critic's passes go through it, and what an objective reads a ratio off
    critic = Overheard.of(nets.critic, judge, batch.cond)
    losses = turn.loss(replace(nets, critic=critic, judge=judge), batch, rng)
    return losses, judge.views[0] if len(judge.views) == 1 else None


@torch.no_grad()
def drawn(student: Turn, draws: bool, nets: Nets, batch: Batch, rng: Stream) -> Tensor:
    """What heads would be shown in the student's turn, without its targets where the turn can do so. draws: see `Objective`."""
    rng = rng.child("sample")
    if not draws:
        return walked(nets, batch, rng)
    sample = student.sample(nets, batch, rng) if student.sample else student.loss(nets, batch, rng).sample
    assert sample is not None, "an objective hands on its student's sample"
    return sample


def walked(nets: Nets, batch: Batch, rng: Stream) -> Tensor:
    """A sample of the student's deployed walk, of whose steps the last has a graph."""
    last = len(nets.grid) - 1
    return simulate(nets, batch, rng, range(last, last + 1)).x0


def noised(nets: Nets, x: Tensor, t: Tensor, rng: Stream) -> View:
    """x (B, C, *S) noised afresh to t (B,)."""
    return View(nets.student.schedule.add_noise(x, rng.normal_like(x), t), t)


def looked(nets: Nets, views: Sequence[View], cond: Cond) -> list[Tensor]:
    """Logits (B, K) of each view under the same conditions, from one pass over those that have none yet."""
    assert nets.judge is not None
    seen = {i: view.logits for i, view in enumerate(views) if view.logits is not None}
    new = [i for i in range(len(views)) if i not in seen]
    if new:
        x_t, t = torch.cat([views[i].x_t for i in new]), torch.cat([views[i].t for i in new])
        seen |= zip(new, nets.judge.logits(x_t, t, cat([cond] * len(new))).chunk(len(new)), strict=True)
    return [seen[i] for i in range(len(views))]


def contest(
    nets: Nets, cond: Cond, real: View, fake: View, rules: Contest, rng: Stream, *, r1: float, r2: float, jitter: float
) -> Losses:
    """The heads' loss on two detached views, with r1 x (r2 x) the squared slope at the real (fake) one.

    jitter: the standard deviation of the step by which the slope is measured (`jitter_penalty`); 0 differentiates twice. All from
    one pass of the network; `stats` say how the heads do."""
    asked = [(name, i, weight) for i, (name, weight) in enumerate((("r1", r1), ("r2", r2))) if weight]
    views, moved, exact = [real, fake], [], bool(asked) and not jitter
    for _, i, _ in asked:
        x_t, t = views[i].x_t.detach(), views[i].t
        if exact:
            views[i] = View(x_t.requires_grad_(), t)
        else:  # the same x_t at the same t, moved a little: never a fresh noising, which would be another question
            moved.append(View(x_t + jitter * rng.normal_like(x_t), t))
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():  # fused attention has no second derivative
        seen = looked(nets, [*views, *moved], cond)
        terms = {"judge": flat_mean(rules.judge(seen[0], seen[1]))}
        for k, (name, i, weight) in enumerate(asked):
            slope = gradient_penalty(seen[i], views[i].x_t) if exact else jitter_penalty(seen[i], seen[2 + k], jitter)
            terms[name] = weight * slope
    return Losses(terms, health(seen[0], seen[1]))
