"""How the (guided) teacher goes from one time to a lower one: solvers of its probability flow, by how often they ask it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fewstep.denoiser import Cond, Prediction
from fewstep.matched import off_straight, straight
from fewstep.objectives.base import Nets
from fewstep.sampling import ddim
from fewstep.schedules import like
from fewstep.stream import Stream

# (nets, cond, x_t (B, C, *S), t (B,), s (B,) < t, guidance scales (B,) or None, rng) -> x_s
Solver = Callable[[Nets, Cond, Tensor, Tensor, Tensor, Tensor | None, Stream], Tensor]


def first_order(nets: Nets, cond: Cond, x_t: Tensor, t: Tensor, s: Tensor, g: Tensor | None, rng: Stream) -> Tensor:
    """The DDIM step."""
    return ddim(nets.teacher.schedule, nets.teacher(x_t, t, cond, g=g), s, rng)


def second_order(nets: Nets, cond: Cond, x_t: Tensor, t: Tensor, s: Tensor, g: Tensor | None, rng: Stream) -> Tensor:
    """The midpoint method on the straight path through the same noise ratios: the whole step goes at the velocity of its middle.

    The middle is that of the straight path's time, not of the log-SNR (DPM-Solver-2, arXiv 2206.00927), which has none where s is
    the clean end; both are of second order."""
    schedule = nets.teacher.schedule
    u = (straight(schedule, t) + straight(schedule, s)) / 2
    m = off_straight(schedule, u)
    half = first_order(nets, cond, x_t, t, m, g, rng).to(x_t.dtype)
    velocity = nets.teacher(half, m, cond, g=g).velocity
    alpha, sigma = (like(c, velocity) for c in schedule.alpha_sigma(t))
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    return ddim(schedule, Prediction(x0, x0 + velocity, alpha, sigma), s, rng)


SOLVERS: dict[int, Solver] = {1: first_order, 2: second_order}
