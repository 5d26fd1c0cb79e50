"""Every network as one call: (x_t, t, cond) -> Prediction, whatever it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.schedules import NoiseSchedule, like


@dataclass(frozen=True)
class Cond:
    """What a network is conditioned on: named tensors that share a leading batch axis. An empty one has no length."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Cond:
        return Cond({k: v[index] for k, v in self.tensors.items()})

    def take(self, rows: Sequence[int]) -> Cond:
        """These rows, without an index that a device would have to be sent."""
        return Cond({k: torch.stack([v[i] for i in rows]) for k, v in self.tensors.items()})

    def to(self, device: torch.device | str) -> Cond:
        """On a device; whole numbers (lengths, labels) steer and stay on the CPU, where reading them waits for nothing."""
        return Cond({k: v.to(device, non_blocking=True) if v.is_floating_point() else v.cpu() for k, v in self.tensors.items()})

    def expand(self, n: int) -> Cond:
        """A single condition (leading axis 1) for n samples, without copying."""
        return Cond({k: v.expand(n, *v.shape[1:]) for k, v in self.tensors.items()})

    def where(self, keep: Tensor, other: Cond) -> Cond:
        """Row i where keep[i] (B,) is true, row i of `other` elsewhere; what `other` lacks stays."""
        mine = {k: keep.to(v.device).reshape(-1, *([1] * (v.ndim - 1))) for k, v in self.tensors.items()}
        return Cond({k: torch.where(mine[k], v, other.tensors.get(k, v)) for k, v in self.tensors.items()})

    def without(self, null: Cond, n: int) -> Cond:
        """These n conditions with what `null` (leading axis 1) says of "no prompt"; the rest, such as a picture's size, stays."""
        return Cond({**self.tensors, **null.expand(n).tensors})


def cat(conds: Sequence[Cond]) -> Cond:
    """Conditions one after the other along the batch axis."""
    return Cond({k: torch.cat([c.tensors[k] for c in conds]) for k in conds[0].tensors})


# What networks are trained to output, as (A, B) in out = A x0 + B eps at a given (alpha, sigma).
TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),
    "sample": lambda a, s: (torch.ones_like(a), torch.zeros_like(a)),
    "v_prediction": lambda a, s: (-s, a),
    "flow": lambda a, s: (-torch.ones_like(a), torch.ones_like(a)),
}


@dataclass(frozen=True)
class Prediction:
    """A network's opinion of x_t, float32: alpha x0 + sigma eps == x_t. `alpha`, `sigma` are (B, 1, ...)."""

    x0: Tensor
    eps: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def x_t(self) -> Tensor:
        """What it is an opinion of."""
        return self.alpha * self.x0 + self.sigma * self.eps

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the straight path, eps - x0 (flow matching's target)."""
        return self.eps - self.x0

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans and Ho 2022, appendix D; meant for alpha^2 + sigma^2 = 1)."""
        return self.alpha * self.eps - self.sigma * self.x0

    @property
    def score(self) -> Tensor:
        """grad log p(x_t) = -eps / sigma, for sigma > 0."""
        return -self.eps / self.sigma


@dataclass(frozen=True)
class Bound:
    """A network with further inputs, which its family's `call` need not know."""

    net: Callable[..., object]
    inputs: Mapping[str, object]

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.net(*args, **kwargs, **self.inputs)


