"""Teachers whose denoisers are known exactly, for any schedule and any target.

A `clean` module maps (x (B, D), t, alpha, sigma, named conditions) to x0; `denoiser` makes it speak a network's native target, so
that every test goes through the Denoiser that real networks use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.denoiser import TARGETS, Cond, Denoiser, Guided
from fewstep.schedules import EDM, DiscreteVP, NoiseSchedule, RectifiedFlow, TrigFlow, like

NOTHING = Cond({})


def stable_diffusion() -> DiscreteVP:
    """The table of SD 1.5 and SDXL: scaled-linear betas, 1000 levels."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return DiscreteVP(tuple((1 - betas).cumprod(0).tolist()))


SCHEDULES: dict[str, NoiseSchedule] = {
    "sd": stable_diffusion(),
    "flow": RectifiedFlow(),
    "flow-reversed": RectifiedFlow(clean_time=1.0, noise_time=0.0),
    "edm": EDM(),
    "trig": TrigFlow(),
}


# (schedule, target) as real teachers come, each of which may start at t = 1.
TEACHERS = [
    ("sd", "epsilon"),
    ("sd", "v_prediction"),
    ("flow", "flow"),
    ("flow-reversed", "flow"),
    ("edm", "sample"),
    ("trig", "v_prediction"),
]


