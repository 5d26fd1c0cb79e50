from dataclasses import replace

import pytest
import torch
from jumping import MEAN, VAR, N, clean, exact, jumper, teachers
from toys import EPS_V_FLOW, NOTHING, SCHEDULES, game, guided, phi

from fewstep.losses import mse
from fewstep.matched import Matched
from fewstep.objectives import Batch
from fewstep.objectives.meanflow import FLOW, MeanFlow, residual
from fewstep.sampling import ddim, sample
from fewstep.schedules import like
from fewstep.stream import stream
from fewstep.tangents import DERIVATIVES, jvp


def asked(student, objective=None):
    """(t, r, x_t): what is drawn in training, with the whole trajectory and empty jumps among it."""
    f = Matched(student, FLOW)
    t, r = (objective or MeanFlow(instant=0.3)).times(N, stream(0, 0, 0, 0), f)
    t[:2], r[:2] = f.highest, 0.0
    return t, r, FLOW.add_noise(clean(), torch.randn(N, 2, dtype=torch.float64), t)


@teachers
@pytest.mark.parametrize("derivative, tolerance", [("jvp", 1e-7), ("difference", 2e-4)])
def test_the_mean_velocity_of_the_exact_flow_leaves_no_residual(name, target, derivative, tolerance):
    student, teacher = jumper(name, target), exact(name, target)
    t, r, x_t = asked(student)
    assert (t == r).any() and (r == 0).any()
    error = residual(game(student, teacher), Batch(NOTHING, (N, 2)), x_t, t, r, DERIVATIVES[derivative])[0]
    assert error.abs().max() < tolerance
    other = jumper(name, target, MEAN + 0.3)
    assert residual(game(other, teacher), Batch(NOTHING, (N, 2)), x_t, t, r, jvp)[0].abs().max() > 0.05


@teachers
def test_the_toy_jumps_exactly_and_in_parts_alike(name, target):
    student, schedule = jumper(name, target), SCHEDULES[name]
    t, r, _ = (torch.full((N,), v, dtype=torch.float64) for v in (0.9, 0.2, 0.0))
    x = schedule.add_noise(clean(), torch.randn(N, 2, dtype=torch.float64), t)
    end = phi(x, t, r, schedule, MEAN, VAR)
    torch.testing.assert_close(ddim(schedule, student(x, t, NOTHING, r=r), r, stream(0, 0, 0, 0)), end)
    m = (t + r) / 2
    x_m = ddim(schedule, student(x, t, NOTHING, r=m), m, stream(0, 0, 0, 0))
    torch.testing.assert_close(ddim(schedule, student(x_m, m, NOTHING, r=r), r, stream(0, 0, 0, 0)), end)
    # and the velocity on the straight path is the mean one there
    t, r, x_t = asked(student)
    f, moving = Matched(student, FLOW), t - r > 1e-3
    gone = (x_t - phi(x_t, t, r, FLOW, MEAN, VAR)) / like(t - r, x_t)
    torch.testing.assert_close(f(x_t, t, NOTHING, r=r).velocity[moving], gone[moving], rtol=1e-6, atol=1e-6)


@teachers
def test_where_the_jump_is_empty_the_teachers_velocity_is_learned(name, target):
    student, teacher = jumper(name, target, MEAN + 0.3), exact(name, target)
    t, _, x_t = asked(student)
    error, stats = residual(game(student, teacher), Batch(NOTHING, (N, 2)), x_t, t, t, jvp)
    gap = Matched(student, FLOW)(x_t, t, NOTHING, r=t).velocity - Matched(teacher, FLOW)(x_t, t, NOTHING).velocity
    torch.testing.assert_close(error, gap)
    assert error.isfinite().all() and stats["slope"] == 0


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("flow", "flow")])
def test_a_student_of_any_count_of_steps_draws_the_teachers_law(name, target):
    """Mean and spread of what it draws are those of the exact map from noise."""
    z = torch.randn(4000, 2, dtype=torch.float64)
    for grid in ((1.0,), (1.0, 0.5), (1.0, 0.6, 0.3)):
        x = sample(jumper(name, target, grid=grid), z, grid, NOTHING, step=ddim, rng=stream(0, 0, 0, 0))
        whole = torch.ones(len(z), dtype=torch.float64)
        torch.testing.assert_close(x, phi(z, whole, 0 * whole, SCHEDULES[name], MEAN, VAR))


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_guidance_moves_the_flow_by_the_distance_of_the_means(name, target):
    teacher, cond, mean = guided(name, target, MEAN, VAR)

    def largest(centre):
        student = jumper(name, target, centre)
        t, r, x_t = asked(student)
        return residual(game(student, teacher), Batch(cond.expand(N), (N, 2)), x_t, t, r, jvp)[0].abs().max()

    assert largest(mean) < 1e-7 < 0.05 < largest(MEAN)


@teachers
def test_the_gradient_is_the_papers_and_nobody_else_has_one(name, target):
    student, teacher, given = jumper(name, target, MEAN + 0.3), exact(name, target), clean()
    objective, batch = MeanFlow(floor=0.01, power=0.75), Batch(NOTHING, (N, 2), given)
    total = objective.student_loss(game(student, teacher), batch, stream(3, 0, 0, 0)).total
    rng, f = stream(3, 0, 0, 0), Matched(student, FLOW)
    t, r = objective.times(N, rng, f)
    x_t = FLOW.add_noise(given, rng.normal_like(given), t)
    u = f(x_t, t, NOTHING, r=r).velocity
    goal = (u - residual(game(student, teacher), batch, x_t, t, r, jvp)[0]).detach()
    far = mse(u, goal)
    expected = 0.5 * (far / (far.detach() + 0.01) ** 0.75 / f.lever("flow", t)).mean()
    torch.testing.assert_close(total, expected)
    parameters = list(student.net.parameters())
    for a, b in zip(*(torch.autograd.grad(v, parameters, retain_graph=True) for v in (total, expected))):
        torch.testing.assert_close(a, b)
    total.backward()
    assert all(p.grad is None for p in teacher.net.parameters())


@teachers
def test_the_output_is_pushed_as_hard_at_every_level_whatever_it_is(name, target):
    """With power 1/2 the velocity's gradient has one size, but epsilon's would have 1 + sigma / alpha times that."""
    student, outputs = jumper(name, target, MEAN + 0.3), []

    def watched(*asked):
        outputs.append(student.call(*asked))
        if outputs[-1].requires_grad:
            outputs[-1].retain_grad()
        return outputs[-1]

    nets = game(replace(student, call=watched), exact(name, target))
    batch = Batch(NOTHING, (N, 2), clean())
    MeanFlow(floor=1e-12, std=3.0, instant=0.0).student_loss(nets, batch, stream(3, 0, 0, 0)).total.backward()
    pushed = outputs[-1].grad.square().mean(1).sqrt() * 2 * N
    torch.testing.assert_close(pushed, torch.ones_like(pushed), rtol=1e-6, atol=1e-6)


def test_times_are_sorted_end_at_the_clean_end_and_meet_where_asked():
    f = Matched(exact("sd", "epsilon"), FLOW)
    t, r = MeanFlow(std=3.0, instant=0.25).times(2000, stream(0, 0, 0, 0), f)
    assert ((f.lowest <= t) & (t <= f.highest)).all() and (r <= t).all()
    assert (r == 0).any() and not ((r > 0) & (r < f.lowest)).any()
    assert (r == t).double().mean() == pytest.approx(0.25, abs=0.08)
    with pytest.raises(ValueError, match="share of samples"):
        MeanFlow(instant=1.0)
