from dataclasses import replace

import pytest
import torch
from products import MEAN, VAR, N, Optimum, batch, exact, teachers
from toys import EPS_V_FLOW, NOTHING, SCHEDULES, Gaussian, Linear, denoiser, endpoint, game, guided, times

from fewstep.denoiser import Denoiser
from fewstep.losses import pseudo_huber
from fewstep.objectives.consistency import Consistency
from fewstep.sampling import ddim, sample, shifted, uniform_grid
from fewstep.stream import stream

phases = pytest.mark.parametrize("segments", [1, 4])


def loss(objective, student, teacher, *, grid=None, cond=NOTHING, seed=0):
    with torch.no_grad():
        nets = game(student, teacher, grid=grid or uniform_grid(objective.steps))
        return objective.student_loss(nets, batch(cond), stream(seed, 0, 0, 0)).terms["consistency"]


# The grid


@phases
@pytest.mark.parametrize("grid", [uniform_grid(4), shifted(uniform_grid(4), 3.0)])
def test_a_jump_is_never_empty_and_ends_at_a_deployed_time(segments, grid):
    objective = Consistency(segments=segments, solver_steps=20)
    t, edges = objective.times(grid)
    assert len(t) == 21 and t[0] == 0 and (t.diff() > 0).all()
    assert (edges[1:] <= t[:-1]).all()
    assert set(edges.tolist()) == {0.0, *sorted(grid)[4 // segments - 1 : -1 : 4 // segments]}
    assert set(grid) <= set(t.tolist())


def test_an_edge_belongs_to_the_segment_below_it():
    t, edges = Consistency(segments=4, solver_steps=20).times(uniform_grid(4))
    at = dict(zip(t.tolist(), edges.tolist()))
    assert [at[u] for u in (0.25, 0.5, 0.75, 1.0)] == [0.0, 0.25, 0.5, 0.75]
    assert t[6] > 0.25 and edges[6] == 0.25


def test_one_segment_goes_all_the_way_to_clean():
    assert (Consistency(segments=1).times(uniform_grid(4))[1] == 0).all()


def test_segments_are_steps_unless_said():
    a, b = (Consistency(segments=segments).times(uniform_grid(4))[1] for segments in (None, 4))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segments": 3}, r"segments \(3\) must divide steps \(4\)"),
        (
            {"segments": 2},
            "no sampler draws in 4 steps with jumps to the edges of 2 segments; set steps to 2, or objective: {name: tcd",
        ),
        ({"huber": 0.0}, "huber must be positive, not 0.0"),
        ({"segments": 8}, r"segments \(8\) must divide steps \(4\)"),
        ({"solver_steps": 42}, r"solver_steps \(42\) must be a multiple of steps \(4\)"),
    ],
)
def test_counts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**options)


# The loss


@teachers
@phases
def test_the_loss_vanishes_at_the_product_of_ddim_factors(name, target, segments):
    """LCM (one segment) and PCM invariant (a), exactly, at every pair of neighbouring times and for any noised sample."""
    objective, schedule = Consistency(segments=segments, solver_steps=20), SCHEDULES[name]
    student = denoiser(Optimum(objective, schedule, uniform_grid(4)), schedule, target)
    assert loss(objective, student, exact(name, target)).max() < 1e-9


@teachers
def test_the_loss_does_not_vanish_at_the_continuous_optimum_or_at_the_teacher(name, target):
    """consistency.md 2, invariant (b): the optimum is that of the discrete grid."""
    objective = Consistency(segments=1, solver_steps=20)
    assert loss(objective, exact(name, target), exact(name, target)).mean() > 1e-3


class Here:
    """A stream whose integers all lie at one share of their range."""

    def __init__(self, share):
        self.share, self.rng = share, stream(0, 0, 0, 0)

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def integers(self, high, n):
        return torch.full((n,), round(self.share * high) - 1)


@teachers
@pytest.mark.parametrize("t", [0.4, 0.8, 1.0])
def test_at_the_continuous_optimum_a_step_leaves_a_residual_of_its_square(name, target, t):
    """consistency.md 2, invariant (b): O(h^2), there 1.8e-2, 4.6e-3, 1.2e-3, 2.9e-4 for steps that are halved."""
    student = denoiser(Gaussian(MEAN.tolist(), VAR.tolist(), endpoint), SCHEDULES[name], target)

    def residual(solver_steps):
        objective = Consistency(steps=1, solver_steps=solver_steps, huber=None)
        with torch.no_grad():
            torch.manual_seed(0)
            losses = objective.student_loss(game(student, exact(name, target)), batch(), Here(t))
        assert (losses.landing.t == t).all()
        return losses.total.sqrt()

    whole, half, quarter = (residual(n) for n in (50, 100, 200))
    assert whole / half == pytest.approx(4, rel=0.15) and half / quarter == pytest.approx(4, rel=0.15)
    assert quarter > 1e-8