# One of each target that latent teachers have.
EPS_V_FLOW = [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")]


@dataclass(frozen=True)
class OneLevel(NoiseSchedule):
    """The same (alpha, sigma) at every t above 0: what a formula says of a single noise level can be checked as it stands."""

    alpha: float
    sigma: float

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        noisy = (t > 0).double()
        return 1 + noisy * (self.alpha - 1), noisy * self.sigma

    def prior(self, noise: Tensor) -> Tensor:
        return max(self.sigma, 1.0) * noise

    def t_of_ratio(self, ratio: Tensor) -> Tensor:
        return (ratio > 0).double()

    def model_time(self, t: Tensor) -> Tensor:
        return t.double()

    def t_of_model_time(self, time: Tensor) -> Tensor:
        return time.double()


def times(*t: float) -> Tensor:
    """A batch of times, float64."""
    return torch.tensor(t, dtype=torch.float64)


def heard(schedule: NoiseSchedule, time: Tensor) -> Tensor:
    """The t behind the number a network is fed, differentiable; a float32 one is made exact (multiples of 1/1000, 1/1024)."""
    t = schedule.t_of_model_time(time.double())
    return t + ((t * 1_024_000).round() / 1_024_000 - t).detach() if time.dtype == torch.float32 else t


class Exact(nn.Module):
    """A network that computes x0 by a `clean` module and says it in its native target."""

    def __init__(self, clean: nn.Module, schedule: NoiseSchedule, target: str) -> None:
        super().__init__()
        self.clean, self.schedule, self.target = clean, schedule, target

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        t = heard(self.schedule, time)
        alpha, sigma = (like(c, x) for c in self.schedule.alpha_sigma(t))
        x0 = self.clean(x, t, alpha, sigma, cond.tensors)
        a, b = TARGETS[self.target](alpha, sigma)
        return a * x0 + b * (x - alpha * x0) / sigma


class Counted:
    """A family's `call` that keeps what the network was given, and whether a graph was built."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.with_graph: list[bool] = []

    def __call__(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        out = net(x, time, cond)
        self.inputs.append(x.detach())
        self.times.append(time)
        self.with_graph.append(out.requires_grad)
        return out


def call(net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """The plainest family: the network takes what it is given."""
    return net(x, time, cond)


def denoiser(clean: nn.Module, schedule: NoiseSchedule, target: str, call=call) -> Denoiser:
    """The Denoiser of an exact network."""
    return Denoiser(Exact(clean, schedule, target), schedule, target, call)


def posterior(alpha: Tensor, sigma: Tensor, var: Tensor) -> Tensor:
    """Gain of E[x0 | x_t] for x0 of variance `var`."""
    return alpha * var / (alpha**2 * var + sigma**2)


def endpoint(alpha: Tensor, sigma: Tensor, var: Tensor) -> Tensor:
    """Gain of the map that carries the law of x_t to that of x0, where the probability flow ends: the exact student (O7)."""
    return (var / (alpha**2 * var + sigma**2)).sqrt()


class Gaussian(nn.Module):
    """x0 ~ N(mean, diag var): mean + gain (x - alpha mean). Conditions 'mean' and 'var' take the parameters' place."""

    def __init__(self, mean: Sequence[float], var: Sequence[float], gain=posterior) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(var, dtype=torch.float64).log() / 2)
        self.gain = gain

    def forward(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        mean, var = cond.get("mean", self.mean), cond.get("var", (2 * self.log_std).exp())
        return mean + self.gain(alpha, sigma, var) * (x - alpha * mean)


def law(mean: float, var: float) -> Cond:
    """A condition (leading axis 1) that tells a `Gaussian` its law."""
    return Cond({"mean": times(mean)[None], "var": times(var)[None]})


class Blind(nn.Module):
    """The same law under every condition."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.inner(x, t, alpha, sigma, {})


class Linear(nn.Module):
    """The one-step generator of N(mean, std^2) from pure noise, mean + std x, wherever it is asked; x has sigma's scale where
    that is beyond 1."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.mean + self.std * x / sigma.clamp(min=1)


class Mixture(nn.Module):
    """Equal isotropic Gaussians at `means` (K, D), with weights (K,)."""

    def __init__(self, means: Tensor, std: float, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("log_weights", weights.log())
        self.var = std**2

    def forward(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        apart = x[:, None] - alpha[:, None] * self.means.to(x)  # (B, K, D)
        spread = alpha**2 * self.var + sigma**2  # (B, 1)
        share = (self.log_weights.to(x) - apart.square().sum(-1) / (2 * spread)).softmax(-1)
        centres = self.means.to(x) + (alpha * self.var / spread)[:, None] * apart
        return (share[..., None] * centres).sum(1)

    def draw(self, n: int) -> Tensor:
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True)
        return self.means[which] + self.var**0.5 * torch.randn(n, self.means.shape[1], dtype=self.means.dtype)


def gaussian(mean: Sequence[float], var: Sequence[float], schedule: NoiseSchedule, target: str) -> Denoiser:
    """The exact teacher of N(mean, diag var)."""
    return denoiser(Gaussian(mean, var), schedule, target)


def guided(name: str, target: str, mean: Tensor, var: Tensor, scale: float = 4.0) -> tuple[Guided, Cond, Tensor]:
    """(a guided exact teacher, the condition under which its law is N(mean, diag var), the mean that guidance makes of it).

    Where both laws of a guided teacher have one variance, its score is that of the law with this mean (consistency.md 1)."""
    null, network = mean + 0.3, gaussian([0.0] * len(mean), var.tolist(), SCHEDULES[name], target)
    return Guided(network, scale, Cond({"mean": null[None]})), Cond({"mean": mean[None]}), null + scale * (mean - null)


def phi(x: Tensor, t: Tensor, r: Tensor, schedule: NoiseSchedule, mean: Tensor, var: Tensor) -> Tensor:
    """Exact solution of the probability flow from t to r for N(mean, diag var)."""
    (a, s), (a_r, s_r) = ((like(c, x) for c in schedule.alpha_sigma(u)) for u in (t, r))
    return a_r * mean + ((a_r**2 * var + s_r**2) / (a**2 * var + s**2)).sqrt() * (x - a * mean)


def ddim_factor(schedule: NoiseSchedule, t: Tensor, r: Tensor, var: Tensor) -> Tensor:
    """What a DDIM jump from t to r multiplies the distance to alpha mean by, for the exact Gaussian teacher."""
    (a, s), (a_r, s_r) = schedule.alpha_sigma(t), schedule.alpha_sigma(r)
    return (a_r * a * var + s_r * s) / (a**2 * var + s**2)
