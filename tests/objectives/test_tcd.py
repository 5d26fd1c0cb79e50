"""Random ends, scales that are fed, averaged targets: what `tcd` and the options of `consistency` mean in closed form."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from products import MEAN, VAR, N, Optimum, Told, batch, exact, teachers
from toys import (
    EPS_V_FLOW,
    NOTHING,
    SCHEDULES,
    Counted,
    Exact,
    Gaussian,
    Mixture,
    call,
    ddim_factor,
    denoiser,
    endpoint,
    game,
    gaussian,
    phi,
)

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.grids import first_of_segment, solver_times
from fewstep.objectives.solvers import first_order, second_order
from fewstep.objectives.tcd import TCD
from fewstep.sampling import uniform_grid
from fewstep.stream import stream

GRID = uniform_grid(4)


class Lowest:
    """A stream whose uniform numbers are all 0."""

    def __init__(self):
        self.rng = stream(0, 0, 0, 0)

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def uniform(self, n):
        return torch.zeros(n, dtype=torch.float64)


def loss(objective, student, teacher, *, cond=NOTHING, average=None, rng=None):
    torch.manual_seed(0)
    with torch.no_grad():
        nets = replace(game(student, teacher, grid=uniform_grid(objective.steps)), average=average)
        return objective.student_loss(nets, batch(cond), rng or stream(0, 0, 0, 0)).terms["consistency"]


def midpoint_factor(schedule, t, s, var):
    """What a step of the second-order solver multiplies the distance to alpha mean by: on the straight path, of scale
    1 / (alpha + sigma), the whole step at the velocity of its middle."""
    (a, b), (a_s, b_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    u, u_s = b / (a + b), b_s / (a_s + b_s)
    m = schedule.t_of_ratio((u + u_s) / (2 - u - u_s))
    a_m, b_m = schedule.alpha_sigma(m)
    velocity = (b_m - a_m * var) / (a_m**2 * var + b_m**2)  # of eps - x0, for a distance of one
    return (a_s + b_s) * (1 / (a + b) - (u - u_s) * velocity * ddim_factor(schedule, t, m, var))


@torch.no_grad()
def walked(nets, solver, x, steps):
    """Where so many equal steps from 0.8 to 0.5 lead."""
    for t, s in pairwise(torch.linspace(0.8, 0.5, steps + 1, dtype=torch.float64)):
        x = solver(nets, NOTHING, x, t.expand(N), s.expand(N), None, stream(0, 0, 0, 0))
    return x


@teachers
def test_for_a_gaussian_the_second_solver_is_of_third_order(name, target):
    """The error of its step is h^3 / 48 of the third derivative of the variance c, over c, and c is quadratic in time; steps half
    as long come eight times nearer the exact flow, where the first solver's come twice."""
    x, nets = torch.randn(N, 2, dtype=torch.float64), game(exact(name, target), exact(name, target))
    ends = (torch.full((N,), t, dtype=torch.float64) for t in (0.8, 0.5))
    goal = phi(x, *ends, SCHEDULES[name], MEAN, VAR)
    once, twice = ([(walked(nets, f, x, n) - goal).abs().max() for n in (16, 32)] for f in (first_order, second_order))
    assert once[0] / once[1] == pytest.approx(2, rel=0.1) and twice[0] / twice[1] == pytest.approx(8, rel=0.15)
    assert twice[0] < once[0] / 20


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_for_a_mixture_it_is_of_second_order(name, target):
    law = Mixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).double(), 0.5, torch.tensor([0.3, 0.7]).double())
    teacher, x = denoiser(law, SCHEDULES[name], target), torch.randn(N, 2, dtype=torch.float64)
    goal = walked(game(teacher, teacher), second_order, x, 512)
    far, near = ((walked(game(teacher, teacher), second_order, x, n) - goal).square().mean().sqrt() for n in (16, 32))
    assert far / near == pytest.approx(4, rel=0.15)


def test_the_second_order_asks_the_teacher_twice_guided_alike():
    heard = Counted()
    teacher, student = replace(exact("sd", "epsilon"), call=heard), exact("sd", "epsilon")
    for order, asked in ((1, 1), (2, 2)):
        heard.times.clear()
        loss(TCD(steps=4, solver_steps=20, order=order), student, teacher)
        assert len(heard.times) == asked and all((a > b).all() for a, b in pairwise(heard.times))


