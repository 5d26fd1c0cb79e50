"""Real against fake before discriminator heads: what they see, what they lose, and what holds their slope."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoiser import Cond, cat
from fewstep.losses import Contest, flat_mean, gradient_penalty, health, jitter_penalty
from fewstep.objectives.base import Losses, Nets
from fewstep.stream import Stream

View = tuple[Tensor, Tensor]  # x_t (B, C, *S) at t (B,)


def looked(nets: Nets, views: Sequence[View], cond: Cond) -> tuple[Tensor, ...]:
    """Logits (B, K) of each view under the same conditions, from one pass."""
    assert nets.judge is not None
    x_t, t = (torch.cat(parts) for parts in zip(*views, strict=True))
    return nets.judge.logits(x_t, t, cat([cond] * len(views))).chunk(len(views))


def contest(
    nets: Nets, cond: Cond, real: View, fake: View, rules: Contest, rng: Stream, *, r1: float, r2: float, jitter: float
) -> Losses:
    """The heads' loss on two detached views, with r1 x (r2 x) the squared slope at the real (fake) one.

    jitter: the standard deviation of the step by which the slope is measured (`jitter_penalty`); 0 differentiates twice. All from
    one pass of the network; `stats` say how the heads do."""
    asked = [(name, i, weight) for i, (name, weight) in enumerate((("r1", r1), ("r2", r2))) if weight]
    views, exact = [real, fake], bool(asked) and not jitter
    if exact:
        views = [(x_t.detach().requires_grad_(), t) for x_t, t in views]
    # The same x_t at the same t, moved a little: never a fresh noising, which would be another question.
    moved = [] if exact else [(views[i][0] + jitter * rng.normal_like(views[i][0]), views[i][1]) for _, i, _ in asked]
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():  # fused attention has no second derivative
        seen = looked(nets, [*views, *moved], cond)
        terms = {"judge": flat_mean(rules.judge(seen[0], seen[1]))}
        for k, (name, i, weight) in enumerate(asked):
            slope = gradient_penalty(seen[i], views[i][0]) if exact else jitter_penalty(seen[i], seen[2 + k], jitter)
            terms[name] = weight * slope
    return Losses(terms, health(seen[0], seen[1]))
