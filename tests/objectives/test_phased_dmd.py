"""Phased DMD against closed forms: what it matches, at which level, and who learns when."""

import pytest
import torch
from torch import nn
from toys import (
    NOTHING,
    SCHEDULES,
    Counted,
    Gaussian,
    Linear,
    Quadrature,
    denoiser,
    game,
    gaussian,
    play,
    ring,
    times,
)

from fewstep.config import parse
from fewstep.objectives import Batch
from fewstep.objectives.dmd import DMD
from fewstep.objectives.phased_dmd import PhasedDMD
from fewstep.sampling import ddim, uniform_grid
from fewstep.stream import stream

KINDS = [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow"), ("trig", "v_prediction")]
GRID = (1.0, 0.5)
FAR = 1e9  # a floor above every distance: the normaliser is a constant


class Carried(nn.Module):
    """E[x0 | x_t] as the score of a law says it that is N(mean, std^2) at level s and was brought to t."""

    def __init__(self, mean, std, s, schedule):
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (mean, std))
        self.s, self.schedule = s, schedule

    def forward(self, x, t, alpha, sigma, cond):
        scale, noise = (v[:, None] for v in self.schedule.kernel(torch.full_like(t, self.s), t))
        score = -(x - scale * self.mean) / (scale**2 * self.std**2 + noise**2)
        return (x + sigma**2 * score) / alpha


def at(schedule, t):
    return (v.item() for v in schedule.alpha_sigma(times(t)))


def arrival(schedule, m, r, s):
    """(mean, std) at s of what the student m + r z stands on after one step from pure noise, and d mean / d m."""
    (a_1, sig_1), (a_s, sig_s) = at(schedule, 1.0), at(schedule, s)
    c = a_s - sig_s * a_1 / sig_1
    return c * m, c * r + sig_s / sig_1, c


@pytest.mark.parametrize(("name", "target"), KINDS)
@pytest.mark.parametrize("rest", [False, True])
def test_the_gradient_is_that_of_the_divergence_at_the_end_of_the_phase(name, target, rest):
    """T15: (sigma_t^2 / (alpha_t scale)) d KL(student_t || teacher_t), both brought to t from s; zero where they agree at s."""
    schedule, s, mu, spread = SCHEDULES[name], GRID[1], 0.4, 0.9
    a_s, sig_s = at(schedule, s)
    c = arrival(schedule, 0, 0, s)[2]
    m, r = -0.3, 0.6
    if rest:
        goal = (a_s**2 * spread**2 + sig_s**2) ** 0.5
        m, r = a_s * mu / c, (goal - arrival(schedule, 0, 0, s)[1]) / c
    mean, std, _ = arrival(schedule, m, r, s)
    student = denoiser(Linear(m, r), schedule, target)
    critic = denoiser(Carried(mean, std, s, schedule), schedule, target)
    nets = game(student, gaussian([mu], [spread**2], schedule, target), critic, grid=GRID, step=ddim)
    rng = Quadrature(2)
    objective = PhasedDMD(steps=2, floor=FAR)
    losses = objective.student_loss(0, nets, Batch(NOTHING, (len(rng), 1)), rng)
    found = torch.autograd.grad(FAR * rng.mean(losses.terms["dm"]), list(student.net.parameters()))

    t = s + (1 - s) * (objective.low + 0.5 * (objective.high - objective.low))
    a_t, sig_t = at(schedule, t)
    scale, noise = (v.item() for v in schedule.kernel(times(s), times(t)))
    v_student, v_teacher = scale**2 * std**2 + noise**2, a_t**2 * spread**2 + sig_t**2
    weight = sig_t**2 / (a_t * scale)
    d_mean = (scale * mean - a_t * mu) / v_teacher * scale * c
    d_std = (1 / v_teacher - 1 / v_student) * scale**2 * std * c
    assert [g.item() for g in found] == pytest.approx([weight * d_mean, weight * d_std], rel=1e-8, abs=1e-9)
    if rest:
        assert [g.item() for g in found] == pytest.approx([0, 0], abs=1e-8)


@pytest.mark.parametrize(("name", "target"), KINDS)
def test_the_critic_learns_the_law_at_the_end_of_the_phase(name, target):
    """Its exact score of the carried law has nothing to learn; with (noise, x_s) as the target it would."""
    schedule, s, m, r = SCHEDULES[name], GRID[1], -0.3, 0.6
    mean, std, _ = arrival(schedule, m, r, s)
    critic = denoiser(Carried(mean, std, s, schedule), schedule, target)
    nets = game(denoiser(Linear(m, r), schedule, target), None, critic, grid=GRID, step=ddim)
    rng = Quadrature(2)
    losses = PhasedDMD(steps=2).critic_loss(0, nets, Batch(NOTHING, (len(rng), 1)), rng)
    slopes = torch.autograd.grad(rng.mean(losses.terms["denoise"]), list(critic.net.parameters()))
    assert [g.item() for g in slopes] == pytest.approx([0, 0], abs=1e-9)
    with torch.no_grad():
        critic.net.clean.mean += 0.1
    rng = Quadrature(2)
    losses = PhasedDMD(steps=2).critic_loss(0, nets, Batch(NOTHING, (len(rng), 1)), rng)
    assert abs(torch.autograd.grad(rng.mean(losses.terms["denoise"]), critic.net.clean.mean)[0].item()) > 1e-3


