"""Worlds whose denoisers are known exactly, for any schedule and any target, and small students that learn in them.

A `clean` module maps (x (B, D), t, alpha, sigma, named conditions) to x0; `denoiser` makes it speak a network's native target, so
that every test goes through the Denoiser that real networks use.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.denoiser import TARGETS, Cond, Denoiser, Guided
from fewstep.experts import PhasedExperts, hand_over, switches
from fewstep.heads import KINDS, Discriminator
from fewstep.objectives import Batch, Nets, Objective
from fewstep.sampling import STEPS, Step, renoise, sample, uniform_grid
from fewstep.schedules import EDM, DiscreteVP, NoiseSchedule, RectifiedFlow, TrigFlow, like
from fewstep.stream import Stream, stream
from fewstep.taps import Taps
from fewstep.weighting import Weighting

T = TypeVar("T")
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


def players(
    alpha: float, sigma: float, mean: float, std: float, own_mean: float, own_std: float, target: str
) -> tuple[Denoiser, Denoiser, Denoiser]:
    """One-step student of N(own_mean, own_std^2), teacher of N(mean, std^2), and the student's optimal critic, at one level."""
    level = OneLevel(alpha, sigma)
    student = denoiser(Linear(own_mean, own_std), level, target)
    return student, gaussian([mean], [std**2], level, target), gaussian([own_mean], [own_std**2], level, target)


def phi(x: Tensor, t: Tensor, r: Tensor, schedule: NoiseSchedule, mean: Tensor, var: Tensor) -> Tensor:
    """Exact solution of the probability flow from t to r for N(mean, diag var)."""
    (a, s), (a_r, s_r) = ((like(c, x) for c in schedule.alpha_sigma(u)) for u in (t, r))
    return a_r * mean + ((a_r**2 * var + s_r**2) / (a**2 * var + s**2)).sqrt() * (x - a * mean)


def ddim_factor(schedule: NoiseSchedule, t: Tensor, r: Tensor, var: Tensor) -> Tensor:
    """What a DDIM jump from t to r multiplies the distance to alpha mean by, for the exact Gaussian teacher."""
    (a, s), (a_r, s_r) = schedule.alpha_sigma(t), schedule.alpha_sigma(r)
    return (a_r * a * var + s_r * s) / (a**2 * var + s**2)


class Jump(nn.Module):
    """The network whose DDIM jump from t to the end that it is told is exact for N(mean, diag var); at r = t the posterior.

    A negative end is told apart: it asks for the law `twin` at |r|, where there is one."""

    def __init__(
        self, mean: Tensor, var: Tensor, schedule: NoiseSchedule, target: str, twin: tuple[Tensor, Tensor] | None = None
    ):
        super().__init__()
        self.mean, self.var = nn.Parameter(mean.clone()), nn.Parameter(var.clone())
        self.schedule, self.target, self.twin = schedule, target, twin

    def forward(self, x: Tensor, time: Tensor, cond: Cond, *, end_time: Tensor) -> Tensor:
        schedule, t, r = self.schedule, heard(self.schedule, time), end_time
        fake = like(r < 0, x).bool()
        mean, var = (torch.where(fake, b, a) for a, b in zip((self.mean, self.var), self.twin or (self.mean, self.var)))
        (a, s), (a_r, s_r) = ((like(c, x) for c in schedule.alpha_sigma(u)) for u in (t, r.abs()))
        x_r = a_r * mean + ((a_r**2 * var + s_r**2) / (a**2 * var + s**2)).sqrt() * (x - a * mean)
        apart = a_r * s - s_r * a
        here = apart < 1e-9  # where the jump is empty
        jumped = (s * x_r - s_r * x) / torch.where(here, 1.0, apart)
        x0 = torch.where(here, mean + posterior(a, s, var) * (x - a * mean), jumped)
        b, c = TARGETS[self.target](a, s)
        return b * x0 + c * (x - a * x0) / s


