"""Consistency training from data: levels, their mapping, and what a pair's loss is."""

import sys

import pytest
import torch
from products import VAR, batch
from toys import NOTHING, SCHEDULES, Gaussian, denoiser, endpoint, game, gaussian, times

from fewstep.losses import sample_huber
from fewstep.objectives import Batch
from fewstep.objectives.ect import ECT, from_data, level
from fewstep.objectives.ict import ICT
from fewstep.sampling import uniform_grid
from fewstep.stream import stream

WORLDS = pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])


def test_the_lower_level_rises_to_the_upper_one_stage_by_stage():
    n, objective = torch.tensor([0.01, 0.5, 1.9, 2.0, 20.0]).double(), ECT()
    stages = torch.stack([objective.lower(n, j) for j in range(12)])
    assert stages[0, :3].tolist() == [0, 0, 0] and stages[0, 3] > 0  # q^-1 (1 + 8 sigmoid(-n)) = 1 at n = 1.946
    assert (stages.diff(dim=0) >= 0).all() and (stages < n).all()
    torch.testing.assert_close(stages[3], n * (1 - (1 + 8 / (1 + n.exp())) / 16))
    torch.testing.assert_close(objective.lower(n, 40), n * 0.999)


@WORLDS
def test_from_clean_data_it_is_denoising(name, target):
    """Below the first level: the target is the data itself, whatever the student thinks, and the gap that of the level to 0."""
    student, given, schedule = gaussian([0.3, 0.1], [0.5, 0.6], SCHEDULES[name], target), batch(), SCHEDULES[name]
    t, s = torch.linspace(0.1, 1, 256).double(), torch.full((256,), 0.0005).double()
    n, m = torch.full((256,), 2.0).double(), torch.full((256,), 0.5).double()
    rng = stream(0, 0, 0, 0)
    x_t = schedule.add_noise(given.latents, rng.normal_like(given.latents), t)
    expected = (student(x_t, t, NOTHING).x0 - given.latents).norm(dim=1) / 2
    found = from_data(game(student, None), given, stream(0, 0, 0, 0), t, s, n, m, 0.0)
    torch.testing.assert_close(found.terms["consistency"], expected)


