"""A discriminator for any objective: heads on a diffusion network's features judge noised samples (arXiv 2206.02262)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.heads import Heads
from fewstep.losses import CONTESTS, flat_mean
from fewstep.objectives.base import Batch, Losses, Needs, Nets, Objective, Turn, Wrapper, denoise, register
from fewstep.objectives.contest import View, contest, drawn, looked, noised, overheard, walked
from fewstep.objectives.dmd import DMD
from fewstep.objectives.heeded import check_heeded, check_inner
from fewstep.objectives.ranges import at_least
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("adversarial")
@final
@dataclass(frozen=True, kw_only=True)
class Adversarial(Wrapper):
    """Adds to an objective a loss on the student's sample that heads, which learn to tell it from real data, give it.

    inner: the objective; `steps` and `sampler` are its. heads: dmd2 (the critic's bottleneck, which learns along; arXiv
    2405.14867), ladd (several blocks of the frozen teacher, a logit a token; arXiv 2403.12015), projected (one of its blocks),
    pixel (the image tower `features`, zoo:NAME or open_clip:..., of decoded samples without noise);
    taps: other blocks for them. loss: a key of CONTESTS. weight: of the student's term; judge_weight: of the heads' beside the
    critic's own. low, high, shift: times to which samples are noised before they are judged. paired: real and fake share time
    and noise. shared: heads on the critic read the very pass in which it denoises or scores, at its times, where DMD2 noises
    afresh (`paired` parts them again, and so does a critic that is guided: `vsd`, `sid` with its kappas); those on the teacher
    take a pass of their own, since its score is guided, two halves of which one would have a graph.
    r1, r2: weights of the gradient penalties of real and fake; jitter: the approximate ones' step, 0 for the exact.
    The heads learn in the critic's turns, from the samples it has; where the inner objective has none, in a turn before the
    student's, from samples of the student's turn. Where its loss hands on points on the way to a sample (`Objective.draws`:
    segments, ends that are told, fields), they judge samples of the deployed walk, whose last step has a graph. One that reads
    heads (`uni_instruct`) says which; one that trains some (`f_distill`, `adversarial_distance`) is not wrapped.
    Deviation: heads and critic move together as in DMD2, but by an optimizer each, so that their rates may differ.
    """

    inner: Objective = field(default_factory=DMD)
    heads: Literal["dmd2", "ladd", "projected", "pixel"] = "dmd2"
    taps: tuple[str, ...] = ()
    features: str = "zoo:sprites-clip"
    loss: Literal["non_saturating", "hinge", "hinge_both", "least_squares", "relativistic"] = "non_saturating"
    weight: float = 3e-3
    judge_weight: float = 1e-2
    low: float = 0.001
    high: float = 1.0
    shift: float = 1.0
    paired: bool = False
    shared: bool = True
    r1: float = 0.0
    r2: float = 0.0
    jitter: float = 0.01

    def __post_init__(self) -> None:
        _ = self.times  # which raises for what is no range
        at_least(0, weight=self.weight, judge_weight=self.judge_weight, r1=self.r1, r2=self.r2, jitter=self.jitter)
        check_inner(self.inner, Heads(self.heads, self.taps, self.features), self.loss)
        check_heeded(self, self.inner, self.needs.heads.kind, shares=self.shares)

    @property
    def needs(self) -> Needs:
        inner, told = self.inner.needs, Heads(self.heads, self.taps, self.features)
        if "heads" in inner.roles:
            return replace(inner, images=True)
        roles = dict.fromkeys((*inner.roles, *(("critic",) if told.backbone == "critic" else ()), "heads"))
        return replace(inner, roles=tuple(roles), images=True, heads=told)

    @property
    def times(self) -> Uniform:
        """Where samples are judged that no pass of a critic has judged already."""
        return Uniform(self.low, self.high, self.shift)

    @property
    def shares(self) -> bool:
        """Whether the heads judge by the passes that the critic makes for its own sake."""
        return self.needs.heads.backbone == "critic" and self.shared and self.inner.audible and not self.paired

    def round(self, step: int) -> list[Turn]:
        turns = self.inner.round(step)
        student = next(turn for turn in turns if turn.player == "student")
        own = any(turn.player == "critic" for turn in turns)  # a critic of the inner objective's
        wrapped: list[Turn] = []
        for turn in turns:
            if turn.player == "student":
                if not own and self.needs.heads.backbone == "critic":
                    denoiser = Turn("critic", partial(self.denoise, student))
                    wrapped.append(Turn("critic", partial(self.critic_loss, student, denoiser), ("heads",)))
                elif not own:
                    wrapped.append(Turn("heads", partial(self.heads_loss, student, None)))
                turn = replace(turn, loss=partial(self.student_loss, turn))
            elif turn.player == "critic":
                turn = replace(turn, loss=partial(self.critic_loss, student, turn), others=(*turn.others, "heads"))
            wrapped.append(turn)
        return wrapped

    def student_loss(self, turn: Turn, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """The inner loss, and weight x the contest's loss of its sample, noised afresh or as the inner loss noised it."""
        losses, fake = overheard(turn, nets, batch, rng, self.shares)
        sample = losses.sample if self.inner.draws else walked(nets, batch, rng.child("sample"))
        assert sample is not None
        if fake is not None and not fake.x_t.requires_grad:  # of no use to the student
            fake = None
        rules, views = CONTESTS[self.loss], self._views(nets, batch, sample, fake, rng.child("adversary"))
        seen = looked(nets, views if rules.pairs else views[1:], batch.cond)
        term = self.weight * flat_mean(rules.student(seen[0], seen[-1]))
        return replace(losses, terms={**losses.terms, "adversary": term})

    def denoise(self, student: Turn, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """What keeps a critic that the inner objective has not a denoiser: its native loss on samples of the student's turn."""
        assert nets.critic is not None
        return denoise(nets.critic, batch, drawn(student, self.inner.draws, nets, batch, rng), self.times, rng)

    def critic_loss(self, student: Turn, turn: Turn, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """The critic's own loss and judge_weight x the heads', on the same samples."""
        losses, fake = overheard(turn, nets, batch, rng, self.shares)
        heads = self.heads_loss(student, losses.sample, nets, batch, rng.child("adversary"), fake)
        return replace(losses, terms={**losses.terms, **heads.terms}, stats={**losses.stats, **heads.stats})

    def heads_loss(
        self, student: Turn, sample: Tensor | None, nets: Nets, batch: Batch, rng: Stream, fake: View | None = None
    ) -> Losses:
        """judge_weight x (the contest's loss and the penalties), all from one pass of the network."""
        if sample is None:
            sample = drawn(student, self.inner.draws, nets, batch, rng)
        views = self._views(nets, batch, sample.detach(), fake, rng)
        losses = contest(nets, batch.cond, *views, CONTESTS[self.loss], rng, r1=self.r1, r2=self.r2, jitter=self.jitter)
        return replace(losses, terms={k: self.judge_weight * v for k, v in losses.terms.items()})

    def _views(self, nets: Nets, batch: Batch, sample: Tensor, fake: View | None, rng: Stream) -> tuple[View, View]:
        """Noised real data and sample: at the times of a fake that is judged already, or at times of their own."""
        assert batch.latents is not None
        if fake is not None:
            return noised(nets, batch.latents, fake.t, rng.child("real")), fake
        if self.needs.heads.backbone == "pixels":
            clean = torch.zeros(len(sample), dtype=torch.float64)
            return View(batch.latents, clean), View(sample, clean)
        a, b = (rng.child("both" if self.paired else name) for name in ("real", "fake"))
        ts = self.times.sample(len(sample), a), self.times.sample(len(sample), b)
        return noised(nets, batch.latents, ts[0], a), noised(nets, sample, ts[1], b)
