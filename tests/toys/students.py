"""Small students that learn in exact worlds: who plays, the playing of an objective's turns, and how near it came."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.denoiser import TARGETS, Cond, Denoiser, Guided
from fewstep.experts import PhasedExperts, hand_over, switches
from fewstep.heads import KINDS, Discriminator
from fewstep.objectives import Batch, Nets, Objective
from fewstep.sampling import STEPS, Step, renoise, sample, uniform_grid
from fewstep.schedules import NoiseSchedule, RectifiedFlow, like
from fewstep.stream import stream
from fewstep.taps import Taps
from fewstep.weighting import Weighting
from toys.streams import Quadrature
from toys.teachers import NOTHING, Exact, Linear, Mixture, OneLevel, call, denoiser, gaussian, heard, posterior


def players(
    alpha: float, sigma: float, mean: float, std: float, own_mean: float, own_std: float, target: str
) -> tuple[Denoiser, Denoiser, Denoiser]:
    """One-step student of N(own_mean, own_std^2), teacher of N(mean, std^2), and the student's optimal critic, at one level."""
    level = OneLevel(alpha, sigma)
    student = denoiser(Linear(own_mean, own_std), level, target)
    return student, gaussian([mean], [std**2], level, target), gaussian([own_mean], [own_std**2], level, target)


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
