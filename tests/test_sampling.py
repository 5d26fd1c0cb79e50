from itertools import pairwise

import numpy as np
import pytest
import torch
from jumping import jumper
from toys import NOTHING, SCHEDULES, TEACHERS, Counted, Gaussian, ddim_factor, denoiser, endpoint, gaussian, phi, times

from fewstep.sampling import STEPS, ddim, renoise, rollout, sample, shifted, tcd, uniform_grid
from fewstep.schedules import like
from fewstep.stream import rows, stream

MEAN, VAR = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.25, 2.0]).double()
teachers = pytest.mark.parametrize("name, target", TEACHERS)
RNG = stream(0, 0, 0, 0)


def teacher(name, target):
    return gaussian(MEAN.tolist(), VAR.tolist(), SCHEDULES[name], target)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def states(n=4):
    return torch.randn(n, 2, dtype=torch.float64)


def half(name):
    return times(0.5, 0.625, 0.75, 0.875)


@teachers
def test_ddim_to_the_same_level_is_the_identity(name, target):
    x_t, t = states(), half(name)
    close(ddim(SCHEDULES[name], teacher(name, target)(x_t, t, NOTHING), t, RNG), x_t, 1e-9)


@teachers
def test_ddim_to_zero_is_the_predicted_x0(name, target):
    p = teacher(name, target)(states(), half(name), NOTHING)
    assert torch.equal(ddim(SCHEDULES[name], p, torch.zeros(4), RNG), p.x0)


def test_ddim_is_each_familys_own_first_order_step():
    """consistency.md 0.2: Euler on the straight path, rotation for TrigFlow, Karras' Euler for EDM."""
    x, t, s = states(), half("flow"), times(0.25, 0.5, 0.625, 0.5)
    p = teacher("flow", "flow")(x, t, NOTHING)
    close(ddim(SCHEDULES["flow"], p, s, RNG), x + (s - t)[:, None] * p.velocity, 1e-12)
    p = teacher("trig", "v_prediction")(x, t, NOTHING)
    turn = ((t - s) * torch.pi / 2)[:, None]
    close(ddim(SCHEDULES["trig"], p, s, RNG), turn.cos() * x - turn.sin() * p.v, 1e-12)
    p = teacher("edm", "sample")(x, t, NOTHING)
    ratio = (SCHEDULES["edm"].alpha_sigma(s)[1] / SCHEDULES["edm"].alpha_sigma(t)[1])[:, None]
    close(ddim(SCHEDULES["edm"], p, s, RNG), p.x0 + ratio * (x - p.x0), 1e-12)


@teachers
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ddim_on_a_gaussian_is_a_product_of_factors(name, target, steps):
    schedule, noise, grid = SCHEDULES[name], states(), uniform_grid(steps)
    factor = torch.ones(2, dtype=torch.float64)
    for t, s in zip(grid, [*grid[1:], 0.0], strict=True):
        factor = factor * ddim_factor(schedule, times(t), times(s), VAR)
    start = like(schedule.alpha_sigma(times(1.0))[0], noise)
    close(sample(teacher(name, target), noise, grid, NOTHING, rng=RNG), MEAN + factor * (noise - start * MEAN), 1e-5)


@teachers
def test_ddim_converges_to_the_probability_flow_at_first_order(name, target):
    schedule, noise, low = SCHEDULES[name], states(), 0.25
    exact = phi(noise, torch.ones(4), torch.full((4,), low).double(), schedule, MEAN, VAR)

    def error(n):
        grid = [1 - (1 - low) * i / n for i in range(n)]
        with torch.no_grad():
            *_, last = rollout(teacher(name, target), noise, grid, NOTHING, rng=RNG)
        return (ddim(schedule, last.prediction, torch.full((4,), low).double(), RNG) - exact).norm().item()

    counts = [32, 64, 128]
    errors = [error(n) for n in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.12), errors


