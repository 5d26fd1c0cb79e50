"""Shortcuts in closed form: the optimum is a product of the Gaussian teacher's DDIM factors, whatever the length of the jump."""

from dataclasses import replace

import pytest
import torch
from jumping import jumper
from products import MEAN, VAR, N, Told, batch, exact, teachers
from toys import NOTHING, SCHEDULES, Counted, Gaussian, call, denoiser, game

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.objectives.grids import solver_times
from fewstep.objectives.shortcut import Shortcut, goals, halves
from fewstep.sampling import ddim, sample, uniform_grid
from fewstep.stream import stream

PARTS = 16


def told(name, target, steps=1, mean=MEAN, grid=()):
    schedule = SCHEDULES[name]
    return Denoiser(Told(schedule, target, solver_times(uniform_grid(steps), PARTS), mean), schedule, target, call, grid=grid)


def loss(student, teacher, *, cond=NOTHING, steps=1, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        nets = game(student, teacher, grid=uniform_grid(steps))
        objective = Shortcut(steps=steps, solver_steps=PARTS, **options)
        return objective.student_loss(nets, batch(cond), stream(0, 0, 0, 0)).terms["shortcut"]


@teachers
@pytest.mark.parametrize("steps", [1, 4])
def test_the_student_whose_jumps_are_products_of_the_teachers_steps_is_at_rest(name, target, steps):
    student = told(name, target, steps)
    assert loss(student, exact(name, target), steps=steps).max() < 1e-9
    start, end = (torch.cat(x) for x in zip(*student.net.ends, strict=True))
    assert set((start - end).tolist()) == {1, 2, 4, 8, 16}
    assert (start % (start - end) == 0).all()
    assert loss(told(name, target, steps, MEAN + 0.3), exact(name, target), steps=steps).mean() > 1e-3


@teachers
def test_one_student_draws_in_any_power_of_two_of_steps_what_the_teacher_draws_in_all(name, target):
    noise, rng = torch.randn(N, 2, dtype=torch.float64), stream(0, 0, 0, 0)
    whole = sample(exact(name, target), noise, uniform_grid(PARTS), NOTHING, step=ddim, rng=rng)
    for steps in (1, 2, 4, 16):
        grid = uniform_grid(steps)
        drawn = sample(told(name, target, grid=grid), noise, grid, NOTHING, step=ddim, rng=rng)
        torch.testing.assert_close(drawn, whole, rtol=1e-7, atol=1e-7)


@teachers
def test_the_exact_mean_velocity_is_that_of_two_half_jumps(name, target):
    """consistency.md 6.2, on schedules where the halves are of unequal length on the straight path too."""
    student, x = jumper(name, target), torch.randn(N, 2, dtype=torch.float64)
    t, m, r = (torch.full((N,), u, dtype=torch.float64) for u in (0.9, 0.6, 0.1))
    goal = halves(student, NOTHING, x, t, m, r, stream(0, 0, 0, 0))
    torch.testing.assert_close(goal, student(x, t, NOTHING, r=r).velocity, rtol=1e-9, atol=1e-9)


@teachers
def test_the_shortest_jump_is_the_teachers_and_nobody_is_asked_in_vain(name, target):
    """Of a mixed batch the teacher sees the shortest jumps, the average the others, twice."""
    by_teacher, by_average, times = Counted(), Counted(), solver_times((1.0,), PARTS)
    teacher = replace(exact(name, target), call=by_teacher)
    nets = replace(game(told(name, target), teacher), average=replace(told(name, target), call=by_average))
    i, length = Shortcut(solver_steps=PARTS).drawn(N, stream(0, 0, 0, 0))
    x, short = torch.randn(N, 2, dtype=torch.float64), length == 1
    found = goals(nets, NOTHING, x, times, i, length, stream(0, 0, 0, 0))
    assert [len(x) for x in by_teacher.inputs] == [short.sum()] and [len(x) for x in by_average.inputs] == [(~short).sum()] * 2
    assert short.double().mean() == pytest.approx(0.25, abs=0.1)
    torch.testing.assert_close(found[short], teacher(x, times[i], NOTHING).velocity[short])
    for only, counts in ((torch.ones_like(i), (1, 0)), (torch.full_like(i, 2), (0, 2))):
        before = len(by_teacher.inputs), len(by_average.inputs)
        goals(nets, NOTHING, x, times, torch.full_like(i, 4), only, stream(0, 0, 0, 0))
        assert (len(by_teacher.inputs) - before[0], len(by_average.inputs) - before[1]) == counts


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_guidance_moves_the_optimum_by_the_distance_of_the_means(name, target):
    mean, null = lambda m: Cond({"mean": m[None]}), MEAN + 0.3
    teacher = Guided(denoiser(Gaussian([0.0, 0.0], VAR.tolist()), SCHEDULES[name], target), 4.0, mean(null))
    cond = mean(MEAN).expand(N)
    assert loss(told(name, target, mean=null + 4.0 * (MEAN - null)), teacher, cond=cond).max() < 1e-9
    assert loss(told(name, target), teacher, cond=cond).mean() > 1e-3


def test_targets_are_the_averages_and_have_no_graph():
    student, other = jumper("flow", "flow"), jumper("flow", "flow", MEAN + 1)
    assert Shortcut(average=0.9).needs.average == 0.9 and Shortcut().needs.inputs == ("end_time",)
    nets, given = game(student, exact("flow", "flow")), batch()
    alone, same, apart = (
        Shortcut().student_loss(replace(nets, average=a), given, stream(0, 0, 0, 0)) for a in (None, student, other)
    )
    assert torch.equal(alone.total, same.total) and not torch.allclose(alone.total, apart.total)
    apart.total.backward()
    assert all(p.grad.abs().max() > 0 for p in student.net.parameters())
    assert all(p.grad is None for net in (nets.teacher.net, other.net) for p in net.parameters())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"steps": 3}, "steps must be a power of two, not 3"),
        ({"solver_steps": 100}, "solver_steps must be a power of two, not 100"),
        ({"steps": 8, "solver_steps": 4}, r"solver_steps \(4\) must be at least 2 and at least steps \(8\)"),
        ({"instant": 1.0}, "instant is a share of samples"),
    ],
)
def test_lengths_that_do_not_halve_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Shortcut(**options)
