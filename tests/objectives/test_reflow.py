import pytest
import torch
from straight import MEAN, STD, N, Straight, pairs, teachers
from toys import NOTHING, SCHEDULES, Counted, Linear, denoiser, game, gaussian

from fewstep.objectives.reflow import Reflow, Regression, huber
from fewstep.sampling import ddim, renoise, sample, uniform_grid
from fewstep.stream import stream
from fewstep.times import UShaped


@teachers
def test_reflow_rests_at_straight_lines_which_one_step_follows(name, target):
    student, given = denoiser(Straight(), SCHEDULES[name], target), pairs()
    losses = Reflow().student_loss(game(student, None), given, stream(0, 0, 0, 0))
    assert losses.terms["reflow"].max() < 1e-9
    for steps in (1, 4) if name.startswith("flow") else (1,):
        drawn = sample(
            student, SCHEDULES[name].prior(given.noise), uniform_grid(steps), NOTHING, step=ddim, rng=stream(0, 0, 0, 0)
        )
        torch.testing.assert_close(drawn, given.latents, rtol=1e-7, atol=1e-7)


@teachers
def test_reflow_compares_velocities_on_the_straight_path(name, target):
    """(noise - sample) against eps - x0 on x_u = (1 - u) sample + u noise, whatever the student's own schedule."""
    student, given, schedule = gaussian(MEAN.tolist(), (STD**2).tolist(), SCHEDULES[name], target), pairs(), SCHEDULES[name]
    found = Reflow(huber=0.1).student_loss(game(student, None), given, stream(0, 0, 0, 0)).terms["reflow"]
    u = UShaped().sample(N, stream(0, 0, 0, 0))
    t = schedule.t_of_ratio(u / (1 - u))
    inside, t = (t > 1e-3) & (t < 1), t.clamp(1e-3)
    prediction = student(schedule.add_noise(given.latents, given.noise, t), t, NOTHING)
    expected = huber(prediction.velocity, given.noise - given.latents, 0.1)
    assert inside.sum() > N / 3
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-6, atol=1e-8)


def test_at_the_noise_end_of_a_table_reflow_feeds_pure_noise():
    heard, given = Counted(), pairs()
    student = denoiser(Straight(), SCHEDULES["sd"], "epsilon", heard)
    Reflow().student_loss(game(student, None), given, stream(0, 0, 0, 0))
    end = (heard.times[0] - 999).abs() < 1e-6
    assert 20 < end.sum() < N / 2 and torch.equal(heard.inputs[0][end], given.noise[end])


def test_u_shaped_times_are_dense_at_both_ends():
    t = UShaped(4.0).sample(20_000, stream(0, 0, 0, 0)).sort()[0]
    top = torch.tensor(4.0).double().exp()
    cdf = ((4 * t).exp() - 1 + top - (4 * (1 - t)).exp()) / (2 * (top - 1))
    assert (cdf - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 0.02
    with pytest.raises(ValueError, match="must be positive"):
        UShaped(0.0)


@pytest.mark.parametrize("seed", range(4))
def test_regression_teaches_one_step_of_the_students_deterministic_walk(seed):
    """Though it is deployed with fresh noise; the student that goes straight is at rest wherever it is taught."""
    heard, given = Counted(), pairs()
    student = denoiser(Straight(), SCHEDULES["flow"], "flow", heard)
    nets = game(student, None, grid=uniform_grid(3), step=renoise)
    losses = Regression(steps=3).student_loss(nets, given, stream(seed, 0, 0, 0))
    assert len(heard.times) == 1 + stream(seed, 0, 0, 0).shared.integer(3)
    assert losses.terms["regression"].max() < 1e-6
    learner = denoiser(Linear(0.3, 0.8), SCHEDULES["flow"], "flow", again := Counted())
    Regression(steps=3).student_loss(game(learner, None, grid=uniform_grid(3)), given, stream(seed, 0, 0, 0))
    assert again.with_graph == [False] * (len(heard.times) - 1) + [True]


@teachers
def test_regression_is_the_distance_of_one_step_from_the_pairs_sample(name, target):
    student, given = denoiser(Linear(0.3, 0.8), SCHEDULES[name], target), pairs()
    losses = Regression(huber=0.0).student_loss(game(student, None), given, stream(0, 0, 0, 0))
    expected = (0.3 + 0.8 * given.noise - given.latents).square().mean(1).sqrt()
    torch.testing.assert_close(losses.terms["regression"], expected, rtol=1e-5, atol=1e-5)
    losses.total.backward()
    assert all(p.grad.abs() > 0 for p in student.net.parameters())


def test_the_distance_is_smooth_at_zero_and_a_norm_far_away():
    a = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(huber(a, torch.zeros(1, 4), 0.0).sum(), a)
    assert (grad == 0).all()
    assert float(huber(torch.full((1, 4), 100.0), torch.zeros(1, 4), 0.03)) == pytest.approx(99.97, abs=1e-3)