def test_tcd_without_noise_is_ddim():
    p, s = teacher("sd", "epsilon")(states(), half("sd"), NOTHING), times(0.25, 0.5, 0.625, 0.5)
    close(tcd(0.0)(SCHEDULES["sd"], p, s, RNG), ddim(SCHEDULES["sd"], p, s, RNG), 1e-12)


def test_tcd_with_all_noise_is_renoise():
    p, s = teacher("sd", "epsilon")(states(), half("sd"), NOTHING), times(0.25, 0.5, 0.625, 0.5)
    a, b = (step(SCHEDULES["sd"], p, s, stream(3, 0, 0, 0)) for step in (tcd(1.0), renoise))
    close(a, b, 1e-12)


def test_tcd_jumps_below_and_returns_by_the_kernel():
    schedule, n, gamma = SCHEDULES["flow"], 200_000, 0.4
    x_t = torch.full((n, 1), 0.7, dtype=torch.float64)
    p = gaussian([0.4], [0.25], schedule, "flow")(x_t, torch.full((n,), 0.75).double(), NOTHING)
    below, s = times(0.3), times(0.5)
    landed = ddim(schedule, p, below.expand(n), RNG)[0, 0]
    scale, std = schedule.kernel(below, s)
    x_s = tcd(gamma)(schedule, p, s.expand(n), stream(1, 0, 0, 0))
    assert x_s.mean().item() == pytest.approx((scale * landed).item(), abs=5 * std.item() / n**0.5)
    assert x_s.std().item() == pytest.approx(std.item(), rel=5 / (2 * n) ** 0.5)


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_tcd_refuses_a_share_outside_its_range(gamma):
    with pytest.raises(ValueError, match="share of noise"):
        tcd(gamma)


N = 40_000


def assert_marginal(x, schedule, t):
    """x (N, 2) has the mean and the variance of the world's x_t within five standard errors."""
    alpha, sigma = schedule.alpha_sigma(times(t))
    var = alpha**2 * VAR + sigma**2
    assert ((x.mean(0) - alpha * MEAN).abs() < 5 * (var / N).sqrt()).all()
    assert ((x.var(0) / var - 1).abs() < 5 * (2 / N) ** 0.5).all()


def at_the_noise_end(schedule):
    alpha, sigma = schedule.alpha_sigma(times(1.0))
    return alpha * MEAN + (alpha**2 * VAR + sigma**2).sqrt() * torch.randn(N, 2, dtype=torch.float64)


@teachers
def test_renoising_chains_of_the_exact_student_are_stationary(name, target):
    """T17: every state has its exact marginal, every predicted x0 the law of the data."""
    schedule = SCHEDULES[name]
    student = denoiser(Gaussian(MEAN.tolist(), VAR.tolist(), endpoint), schedule, target)
    for visit in rollout(student, at_the_noise_end(schedule), uniform_grid(3), NOTHING, step=renoise, rng=RNG):
        assert_marginal(visit.x_t, schedule, visit.t)
        assert_marginal(visit.prediction.x0, schedule, 0.0)


class Signs:
    """Noise that is +1 and -1 alike, beside x that are so, too: second moments over four samples are exact."""

    def normal_like(self, x):
        return times(1, -1, 1, -1)[:, None]


