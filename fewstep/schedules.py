"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, on one time axis from t = 0 (clean) to t = 1 (noisiest).

Times are float64 tensors on the CPU, one a sample: coefficients are exact, and asking about them never waits for an
accelerator. `like` is the one place where a coefficient takes the dtype and device of an image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A per-sample coefficient (B,) as (B, 1, ...) in the dtype and on the device of x (B, C, *S)."""
    shaped = coefficient.reshape(-1, *([1] * (x.ndim - 1)))
    return shaped.to(device=x.device, dtype=x.dtype, non_blocking=True)


class NoiseSchedule(ABC):
    """What a network was trained on: the path from clean to noise, and the number it is fed to say where on it x_t lies."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t in [0, 1], float64, shaped like t. alpha(0) = 1 and sigma(0) = 0 exactly."""

    @abstractmethod
    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha = ratio: the one coordinate that all schedules share."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The number that the network is fed at t, float64."""

    @abstractmethod
    def t_of_model_time(self, time: Tensor) -> Tensor:
        """Inverse of `model_time`."""

    def prior(self, noise: Tensor) -> Tensor:
        """Where sampling starts at t = 1, from unit noise (B, C, *S): that noise itself on every path of bounded variance."""
        return noise

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, in the dtype of x0 (B, C, *S)."""
        alpha, sigma = self.alpha_sigma(t)
        return like(alpha, x0) * x0 + like(sigma, x0) * eps

    def kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, std) of the exact forward law x_t | x_s = scale x_s + std n, for s <= t with alpha(s) > 0."""
        (a_s, sigma_s), (a_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        scale = a_t / a_s
        return scale, (sigma_t**2 - (scale * sigma_s) ** 2).clamp_min(0).sqrt()

    def forward_kernel(self, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """A sample of x_t given x_s for s <= t; s = 0 is `add_noise`."""
        scale, std = self.kernel(s, t)
        return like(scale, x_s) * x_s + like(std, x_s) * noise

    def kernel_target(self, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) whose mean given x_t = `forward_kernel(x_s, noise, s, t)`, s < t, is the exact prediction at x_t.

        Whatever the law of x_s: E[noise | x_t] = -std score(x_t), so eps = noise sigma_t / std is unbiased, and x0 is what
        alpha x0 + sigma eps = x_t makes of it; (noise, x_s) themselves are biased for s > 0, exact for s = 0. Its variance grows
        like 1 / std^2 (Phased DMD, arXiv 2510.27684; solved for x0 without dividing by alpha_t)."""
        (a_s, sigma_s), (_, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        scale, std = self.kernel(s, t)
        back = scale * sigma_s**2 / (a_s * std)
        return like(1 / a_s, x_s) * x_s - like(back, x_s) * noise, like(sigma_t / std, x_s) * noise


@dataclass(frozen=True)
class DiscreteVP(NoiseSchedule):
    """Variance-preserving table of T levels (DDPM, Stable Diffusion): timestep i lies at t = (i + 1) / T, t = 0 is exactly clean.

    Between levels the angle atan2(sigma, alpha) is linear in t, which also covers tables that end at zero SNR.
    """

    alphas_cumprod: tuple[float, ...]
    _angles: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bar = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        if len(bar) < 2 or bool((bar[1:] >= bar[:-1]).any()) or bar[-1] < 0:
            raise ValueError("alphas_cumprod must fall strictly from below 1 towards 0; check the scheduler's betas")
        object.__setattr__(self, "_angles", torch.atan2((1 - bar).sqrt(), bar.sqrt()))

    @property
    def num_levels(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.double().clamp(0, 1) * self.num_levels
        low = place.floor().clamp(max=self.num_levels - 1).long()
        angle = torch.lerp(self._angles[low], self._angles[low + 1], place - low)
        # cos(pi/2) is 6e-17 in float64; a table that ends at zero SNR must end there exactly.
        return torch.where(angle >= math.pi / 2, 0.0, angle.cos()), angle.sin()

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        angle = torch.atan(ratio.double())
        high = torch.searchsorted(self._angles, angle.contiguous()).clamp(1, self.num_levels)
        start, end = self._angles[high - 1], self._angles[high]
        return ((high - 1) + (angle - start) / (end - start)).clamp(0, self.num_levels) / self.num_levels

    def model_time(self, t: Tensor) -> Tensor:
        return t.double() * self.num_levels - 1

    def t_of_model_time(self, time: Tensor) -> Tensor:
        return (time.double() + 1) / self.num_levels


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """Straight path alpha = 1 - t, sigma = t (SD3, FLUX, Sana, Wan). The network's clock runs linearly between its two ends."""

    clean_time: float = 0.0
    noise_time: float = 1000.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t.double(), t.double()

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        ratio = ratio.double()
        return torch.where(torch.isinf(ratio), 1.0, ratio / (1 + ratio))

    def model_time(self, t: Tensor) -> Tensor:
        return self.clean_time + (self.noise_time - self.clean_time) * t.double()

    def t_of_model_time(self, time: Tensor) -> Tensor:
        return (time.double() - self.clean_time) / (self.noise_time - self.clean_time)


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance-exploding path alpha = 1, fed ln(sigma) / 4; sigma^(1/rho) runs straight from sigma_min, the least level above
    the clean t = 0, to sigma_max (Karras et al. 2022, eq. 5 and table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._ends
        sigma = (low + t.double() * (high - low)) ** self.rho
        return torch.ones_like(t, dtype=torch.float64), torch.where(t > 0, sigma, 0.0)

    def prior(self, noise: Tensor) -> Tensor:
        return self.sigma_max * noise

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        low, high = self._ends  # levels below sigma_min count as clean
        return ((ratio.double() ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def model_time(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1].log() / 4

    def t_of_model_time(self, time: Tensor) -> Tensor:
        return self.t_of_ratio((4 * time.double()).exp())


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """alpha = cos(u), sigma = sin(u) at the angle u = t pi / 2, which the network is fed (sCM, eq. 5; unit-variance data)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.double() * (math.pi / 2)
        return torch.where(t.double() >= 1, 0.0, angle.cos()), angle.sin()

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio.double()) * (2 / math.pi)

    def model_time(self, t: Tensor) -> Tensor:
        return t.double() * (math.pi / 2)

    def t_of_model_time(self, time: Tensor) -> Tensor:
        return time.double() * (2 / math.pi)