@pytest.mark.parametrize(("name", "target"), KINDS)
def test_an_exact_critic_above_a_level_loses_what_the_monitors_hold_it_against(name, target):
    schedule, s, m, r, n = SCHEDULES[name], GRID[1], -0.3, 0.6, 100_000
    mean, std, _ = arrival(schedule, m, r, s)
    critic = denoiser(Carried(mean, std, s, schedule), schedule, target)
    nets = game(denoiser(Linear(m, r), schedule, target), None, critic, grid=GRID, step=ddim)
    with torch.no_grad():
        losses = PhasedDMD(steps=2).critic_loss(0, nets, Batch(NOTHING, (n, 1)), stream(0, 0, 0, 0))
    assert losses.total.item() == pytest.approx(losses.stats["denoise_linear"].item(), rel=0.03)


@pytest.mark.parametrize("phase", [0, 1])
def test_a_phase_asks_no_expert_but_its_own_for_gradients(phase):
    """Earlier experts draw what the later ones begin with, and stay as they were; the later ones are not even asked."""
    objective = PhasedDMD(steps=4, phases=2)
    world = ring(objective)
    objective.student_loss(phase, world.nets, world.batch(16), stream(0, 0, 0, 0)).total.backward()
    learnt = [[p.grad is not None for p in expert.parameters()] for expert in world.players["student"].experts]
    assert not any(learnt[1 - phase]) and any(learnt[phase])


@pytest.mark.parametrize(("name", "target"), KINDS)
@pytest.mark.parametrize("most", [10.0, 1.5])
def test_close_above_the_end_of_the_phase_the_critic_learns_less(name, target, most):
    """A sample weighs min(1, most std^2 / sigma_t^2), std^2 = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2."""
    schedule, s, n, seen = SCHEDULES[name], GRID[1], 256, Counted()
    student, critic = denoiser(Linear(-0.3, 0.6), schedule, target), denoiser(Gaussian([0.2], [0.5]), schedule, target, seen)
    nets = game(student, None, critic, grid=GRID, step=ddim)

    def loss(most):
        losses = PhasedDMD(steps=2, most=most).critic_loss(0, nets, Batch(NOTHING, (n, 1)), stream(0, 0, 0, 0))
        return losses.terms["denoise"].detach().double()

    found = loss(most) / loss(1e9)
    (a_s, sig_s), (a_t, sig_t) = at(schedule, s), schedule.alpha_sigma(schedule.t_of_model_time(seen.times[0].double()))
    wanted = (most * (1 - (a_t * sig_s / (a_s * sig_t)) ** 2)).clamp(max=1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert 2 <= (wanted < 1).sum() < n and (seen.times[0] == seen.times[1]).all()


@pytest.mark.parametrize(("name", "target"), KINDS)
@pytest.mark.parametrize("player", ["student", "critic"])
def test_one_phase_is_dmd_to_the_bit(name, target, player):
    """T14, T23."""
    schedule = SCHEDULES[name]

    def played(objective):
        nets = game(
            denoiser(Gaussian([0.3, -1.0], [0.5, 2.0]).float(), schedule, target),
            gaussian([0.1, 0.2], [0.3, 1.0], schedule, target),
            denoiser(Gaussian([0.0, 0.0], [1.0, 1.0]).float(), schedule, target),
            grid=uniform_grid(3),
            step=ddim,
        )
        turn = next(turn for turn in objective.round(5) if turn.player == player)
        losses = turn.loss(nets, Batch(NOTHING, (32, 2)), stream(0, 0, 3, 1))
        grads = torch.autograd.grad(losses.total, list(getattr(nets, player).net.parameters()))
        return [*losses.terms.values(), losses.sample, *grads]

    pairs = zip(played(DMD(steps=3)), played(PhasedDMD(steps=3, phases=1)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_each_phase_moves_its_own_expert_and_the_critic_starts_anew():
    objective = PhasedDMD(steps=4, phases=2, phase_rounds=2, critic_turns=2)
    assert [[turn.fresh for turn in objective.round(i)] for i in range(5)] == [
        [False] * 3,
        [False] * 3,
        [True, False, False],
        [False] * 3,
        [False] * 3,
    ]
    world = ring(objective)
    student, critic = world.players["student"], world.players["critic"]
    copied = [[v.clone() for v in net.state_dict().values()] for net in (*student.experts, critic)]

    def moved():
        nets = (*student.experts, critic)
        return [
            any(not torch.equal(a, b) for a, b in zip(net.state_dict().values(), old, strict=True))
            for net, old in zip(nets, copied, strict=True)
        ]

    play(objective, world, 2, 32, 1e-3)
    assert moved() == [True, False, True]
    copied[0] = [v.clone() for v in student.experts[0].state_dict().values()]
    play(objective, world, 4, 32, 1e-3)  # from the start again, so expert 0 moves on
    assert moved() == [True, True, True]


@pytest.mark.parametrize(
    ("student", "objective", "train", "says"),
    [
        ({"phases": 3}, {}, {}, "objective phased_dmd is set to 2 phases; leave student.phases away"),
        ({}, {"steps": 3}, {}, "3 steps cannot be shared out over 2 phases; choose a multiple"),
        ({}, {}, {"rounds": 150}, "train.rounds: objective phased_dmd, set like this, needs at least 151 rounds, not 150"),
        ({"phases": 3}, {"name": "dmd"}, {}, "student.phases: 4 steps cannot be shared out over 3 experts"),
    ],
)
def test_phases_that_do_not_go_together_are_refused(student, objective, train, says):
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "data": {"prompts": "zoo:sprites"}}
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        parse({**tree, "student": student, "objective": {"name": "phased_dmd", **objective}, "train": train})