@teachers
@pytest.mark.parametrize("s", [0.25, 0.5, 0.75])
def test_deployed_by_ddim_an_endpoint_map_leaves_the_marginal_where_renoise_keeps_it(name, target, s):
    """Of unit data, in the angle tau of (alpha, sigma) = r (cos, sin): x0 = x_t / r, so that the jump from tau_1 lands with the
    variance r^2 (cos tau + sin tau tan(tau_1 / 2))^2, from pure noise r^2 (1 + sin 2 tau), and not r^2."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.alpha_sigma(times(1.0))
    student = denoiser(Gaussian([0.0], [1.0], endpoint), schedule, target)
    x = torch.hypot(alpha, sigma) * times(1, 1, -1, -1)[:, None]
    prediction, start = student(x, torch.ones(4).double(), NOTHING), torch.atan2(sigma, alpha)
    close(prediction.x0, times(1, 1, -1, -1)[:, None])
    alpha, sigma = schedule.alpha_sigma(times(s))
    tau, r2 = torch.atan2(sigma, alpha), alpha**2 + sigma**2
    found = {k: STEPS[k](schedule, prediction, times(s, s, s, s), Signs()).square().mean() / r2 for k in ("ddim", "renoise")}
    close(found["renoise"], times(1))
    close(found["ddim"], ((tau.cos() + tau.sin() * (start / 2).tan()) ** 2), 1e-5)
    if name in ("flow", "flow-reversed", "trig"):  # they start from pure noise
        close(found["ddim"], 1 + (2 * tau).sin(), 1e-5)
    assert found["ddim"] > 1.05


@teachers
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_steps_of_a_student_that_jumps_exactly_are_stationary_at_any_share_of_noise(name, target, gamma):
    """consistency.md 0.6, and 11 point 8: it is told the end of its jump, which lies below where the step arrives."""
    schedule, student, rng = SCHEDULES[name], jumper(name, target), stream(2, 0, 0, 0)
    x = at_the_noise_end(schedule)
    for t, s in ((1.0, 0.625), (0.625, 0.375)):
        below, here, there = (torch.full((N,), u, dtype=torch.float64) for u in ((1 - gamma) * s, t, s))
        x = tcd(gamma)(schedule, student(x, here, NOTHING, r=below), there, rng)
        assert_marginal(x, schedule, s)


def test_no_noise_is_put_back_at_the_end():
    class Counting:
        draws = 0

        def normal_like(self, x):
            self.draws += 1
            return torch.randn_like(x)

    for step in (renoise, tcd(0.3)):
        rng = Counting()
        visits = list(rollout(teacher("sd", "epsilon"), states(), uniform_grid(3), NOTHING, step=step, rng=rng))
        assert rng.draws == 2
        assert torch.equal(visits[-1].x_s, visits[-1].prediction.x0)


def test_a_rollout_asks_once_a_time_and_hands_each_state_on():
    seen = Counted()
    student = denoiser(Gaussian(MEAN.tolist(), VAR.tolist()), SCHEDULES["sd"], "epsilon", seen)
    noise = states()
    visits = list(rollout(student, noise, uniform_grid(4), NOTHING, step=renoise, rng=RNG))
    assert [time[0].item() for time in seen.times] == [999, 749, 499, 249]
    assert torch.equal(seen.inputs[0], noise)
    for before, after in pairwise(visits):
        assert torch.equal(before.x_s, after.x_t)


def test_pictures_do_not_depend_on_their_batch():
    def drawn(start, stop):
        rng = rows(5, start, stop)
        return sample(teacher("flow", "flow"), rng.normal((stop - start, 2)), uniform_grid(3), NOTHING, step=renoise, rng=rng)

    assert torch.equal(drawn(0, 6)[4:], drawn(4, 6))


def test_a_state_keeps_the_dtype_of_the_noise():
    rng = stream(0, 0, 0, 0)
    for visit in rollout(teacher("flow", "flow"), torch.randn(2, 2).bfloat16(), uniform_grid(2), NOTHING, step=renoise, rng=rng):
        assert visit.x_s.dtype == torch.bfloat16 and visit.prediction.x0.dtype == torch.float32


def test_grids():
    assert uniform_grid(4) == (1, 0.75, 0.5, 0.25) and uniform_grid(1) == (1,)
    assert shifted((1.0, 0.75, 0.5, 0.25), 1.0) == (1, 0.75, 0.5, 0.25)
    assert shifted((1.0, 0.5), 3.0) == (1, 0.75)
    # a shift multiplies noise over signal
    (t,) = shifted((0.4,), 5.0)
    assert t / (1 - t) == pytest.approx(5 * 0.4 / 0.6)
    with pytest.raises(ValueError, match="at least one step"):
        uniform_grid(0)


def test_steps_are_known_by_name():
    assert STEPS["ddim"] is ddim and STEPS["renoise"] is renoise