@WORLDS
def test_both_points_of_a_pair_share_their_noise_and_the_target_has_no_graph(name, target):
    schedule, given = SCHEDULES[name], batch()
    student = gaussian([0.3, 0.1], [0.5, 0.6], schedule, target)
    t, s, gap = times(0.8, 0.5).repeat(128), times(0.4, 0.25).repeat(128), times(1.5, 0.5).repeat(128)
    eps = stream(0, 0, 0, 0).normal_like(given.latents)
    high, low = (student(schedule.add_noise(given.latents, eps, u), u, NOTHING).x0 for u in (t, s))
    expected = sample_huber(high, low.detach(), 0.03) / gap
    found = from_data(game(student, None), given, stream(0, 0, 0, 0), t, s, 2 + gap, torch.full_like(gap, 2.0), 0.03).terms[
        "consistency"
    ]
    torch.testing.assert_close(found, expected)
    parameters = list(student.net.parameters())
    for a, b in zip(*(torch.autograd.grad(v.mean(), parameters) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@WORLDS
def test_training_on_data_pulls_as_distilling_the_exact_teacher_does_in_the_limit(name, target):
    """consistency.md 5.2: for neighbouring levels the gradient of squared differences is that of the exact flow's step."""
    schedule, gap = SCHEDULES[name], 1e-3
    student = denoiser(Gaussian([0.4, -1.0], [0.5, 1.0], endpoint), schedule, target)
    parameters = list(student.net.parameters())
    t = schedule.t_of_ratio(torch.full((200_000,), 1.0).double())
    s = schedule.t_of_ratio(torch.full((200_000,), 1.0 - gap).double())
    x0 = torch.tensor([0.4, -1.0]).double() + VAR.sqrt() * torch.randn(200_000, 2).double()
    x_t = schedule.add_noise(x0, stream(0, 0, 0, 0).normal_like(x0), t)
    teacher = gaussian([0.4, -1.0], VAR.tolist(), schedule, target)(x_t, t, NOTHING)
    (a, b), prediction = schedule.alpha_sigma(s), student(x_t, t, NOTHING).x0
    with torch.no_grad():
        ahead = student(a[:, None] * teacher.x0 + b[:, None] * teacher.eps, s, NOTHING).x0
    given = Batch(NOTHING, x0.shape, x0)
    # with so large a huber constant, half of the squared difference
    trained = from_data(
        game(student, None), given, stream(0, 0, 0, 0), t, s, torch.full_like(t, 1.0), torch.full_like(t, 1.0 - gap), 1.0
    ).total.mean()
    distilled = (prediction - ahead).square().sum(1).mean() / (2 * gap)
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (trained, distilled)]
    assert grads[1].norm() > 0.01
    torch.testing.assert_close(grads[0], grads[1], rtol=0.05, atol=0.05 * float(grads[1].norm()))


def test_ict_doubles_its_grid_up_to_the_last():
    objective = ICT(first=10, last=80, rounds=400)
    assert [objective.intervals(k) for k in (0, 99, 100, 199, 200, 300, 10_000)] == [10, 10, 20, 20, 40, 80, 80]
    n, chance = objective.levels(40, 80.0)
    assert len(n) == 41 and len(chance) == 40 and (n.diff() > 0).all()
    torch.testing.assert_close(n[[0, -1]], times(0.002, 80.0))
    torch.testing.assert_close(chance.sum(), times(1.0)[0])
    middle = float(chance @ (n[1:] * n[:-1]).sqrt().log())
    assert abs(middle + 1.1) < 0.15  # the log-normal's mean


@WORLDS
@pytest.mark.parametrize("objective", [ECT(), ICT(last=160)])
def test_a_pair_is_weighed_by_the_levels_that_it_is_asked_at(name, target, objective, monkeypatch):
    """A DDPM table begins at 0.029, far above the grid's least level, 0.002."""
    seen = []
    module = sys.modules[type(objective).__module__]
    monkeypatch.setattr(
        module, "from_data", lambda nets, batch, rng, *pair: seen.append(pair) or from_data(nets, batch, rng, *pair)
    )
    (turn,) = objective.round(objective.needs.rounds)
    student = gaussian([0.3, 0.1], [0.5, 0.6], SCHEDULES[name], target)
    turn.loss(game(student, None, grid=uniform_grid(2)), batch(), stream(0, 0, 0, 0))
    ((t, s, n, m, _),) = seen
    inside = level(SCHEDULES[name], t) < 70  # beyond, the noise end of a straight path has no level
    torch.testing.assert_close(n[inside], level(SCHEDULES[name], t)[inside])
    asked = s >= 0.001
    torch.testing.assert_close(m[asked], level(SCHEDULES[name], s)[asked])


@WORLDS
@pytest.mark.parametrize("objective", [ECT(huber=0.01), ECT(top=1.0), ICT()])
def test_the_noisiest_deployed_time_is_trained_and_no_time_below_the_table(name, target, objective):
    asked = []

    def note(net, x, time, cond):
        asked.append(SCHEDULES[name].t_of_model_time(time.double()))
        return net(x, time, cond)

    student = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), SCHEDULES[name], target, note)
    for step in (0,) * 12 + (2500,):
        (turn,) = objective.round(step)
        rng = stream(len(asked), 0, 0, 0)
        found = turn.loss(game(student, None, grid=uniform_grid(2)), batch(), rng).terms["consistency"]
        assert found.isfinite().all()
    seen = torch.cat(asked)
    assert seen.min() > 0.0009 and seen.max() <= 1 + 1e-9 and (seen > 0.9999).any()
    assert level(SCHEDULES[name], times(0.5)).isfinite().all()