@dataclass(frozen=True)
class Denoiser:
    """A network, what it was trained on, what it predicts, and how its family is called.

    net: any callable, usually a role of `networks`. target: a key of TARGETS.
    call: (net, x (B, C, *S), time (B,), cond) -> raw output (B, C, *S); the adapters hold one a family.
    dtype: what the network is fed; None leaves x_t as it comes.
    guidance, grid: of a network that takes the guidance scale or the end of its jump (`embedders`), what it is fed where a call
    names neither: that scale, and the next of the deployed times `grid` below t (0 after the last).
    switches: of a mixture of experts (`experts`), the falling times at and below which the next expert answers.

    An epsilon prediction is divided by alpha to give x0, which near t = 999 of SD's table (1 / alpha = 14.65) magnifies the
    rounding of a bfloat16 output as much; `complete` combines in float32 and adds none, but what is there goes only with a
    network in float32, a first step at a cleaner time (SDXL's one-step DMD2: 399) or a teacher that predicts v.
    """

    net: Callable[..., object]
    schedule: NoiseSchedule
    target: str
    call: Callable[[Callable[..., object], Tensor, Tensor, Cond], Tensor]
    dtype: torch.dtype | None = None
    guidance: float | None = None
    grid: tuple[float, ...] = ()
    switches: tuple[float, ...] = ()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, *, g: Tensor | None = None, r: Tensor | None = None) -> Prediction:
        """The prediction at x_t (B, C, *S) and t (B,) in (0, 1], float64 on the CPU.

        g, r: guidance scale and end of the jump (B,), for a network that takes them.
        Raises ValueError where x_t does not determine x0 and eps: t = 0 for a network that predicts x0, zero SNR for one that
        predicts eps."""
        coefficients = self.solve(t)
        exact = torch.promote_types(x_t.dtype, torch.float32)
        time = self.schedule.model_time(t).to(device=x_t.device, dtype=exact, non_blocking=True)
        net = self.told(t, g, r, x_t.device, exact)
        out = self.call(net, x_t if self.dtype is None else x_t.to(self.dtype), time, cond)
        return complete(x_t, out, coefficients)

    def told(
        self, t: Tensor, g: Tensor | None, r: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> Callable[..., object]:
        """The network, with the guidance scale g, the end r (or their defaults) and the experts at t where there are any."""
        if g is None and self.guidance is not None:
            g = torch.full_like(t, self.guidance)
        if r is None and self.grid:
            ends = torch.tensor((0.0, *sorted(self.grid)), dtype=torch.float64)
            r = ends[(torch.searchsorted(ends, t.double() - 1e-9) - 1).clamp(min=0)]
        given = {"guidance_scale": g, "end_time": r}
        inputs: dict[str, object] = {
            k: v.to(device=device, dtype=dtype, non_blocking=True) for k, v in given.items() if v is not None
        }
        if self.switches:
            places = torch.tensor(self.switches, dtype=torch.float64)
            inputs["experts"] = (t.double()[:, None] <= places + 1e-9).sum(1).tolist()
        return Bound(self.net, inputs) if inputs else self.net

    def solve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, A, B) at t, checked to determine a prediction."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        a, b = TARGETS[self.target](alpha, sigma)
        if bool(((a * sigma - b * alpha).abs() < 1e-9).any()):
            where = float(t[(a * sigma - b * alpha).abs() < 1e-9][0])
            raise ValueError(
                f"a network that predicts {self.target!r} leaves x0 open at t = {where:g}; keep that time out of the grid"
            )
        return alpha, sigma, a, b

    def aim(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output for a known (x0, eps): its native regression target."""
        a, b = TARGETS[self.target](*self.schedule.alpha_sigma(t))
        return like(a, x0) * x0 + like(b, x0) * eps

    def native(self, prediction: Prediction, t: Tensor) -> Tensor:
        """The network's own output, recovered from its prediction: pairs with `aim`."""
        return self.aim(prediction.x0, prediction.eps, t)

    def linear_loss(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """`linear_loss` (B,) of samples x (B, C, *S), clean or at level s (B,), at t in the network's native target, which above
        a level is the unbiased one (`kernel_target`)."""
        s = torch.zeros_like(t) if s is None else s
        a, b = TARGETS[self.target](*self.schedule.alpha_sigma(t))
        one, none = torch.ones_like(t), torch.zeros_like(t)
        of_sample, of_noise = (self.schedule.kernel_target(*parts, s, t) for parts in ((one, none), (none, one)))
        mixed = (a * x0 + b * eps for x0, eps in (of_sample, of_noise))
        return linear_loss(x, *self.schedule.kernel(s, t), *mixed)


def linear_loss(x0: Tensor, alpha: Tensor, sigma: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The loss (B,) in the target A x0 + B eps that is left to a denoiser which knows of the law of x0 (B, C, *S) the mean and
    spread of each channel only: (A sigma - B alpha)^2 var / (alpha^2 var + sigma^2), the least there is for a normal law.
    Coefficients are (B,)."""
    alpha, sigma, a, b = (like(c, x0) for c in (alpha, sigma, a, b))
    var = x0.detach().transpose(0, 1).flatten(1).var(1, correction=0).reshape(1, -1, *([1] * (x0.ndim - 2)))
    return ((a * sigma - b * alpha).square() * var / (alpha.square() * var + sigma.square())).flatten(1).mean(1)


def complete(x_t: Tensor, out: Tensor, coefficients: tuple[Tensor, Tensor, Tensor, Tensor]) -> Prediction:
    """Solves A x0 + B eps = out, alpha x0 + sigma eps = x_t for (x0, eps), in float32 (or float64 where x_t is)."""
    x = x_t if x_t.dtype == torch.float64 else x_t.float()
    alpha, sigma, a, b = coefficients
    det = a * sigma - b * alpha
    out = out.to(x.dtype)
    x0 = like(sigma / det, x) * out - like(b / det, x) * x
    eps = like(a / det, x) * x - like(alpha / det, x) * out
    return Prediction(x0, eps, like(alpha, x), like(sigma, x))


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance as a wrapper: u + scale (c - u), both halves in one batch. Scale 1 is no guidance, scale 0 no
    prompt; either is one half alone.

    null: the condition (leading axis 1) that the teacher's own pipeline uses for "no prompt", see `Cond.without`. renorm: what
    some pipelines make of a guided output, (the network's conditional output, the guided one) -> output."""

    denoiser: Denoiser
    scale: float
    null: Cond
    renorm: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def both(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        """(conditional, unconditional) predictions from one call of the network."""
        n = len(x_t)
        joint = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cat([cond, cond.without(self.null, n)]))
        parts = [torch.split(v, n) for v in (joint.x0, joint.eps, joint.alpha, joint.sigma)]
        return Prediction(*(p[0] for p in parts)), Prediction(*(p[1] for p in parts))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, *, g: Tensor | None = None) -> Prediction:
        """The guided prediction; g: a scale for each sample (B,) in place of `scale`."""
        if g is None and self.scale == 1:
            return self.denoiser(x_t, t, cond)
        if g is None and self.scale == 0:
            return self.denoiser(x_t, t, cond.without(self.null, len(x_t)))
        return self.mixed(x_t, t, *self.both(x_t, t, cond), g=g)

    def mixed(self, x_t: Tensor, t: Tensor, c: Prediction, u: Prediction, *, g: Tensor | None = None) -> Prediction:
        """What `both` of x_t at t make under guidance, without another call of the network."""
        if g is None and self.scale in (0, 1):
            return c if self.scale else u
        scale = c.x0.new_full((), self.scale) if g is None else like(g, c.x0)
        mixed = Prediction(torch.lerp(u.x0, c.x0, scale), torch.lerp(u.eps, c.eps, scale), c.alpha, c.sigma)
        if self.renorm is None:
            return mixed
        out = self.renorm(self.denoiser.native(c, t), self.denoiser.native(mixed, t))
        return complete(x_t, out, self.denoiser.solve(t))
