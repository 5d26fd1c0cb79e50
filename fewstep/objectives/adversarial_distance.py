"""An adversarial distance: heads learn to tell where the student landed from where it should have (arXiv 2402.13929)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from fewstep.heads import Heads
from fewstep.losses import CONTESTS, flat_mean, health
from fewstep.objectives.base import Batch, Landing, Losses, Needs, Nets, Objective, Turn, Wrapper, register
from fewstep.objectives.progressive import Progressive
from fewstep.stream import Stream
from fewstep.times import Uniform


@register("adversarial_distance")
@final
@dataclass(frozen=True, kw_only=True)
class AdversarialDistance(Wrapper):
    """Puts a contest beside, or in the place of, the distance between the student's landing x_s and the target's.

    SDXL-Lightning (arXiv 2402.13929) around `progressive`: with `conditional` heads, D(x_t, x_s, t, s, c), which see
    the point both jumps began at, the student keeps to its teacher's trajectories; without, D'(x_s, s, c), it keeps to their law
    alone. Around `tcd` the distance of Hyper-SD's stages (arXiv 2404.13686), which go from `distance` to `weight`. Around
    `consistency` PCM's latent adversary (arXiv 2405.18407): conditional false, heads ladd, loss hinge_both, push 1 / segments.

    inner: the objective, one of those whose losses say where the student landed. distance: weight of its own terms, 0 for the
    contest alone; weight: of the student's term in the contest; judge_turns: of the heads before each of the student's;
    loss: a key of CONTESTS. heads: those that see one point: dmd2 (on the critic's middle), ladd (on several blocks of the frozen
    teacher, a logit a token) or projected (on one of its blocks); those that see two are dmd2's.
    push: both landings are judged at a time drawn from [s, s + push), not below `low`, where the exact forward kernel takes each
    with noise of its own. 0: a landing below `low`, on clean data, is judged under noise of a time drawn from [low, high], any
    other as it is.
    The critic, where heads listen to one, is the network they look through, up to its middle; it learns from the contest alone
    and denoises nothing.
    Deviations from Lightning: clean landings are noised to any time in [low, high], not to one of t = 10, 250, 500 and 750 of
    1000; the heads pool maps to 8x8. From PCM: one head a block, not four, and not on every block; a round has an update of the
    student and one of the heads, where theirs has one of the two.
    """

    inner: Objective = field(default_factory=Progressive)
    conditional: bool = True
    distance: float = 1.0
    weight: float = 0.1
    judge_turns: int = 1
    loss: Literal["non_saturating", "hinge", "hinge_both", "least_squares", "relativistic"] = "non_saturating"
    low: float = 0.01
    high: float = 0.75
    heads: Literal["dmd2", "ladd", "projected"] = "dmd2"
    push: float = 0.0

    def __post_init__(self) -> None:
        Uniform(self.low, self.high)
        if not 0 <= self.push <= 1:
            raise ValueError(f"push is a width in time, from 0 (none) to 1, not {self.push}; PCM's is 1 / segments")
        if self.conditional and self.heads != "dmd2":
            raise ValueError(f"heads: {self.heads} see the landing alone, not where the jump began; set conditional: false")
        if not self.inner.lands:
            raise ValueError(f"inner: {type(self.inner).__name__} has no landing to judge; wrap progressive, consistency or tcd")
        if self.judge_turns < 1 or self.weight <= 0 or self.distance < 0:
            raise ValueError("judge_turns must be at least 1, weight positive, and distance not negative")

    @property
    def needs(self) -> Needs:
        inner = self.inner.needs
        heads = Heads("beside" if self.conditional else self.heads)
        critic = ("critic",) if heads.backbone == "critic" else ()
        return replace(inner, roles=(*inner.roles, *critic, "heads"), heads=heads, partly=bool(critic))

    def round(self, step: int) -> list[Turn]:
        (turn,) = self.inner.round(step)
        player, *others = [role for role in ("critic", "heads") if role in self.needs.roles]
        judge = Turn(player, partial(self.judge_loss, turn), tuple(others))
        return [judge] * self.judge_turns + [replace(turn, loss=partial(self.student_loss, turn))]

    def judge_loss(self, turn: Turn, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """The contest's loss of the heads, on landings of a student's turn: -log D(real) - log(1 - D(fake))."""
        with torch.no_grad():
            losses = turn.loss(nets, batch, rng.child("sample"))
        real, fake = self._seen(nets, batch, losses.landing, rng, ("real", "fake"))
        return Losses({"judge": flat_mean(CONTESTS[self.loss].judge(real, fake))}, health(real, fake), landing=losses.landing)

    def student_loss(self, turn: Turn, nets: Nets, batch: Batch, rng: Stream) -> Losses:
        """distance x the inner loss + weight x the contest's loss of the student's landing: -log D(fake)."""
        losses, rules = turn.loss(nets, batch, rng), CONTESTS[self.loss]
        wanted = ("real", "fake") if rules.pairs else ("fake",)
        seen = self._seen(nets, batch, losses.landing, rng.child("adversary"), wanted)
        terms = {k: self.distance * v for k, v in losses.terms.items()} if self.distance else {}
        return replace(losses, terms={**terms, "adversary": self.weight * flat_mean(rules.student(seen[0], seen[-1]))})

    def _seen(self, nets: Nets, batch: Batch, landing: Landing | None, rng: Stream, wanted: tuple[str, ...]) -> list[Tensor]:
        """Logits (B, K) of the target's landing (real), of the student's (fake), at the same times, from one pass."""
        assert nets.judge is not None and landing is not None, "an objective that lands says where"
        s, kernel = landing.s, nets.student.schedule.forward_kernel
        if self.push:
            t = (s + self.push * rng.uniform(len(s))).clamp(self.low, 1.0)
        else:
            t = torch.where(s < self.low, Uniform(self.low, self.high).sample(len(s), rng), s)
        ends = {"real": landing.target, "fake": landing.x_s}
        points = [(kernel(ends[name], rng.child(name).normal_like(ends[name]), s, t), t) for name in wanted]
        return nets.judge.beside(points, (landing.x_t, landing.t) if self.conditional else None, batch.cond)