class Learner(nn.Module):
    """A frozen exact network plus a small trained one that starts at zero, so that the student starts as its teacher."""

    def __init__(self, base: Exact, dim: int, width: int = 64, inputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.schedule = base.schedule
        object.__setattr__(self, "base", base)  # borrowed: its weights are not this network's
        last = nn.Linear(width, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(dim + 6 + len(self.inputs), width)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor, time: Tensor, cond: Cond, **inputs: Tensor) -> Tensor:
        assert inputs.keys() == set(self.inputs)
        t = heard(self.schedule, time)
        waves = [f(np.pi * k * t) for k in (0.5, 1, 2) for f in (torch.sin, torch.cos)]
        waves += [inputs[name] for name in self.inputs]
        return self.base(x, time, cond) + self.mlp(torch.cat([x, torch.stack(waves, -1).to(x)], -1))


class ToyHeads(nn.Module):
    """Heads (B, 1) on one tap of a world without space."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.mlp(features[0])


@dataclass(frozen=True)
class World:
    """A ring of eight modes in the plane, an exact teacher on the straight path, and players that start as copies of it."""

    nets: Nets
    players: dict[str, nn.Module]
    truth: Mixture
    pairs: tuple[Tensor, Tensor] | None = None  # noise, and what the teacher draws from it

    def batch(self, n: int) -> Batch:
        if self.pairs is None:
            return Batch(NOTHING, (n, 2), self.truth.draw(n))
        chosen = torch.randint(len(self.pairs[0]), (n,))
        return Batch(NOTHING, (n, 2), self.pairs[1][chosen], self.pairs[0][chosen])

    def sampled(self, n: int = 2000) -> Tensor:
        """What the student draws as deployed."""
        rng = stream(7, 0, 0, "noise")
        with torch.no_grad():
            return sample(self.nets.student, rng.normal((n, 2)), self.nets.grid, NOTHING, step=self.nets.step, rng=rng)

    def many_steps(self, n: int = 2000) -> Tensor:
        """What the teacher draws in a hundred steps."""
        rng = stream(8, 0, 0, "noise")
        return sample(self.nets.teacher, rng.normal((n, 2)), uniform_grid(100), NOTHING, rng=rng)


def ring(objective: Objective, dtype: torch.dtype | None = None) -> World:
    """The world for an objective, with the grid and the step its student is deployed with."""
    angles = torch.arange(8) * (2 * np.pi / 8)
    truth = Mixture(torch.stack([angles.cos(), angles.sin()], -1), 0.1, torch.full((8,), 1 / 8))
    schedule = RectifiedFlow()
    base = Exact(truth, schedule, "flow")
    needs, grid = objective.needs, uniform_grid(objective.steps)
    heads, takes = needs.heads, {"student": needs.inputs}
    players = {
        name: Learner(base, 2, inputs=takes.get(name, ())).to(dtype or torch.float32)
        for name in ("student", *needs.roles)
        if name not in ("heads", "weighting")
    }
    roles = {name: Denoiser(net, schedule, "flow", call, dtype) for name, net in players.items()}
    if (phases := objective.needs.phases) > 1:
        players["student"] = PhasedExperts("student", [Learner(base, 2).to(dtype or torch.float32) for _ in range(phases)], call)
        places = switches(uniform_grid(objective.steps), phases)
        roles["student"] = replace(roles["student"], net=players["student"], call=hand_over, switches=places)
    scale, ends = 1.0 if "guidance_scale" in needs.inputs else None, grid if "end_time" in needs.inputs else ()
    roles["student"] = replace(roles["student"], guidance=scale, grid=ends)
    teacher = Denoiser(base, schedule, "flow", call)
    if "weighting" in needs.roles:
        roles["weighting"] = players["weighting"] = Weighting()
    if "heads" in objective.needs.roles:
        learns = heads.backbone == "critic"
        block, width = (players["critic"].mlp[3], 64) if learns else (base.clean, 2)
        players["heads"] = ToyHeads(width * KINDS[heads.kind].eyes)  # float32, as always
        judging = roles["critic"] if learns else teacher
        roles["judge"] = Discriminator(judging, Taps({"tap": block}, (width,)), players["heads"])
    pairs = None
    if objective.needs.pairs:
        rng = stream(9, 0, 0, "noise")
        noise = rng.normal((2048, 2))
        pairs = noise, sample(teacher, noise, uniform_grid(50), NOTHING, rng=rng)
    step = STEPS[objective.sampler or "ddim"]
    guided = teacher if scale is None else Guided(teacher, 1.0, NOTHING)
    return World(Nets(teacher=guided, grid=grid, step=step, **roles), players, truth, pairs)


def play(
    objective: Objective, world: World, rounds: int, batch: int, lr: float, seed: int = 0, schedule: str = "constant"
) -> None:
    """The trainer in miniature: turns in order, one Adam a player, all draws from (seed, round, turn); cosine: the student's
    rate falls to zero."""
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=lr, fused=True) for name, net in world.players.items()}
    first = {name: copy.deepcopy(world.players[name].state_dict()) for name in objective.needs.restarts}
    torch.manual_seed(seed)  # for the data
    for round_ in range(rounds):
        if schedule == "cosine":
            optimizers["student"].param_groups[0]["lr"] = lr * (1 + np.cos(np.pi * round_ / rounds)) / 2
        for i, turn in enumerate(objective.round(round_)):
            for name, net in world.players.items():
                net.requires_grad_(name in turn.movers)
            if turn.fresh:
                world.players[turn.player].load_state_dict(first[turn.player])
                optimizers[turn.player].state.clear()
            turn.loss(world.nets, world.batch(batch), stream(seed, 0, round_, i)).total.backward()
            for name in turn.movers:
                optimizers[name].step()
                optimizers[name].zero_grad()


def sliced_w2(x: Tensor, y: Tensor, num_directions: int = 64) -> float:
    """Wasserstein-2 distance of two equally large samples (N, 2), root mean square over directions."""
    angles = torch.arange(num_directions) * (np.pi / num_directions)
    directions = torch.stack([angles.cos(), angles.sin()]).to(x)
    return float(((x @ directions).sort(0)[0] - (y @ directions).sort(0)[0]).square().mean().sqrt())


@dataclass
class Quadrature:
    """A Stream that draws the nodes of Gauss and Hermite's rule: a weighted sum over its batch is the expectation, exactly, for
    polynomials of degree below 2 nodes - 1 in each draw."""

    num_draws: int
    num_nodes: int = 6
    k: int = 0
    drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(self.num_nodes))
        self.nodes = torch.cartesian_prod(*[z] * self.num_draws).reshape(-1, self.num_draws)
        self.weights = torch.cartesian_prod(*[w / w.sum()] * self.num_draws).reshape(-1, self.num_draws).prod(1)

    @property
    def shared(self) -> "Quadrature":
        return self

    def __len__(self) -> int:
        return len(self.weights)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        self.drawn += 1
        return self.nodes[:, self.drawn - 1].reshape(tuple(shape))

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape)

    def uniform(self, n: int) -> Tensor:
        return torch.full((n,), 0.5, dtype=torch.float64)

    def integer(self, high: int) -> int:
        return self.k

    def mean(self, term: Tensor) -> Tensor:
        """The expectation of a per-sample term (B,)."""
        return (self.weights * term).sum()


class Double:
    """A stream whose noise is float64, and whose walks have a given length, or by default the longest."""

    def __init__(self, rng: Stream, length: int | None = None) -> None:
        self.rng, self.length = rng, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return self.rng.normal(shape, torch.float64)

    @property
    def shared(self) -> "Double":
        return self

    def integer(self, high: int) -> int:
        return high - 1 if self.length is None else self.length


@dataclass(frozen=True)
class Joined:
    """A Stream in float64 that draws what several processes draw, each for n samples, end to end: one process's draws for all of
    their samples. A draw for k batches at once has its k parts joined apart."""

    streams: tuple[Stream, ...]
    n: int

    @cached_property
    def shared(self) -> Stream:
        return self.streams[0].shared  # the same one on every process

    def child(self, name: int | str) -> "Joined":
        return Joined(tuple(s.child(name) for s in self.streams), self.n)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return self._joined(lambda s, n: s.normal((n, *shape[1:]), torch.float64), shape[0])

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape)

    def uniform(self, n: int) -> Tensor:
        return self._joined(Stream.uniform, n)

    def gaussian(self, n: int) -> Tensor:
        return self._joined(Stream.gaussian, n)

    def integers(self, high: int, n: int) -> Tensor:
        return self._joined(lambda s, n: s.integers(high, n), n)

    def _joined(self, draw: Callable[[Stream, int], Tensor], n: int) -> Tensor:
        parts = [draw(s, n // len(self.streams)).unflatten(0, (-1, self.n)) for s in self.streams]
        return torch.cat(parts, 1).flatten(0, 1)


def side_by_side(run: Callable[[int, Callable[[Tensor], Tensor]], T], n: int = 2) -> list[T]:
    """What n processes find that run at once: `run(rank, everywhere)`, with `Nets.everywhere` as the mean over all of them."""
    said: list[list[Tensor]] = [[] for _ in range(n)]
    barrier, turn = threading.Barrier(n, timeout=60), threading.Lock()  # one at a time, since they share their networks

    def process(rank: int) -> T:
        def everywhere(x: Tensor) -> Tensor:
            said[rank].append(x.detach())
            turn.release()
            barrier.wait()
            turn.acquire()
            return torch.stack([one[len(said[rank]) - 1] for one in said]).mean(0)

        with turn:
            return run(rank, everywhere)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(process, range(n)))


def game(
    student: Denoiser,
    teacher: Denoiser | Guided | None,
    critic: Denoiser | None = None,
    *,
    grid: Sequence[float] = (1.0,),
    step: Step = renoise,
) -> Nets:
    """Nets with the given players; one step unless a grid says otherwise."""
    return Nets(student=student, teacher=teacher, grid=tuple(grid), step=step, critic=critic)


def reverse_kl(a: float, sig: float, mu: float, s: float, m: float, r: float) -> tuple[float, float]:
    """(sigma / alpha)^2 d KL(student_t || teacher_t) / d (m, r) for N(m, r^2) against N(mu, s^2): O1."""
    v_s, v_r = a**2 * s**2 + sig**2, a**2 * r**2 + sig**2
    return (m - mu) * sig**2 / v_s, a**2 * sig**2 * r * (r**2 - s**2) / (v_r * v_s)


def expected_gradient(
    objective: Objective, nets: Nets, rng: Quadrature, batch: Batch | None = None, term: str = "dm"
) -> list[float]:
    """E[d term / d (mean, std)] of a one-step student N(mean, std^2), exactly."""
    losses = objective.student_loss(nets, batch or Batch(NOTHING, (len(rng), 1)), rng)
    clean = nets.student.net.clean
    return [g.item() for g in torch.autograd.grad(rng.mean(losses.terms[term]), [clean.mean, clean.std])]