@teachers
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("segments", [1, 4])
def test_a_student_that_is_told_its_end_meets_all_ends_at_once(name, target, segments, order):
    objective, schedule = TCD(segments=segments, solver_steps=20, end_input=True, sampler="ddim", order=order), SCHEDULES[name]
    net = Told(schedule, target, solver_times(GRID, 20), factor=(ddim_factor, midpoint_factor)[order - 1])
    assert loss(objective, Denoiser(net, schedule, target, call), exact(name, target)).max() < 1e-6
    i, j = (torch.cat(x) for x in zip(*net.ends, strict=True))
    assert (j < i).all()  # no jump is empty, on an edge neither
    assert (j >= first_of_segment(20, segments)[i]).all()
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) > (100 if segments == 1 else 30)


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
@pytest.mark.parametrize("objective", [TCD(steps=1, solver_steps=20), TCD(segments=4, solver_steps=20)], ids=["one", "four"])
def test_without_being_told_no_student_is_at_rest(name, target, objective):
    """consistency.md 3.1 (c): the eps of an exact jump depends on its end. Not the teacher, not the student that knows where the
    exact flow ends, nor the one at which `consistency` is at rest, whose end is always the lower edge."""
    fixed = Consistency(steps=objective.steps, segments=objective.segments, solver_steps=20)
    optimum = denoiser(Optimum(fixed, SCHEDULES[name], uniform_grid(objective.steps)), SCHEDULES[name], target)
    flow = denoiser(Gaussian(MEAN.tolist(), VAR.tolist(), endpoint), SCHEDULES[name], target)
    assert loss(fixed, optimum, exact(name, target)).max() < 1e-9
    for student in (exact(name, target), flow, optimum):
        assert loss(objective, student, exact(name, target)).mean() > 1e-4


@teachers
def test_where_all_ends_are_clean_it_is_consistency_of_one_segment(name, target):
    """consistency.md 3.1 (b): s = 0 is LCM without c_skip; each of the times of its solver is among the samples."""
    student = gaussian([0.3, 0.1], [0.5, 0.6], SCHEDULES[name], target)
    here, there = (kind(segments=1, solver_steps=20) for kind in (TCD, Consistency))
    found = loss(here, student, exact(name, target), rng=Lowest())
    assert torch.equal(found, loss(there, student, exact(name, target)))
    assert not torch.allclose(found, loss(here, student, exact(name, target)))


@teachers
def test_with_a_segment_a_solver_step_the_teacher_is_the_optimum(name, target):
    """Hyper-SD: k = N segments is to match the teacher step by step."""
    assert loss(TCD(solver_steps=4, segments=4), exact(name, target), exact(name, target)).max() < 1e-9


def test_one_solver_step_in_all_is_one_step_of_consistency():
    student, teacher = gaussian([0.3, 0.1], [0.5, 0.6], SCHEDULES["flow"], "flow"), exact("flow", "flow")
    torch.testing.assert_close(
        loss(TCD(steps=1, solver_steps=1), student, teacher), loss(Consistency(steps=1, solver_steps=1), student, teacher)
    )


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
@pytest.mark.parametrize("segments", [1, 4])
def test_one_network_that_is_fed_the_scale_is_the_optimum_at_every_scale(name, target, segments):
    """LCM with full weights: at scale g the guided Gaussian's mean is null + g (mean - null)."""
    schedule, null = SCHEDULES[name], MEAN + 0.3
    mean = lambda m: Cond({"mean": m[None]})  # noqa: E731
    objective = Consistency(segments=segments, solver_steps=20, guidance=(1.0, 6.0))
    assert objective.needs.inputs == ("guidance_scale",)
    seen = []

    def fed(net, x, time, cond, guidance_scale):
        seen.append(guidance_scale)
        net.clean.mean = null + guidance_scale[:, None] * (MEAN - null)
        return net(x, time, cond)

    network = Exact(Optimum(objective, schedule, GRID), schedule, target)
    student = Denoiser(lambda x, time, cond, **given: fed(network, x, time, cond, **given), schedule, target, call)
    teacher = Guided(denoiser(Gaussian([0.0, 0.0], VAR.tolist()), schedule, target), 99.0, mean(null))
    assert loss(objective, student, teacher, cond=mean(MEAN).expand(N)).max() < 1e-8
    assert seen[0].min() < 1.2 and seen[0].max() > 5.8 and torch.equal(seen[0], seen[1])


def test_targets_come_from_the_average_where_there_is_one():
    schedule, objective = SCHEDULES["flow"], Consistency(steps=1, solver_steps=20, average=0.95)
    student, other = (gaussian([m, 0.1], [0.5, 0.6], schedule, "flow") for m in (0.3, -2.0))
    assert objective.needs.average == 0.95
    alone, same, apart = (loss(objective, student, exact("flow", "flow"), average=a) for a in (None, student, other))
    assert torch.equal(alone, same) and not torch.allclose(alone, apart)


def test_no_c_is_the_mean_squared_error():
    student, teacher = gaussian([0.3, 0.1], [0.5, 0.6], SCHEDULES["flow"], "flow"), exact("flow", "flow")
    squared = loss(Consistency(steps=1, solver_steps=1, huber=None), student, teacher)
    wide = loss(Consistency(steps=1, solver_steps=1, huber=1e3), student, teacher)
    torch.testing.assert_close(squared, 2e3 * wide, rtol=1e-4, atol=1e-7)  # sqrt(d^2 + c^2) - c = d^2 / 2c for a large c


@pytest.mark.parametrize("kind", [Consistency, TCD])
def test_a_range_of_scales_that_falls_is_refused(kind):
    with pytest.raises(ValueError, match=r"a range of scales, \[lowest, highest\], not \[6.0, 2.0\]"):
        kind(guidance=(6.0, 2.0))
