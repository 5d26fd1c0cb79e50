"""Samplers: one step is a function, a trajectory is a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Prediction
from fewstep.schedules import NoiseSchedule, like

# (schedule, prediction at the current time, s (B,) < t, rng) -> x_s
Step = Callable[[NoiseSchedule, Prediction, Tensor, "Noise"], Tensor]


class Noise(Protocol):
    """Where a step takes fresh noise from: a Stream, or one stream a sample."""

    def normal_like(self, x: Tensor) -> Tensor: ...


class Predictor(Protocol):
    """Whatever denoises: a Denoiser, a Guided one, a mixture of experts."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction: ...


def ddim(schedule: NoiseSchedule, prediction: Prediction, s: Tensor, rng: Noise) -> Tensor:
    """The deterministic jump x_s = alpha_s x0 + sigma_s eps; on a straight path it is the Euler step of the ODE.

    Song et al. 2021, eq. 12 with eta = 0."""
    alpha, sigma = schedule.alpha_sigma(s)
    return like(alpha, prediction.x0) * prediction.x0 + like(sigma, prediction.x0) * prediction.eps


def renoise(schedule: NoiseSchedule, prediction: Prediction, s: Tensor, rng: Noise) -> Tensor:
    """Multistep consistency sampling: the predicted x0 under fresh noise (Song et al. 2023, algorithm 1)."""
    return schedule.add_noise(prediction.x0, rng.normal_like(prediction.x0), s)


def tcd(gamma: float) -> Step:
    """Strategic stochastic sampling: jump to (1 - gamma) s, then the exact forward kernel to s.

    gamma in [0, 1]: 0 is `ddim`, 1 has the law of `renoise` (Zheng et al. 2024, algorithm 2)."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is the share of noise put back and lies in [0, 1], not {gamma}")

    def step(schedule: NoiseSchedule, prediction: Prediction, s: Tensor, rng: Noise) -> Tensor:
        below = (1 - gamma) * s
        x = ddim(schedule, prediction, below, rng)
        return schedule.forward_kernel(x, rng.normal_like(x), below, s)

    return step


STEPS: dict[str, Step] = {"ddim": ddim, "renoise": renoise}


@dataclass(frozen=True)
class Visit:
    """One evaluation on a trajectory: the input, where it lies, what was predicted, and the next state."""

    index: int
    t: float
    x_t: Tensor
    prediction: Prediction
    x_s: Tensor


def rollout(
    denoiser: Predictor, noise: Tensor, times: Sequence[float], cond: Cond, *, step: Step = ddim, rng: Noise
) -> Iterator[Visit]:
    """Walks x (B, C, *S) from pure noise at times[0] through falling times to clean; yields each visit.

    The last visit's `x_s` is the predicted x0: whatever the step, no noise is put back at the end."""
    x = noise
    for index, (t, s) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        prediction, x_s = advance(denoiser, x, t, s, cond, step=step, rng=rng)
        yield Visit(index, t, x, prediction, x_s)
        x = x_s


def advance(
    denoiser: Predictor, x: Tensor, t: float, s: float, cond: Cond, *, step: Step = ddim, rng: Noise
) -> tuple[Prediction, Tensor]:
    """One step of a rollout, from x (B, C, *S) at t to s < t: (what was predicted, x_s). At s = 0 that is the predicted x0."""
    n = len(x)
    prediction = denoiser(x, torch.full((n,), t, dtype=torch.float64), cond)
    if s > 0:
        return prediction, step(denoiser.schedule, prediction, torch.full((n,), s, dtype=torch.float64), rng).to(x.dtype)
    return prediction, prediction.x0.to(x.dtype)


def sample(denoiser: Predictor, noise: Tensor, times: Sequence[float], cond: Cond, *, step: Step = ddim, rng: Noise) -> Tensor:
    """The clean end of a rollout."""
    x = noise
    for visit in rollout(denoiser, noise, times, cond, step=step, rng=rng):
        x = visit.x_s
    return x


def uniform_grid(n: int) -> tuple[float, ...]:
    """n times evenly spaced from 1, 0 left out: 1, 0.75, 0.5, 0.25 for n = 4 ("trailing" spacing)."""
    if n < 1:
        raise ValueError(f"a sampler needs at least one step, not {n}")
    return tuple(1 - i / n for i in range(n))


def shifted(times: Sequence[float], shift: float) -> tuple[float, ...]:
    """Times moved towards noise, k t / (1 + (k - 1) t) (Esser et al. 2024, eq. 23)."""
    return tuple(shift * t / (1 + (shift - 1) * t) for t in times)