@teachers
def test_with_a_segment_a_solver_step_the_teacher_is_the_optimum(name, target):
    assert loss(Consistency(solver_steps=4), exact(name, target), exact(name, target)).max() < 1e-12


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
@phases
def test_the_optimum_as_deployed_is_the_teachers_many_steps(name, target, segments):
    """The student's steps, as many as it has segments, compose to the teacher's DDIM: from the noise end to clean."""
    objective, schedule, noise = Consistency(segments=segments, solver_steps=20), SCHEDULES[name], torch.randn(4, 2).double()
    student = denoiser(Optimum(objective, schedule, uniform_grid(4)), schedule, target)
    few = sample(student, noise, uniform_grid(segments), NOTHING, rng=stream(0, 0, 0, 0))
    many = sample(exact(name, target), noise, uniform_grid(20), NOTHING, rng=stream(0, 0, 0, 0))
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
@phases
def test_guidance_moves_the_optimum_by_the_distance_of_the_means(name, target, segments):
    """consistency.md 2, invariant (c), with g = 1 + w."""
    schedule, objective, grid = SCHEDULES[name], Consistency(segments=segments, solver_steps=20), uniform_grid(4)
    teacher, cond, mean = guided(name, target, MEAN, VAR)
    moved = denoiser(Optimum(objective, schedule, grid, mean), schedule, target)
    plain = denoiser(Optimum(objective, schedule, grid), schedule, target)
    assert loss(objective, moved, teacher, cond=cond.expand(N)).max() < 1e-9
    assert loss(objective, plain, teacher, cond=cond.expand(N)).mean() > 1e-2
    assert loss(objective, plain, replace(teacher, scale=1.0), cond=cond.expand(N)).max() < 1e-9


def test_at_the_edge_the_target_is_the_teachers_point_itself():
    """With as many solver steps as segments every s is an edge: what the student says of x_s is not listened to."""
    schedule, objective = SCHEDULES["flow"], Consistency(solver_steps=4, huber=0.1)
    student, teacher = denoiser(Linear(0.3, -0.5), schedule, "flow"), exact("flow", "flow")
    rng, given = stream(0, 0, 0, 0), batch()
    i = 1 + rng.integers(4, N)
    t, s = i / 4, (i - 1) / 4
    x_t = schedule.add_noise(given.latents, rng.normal_like(given.latents), t)
    x_s = ddim(schedule, teacher(x_t, t.double(), NOTHING), s, rng)
    landed = ddim(schedule, student(x_t, t.double(), NOTHING), s, rng)
    found = objective.student_loss(game(student, teacher, grid=uniform_grid(4)), given, stream(0, 0, 0, 0)).terms["consistency"]
    torch.testing.assert_close(found, pseudo_huber(landed, x_s, 0.1))


def test_inside_a_segment_the_target_is_the_students_own_jump_from_the_teachers_point():
    """LCM: both sides jump to clean; the target carries no gradient."""
    schedule, objective = SCHEDULES["flow"], Consistency(steps=1, solver_steps=4, huber=0.1)
    student, teacher = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), schedule, "flow"), exact("flow", "flow")
    rng, given = stream(0, 0, 0, 0), batch()
    i = 1 + rng.integers(4, N)
    t, s = i.double() / 4, (i.double() - 1) / 4
    x_t = schedule.add_noise(given.latents, rng.normal_like(given.latents), t)
    x_s = ddim(schedule, teacher(x_t, t, NOTHING), s, rng).detach()
    target = torch.where((i == 1)[:, None], x_s, student(x_s, s.clamp(min=0.25), NOTHING).x0).detach()
    expected = pseudo_huber(student(x_t, t, NOTHING).x0, target, 0.1)
    losses = objective.student_loss(game(student, teacher), given, stream(0, 0, 0, 0))
    torch.testing.assert_close(losses.terms["consistency"], expected)
    parameters = list(student.net.parameters())
    for a, b in zip(*(torch.autograd.grad(v.mean(), parameters) for v in (losses.total, expected))):
        torch.testing.assert_close(a, b)


def test_the_boundary_is_the_identity():
    """The jump from a time to itself gives the input back, for any student: no c_skip is needed."""
    schedule, x, t = SCHEDULES["sd"], torch.randn(3, 2).double(), times(0.25, 0.5, 0.75)
    prediction = denoiser(Linear(0.3, -0.5), schedule, "epsilon")(x, t, NOTHING)
    torch.testing.assert_close(ddim(schedule, prediction, t, stream(0, 0, 0, 0)), x)


def test_only_the_student_gets_a_gradient():
    schedule = SCHEDULES["sd"]
    student, teacher = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), schedule, "epsilon"), exact("sd", "epsilon")
    (turn,) = Consistency(solver_steps=8).round(0)
    turn.loss(game(student, teacher, grid=uniform_grid(4)), batch(), stream(0, 0, 0, 0)).total.backward()
    assert turn.player == "student"
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.net.parameters())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_a_network_is_never_asked_where_it_knows_nothing():
    """At s = 0 an x0-predicting network would be refused; the loss must not ask it there."""
    asked = []

    def call(net, x, time, cond):
        asked.append(time)
        return net(x, time, cond)

    schedule = SCHEDULES["sd"]
    student = Denoiser(exact("sd", "sample").net, schedule, "sample", call)
    loss(Consistency(solver_steps=8), student, exact("sd", "sample"))
    assert torch.cat(asked).min() >= 124
