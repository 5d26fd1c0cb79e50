"""f-divergences between a student and its teacher, as the weights that f-distill and Uni-Instruct put on score differences.

l = log r, r = p_teacher(x_t) / p_student(x_t), which a discriminator's optimal logit is. D_f = E_student[f(r)].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Two functions of the log-ratio l, elementwise and differentiable in it.

    weight: h = r^2 f''(r). E_student[h |score difference|^2] is what the divergence loses to noise, and h times the score
    difference is f-distill's direction (arXiv 2502.15681, theorem 1).
    slope: h - dh/dl. With rho = 1 / r and phi(rho) = rho h, as Uni-Instruct (arXiv 2505.20755) writes it, h = phi(rho) / rho and
    slope = phi'(rho)."""

    weight: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


# Each up to a positive factor, as f-distill lists them: "squared_hellinger" is twice the integral of (sqrt p - sqrt q)^2,
# "neyman" half that of (p_student - p_teacher)^2 / p_teacher, "js" twice the Jensen-Shannon divergence. Where h grows with r,
# what the student misses counts (mode covering: kl, jeffreys); where it falls, what it alone draws (seeking: neyman, softened).
DIVERGENCES: dict[str, Divergence] = {
    "rkl": Divergence(torch.ones_like, torch.ones_like),
    "kl": Divergence(torch.exp, torch.zeros_like),
    "js": Divergence(torch.sigmoid, lambda l: torch.sigmoid(l).square()),
    "softened": Divergence(lambda l: torch.sigmoid(-l), lambda l: 1 - torch.sigmoid(l).square()),
    "squared_hellinger": Divergence(lambda l: (l / 2).exp(), lambda l: (l / 2).exp() / 2),
    "neyman": Divergence(lambda l: (-l).exp(), lambda l: 2 * (-l).exp()),
    "jeffreys": Divergence(lambda l: 1 + l.exp(), torch.ones_like),
}


def divergence(name: str) -> Divergence:
    """The divergence of that name. Raises ValueError, naming all there are, for another one."""
    if name not in DIVERGENCES:
        raise ValueError(f"there is no divergence {name!r}; there are: {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name]


def ranges(t: Tensor, low: float, high: float, n: int) -> Tensor:
    """Which of n equal ranges of [low, high] each time (B,) lies in, a whole number; the ends belong to the outer ones."""
    return ((t - low) / (high - low) * n).long().clamp(0, n - 1)


def relative(
    logit: Tensor,
    group: Tensor,
    groups: int,
    everywhere: Callable[[Tensor], Tensor],
    *,
    least: float = 0.1,
    most: float = 20.0,
) -> Tensor:
    """The log-ratio (B,) whose ratio averages 1 in each group, since E_student[r] = 1 at every noise level; without a graph.

    logit: (B,), clamped so that the ratio lies in [least, most]. group: (B,) whole numbers below `groups`, on the CPU: which
    samples to average over. everywhere: see `Nets`. f-distill's first normalisation, over the batches of all processes here."""
    ratio = logit.detach().exp().clamp(least, most)
    index = group.to(ratio.device, non_blocking=True)
    empty = ratio.new_zeros(groups)
    sums = everywhere(torch.stack([empty.index_add(0, index, x) for x in (ratio, torch.ones_like(ratio))]))
    return (ratio / (sums[0] / sums[1].clamp_min(1e-12))[index]).log()
