import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from toys import SCHEDULES, times

from fewstep.denoiser import Cond, Denoiser
from fewstep.sampling import ddim, uniform_grid
from fewstep.schedules import EDM, DiscreteVP, RectifiedFlow, TrigFlow, like
from fewstep.stream import stream

SD = SCHEDULES["sd"]
ALL = {**SCHEDULES, "zero-snr": DiscreteVP((0.9, 0.5, 0.1, 0.0))}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
GRID = torch.linspace(0, 1, 41, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


@every
def test_the_clean_end_is_exactly_clean(schedule):
    alpha, sigma = schedule.alpha_sigma(times(0.0))
    assert alpha.item() == 1 and sigma.item() == 0


@every
def test_noise_over_signal_rises_with_t(schedule):
    alpha, sigma = schedule.alpha_sigma(GRID)
    assert (torch.diff(sigma / alpha) > 0).all()


@every
def test_coefficients_are_float64_even_for_float32_times(schedule):
    t = torch.linspace(0, 1, 5)
    for value in (*schedule.alpha_sigma(t), schedule.t_of_ratio(t), schedule.model_time(t), schedule.t_of_model_time(t)):
        assert value.dtype == torch.float64 and value.shape == t.shape


@every
def test_t_to_ratio_and_back(schedule):
    alpha, sigma = schedule.alpha_sigma(GRID)
    close(schedule.t_of_ratio(sigma / alpha), GRID, 1e-11)


@every
def test_t_to_model_time_and_back(schedule):
    close(schedule.t_of_model_time(schedule.model_time(GRID)), GRID)


@pytest.mark.parametrize("name", ["sd", "trig", "zero-snr"])
def test_variance_preserving_schedules_preserve_variance(name):
    alpha, sigma = ALL[name].alpha_sigma(GRID)
    close(alpha**2 + sigma**2, torch.ones_like(GRID))


def test_a_timestep_is_its_row_of_the_table():
    i = torch.arange(1000, dtype=torch.float64)
    alpha, sigma = SD.alpha_sigma((i + 1) / 1000)
    close(alpha**2, SD.alphas_cumprod)
    close(sigma**2, 1 - torch.tensor(SD.alphas_cumprod, dtype=torch.float64))


def test_four_even_steps_are_the_timesteps_of_dmd2():
    seen = SD.model_time(torch.linspace(1, 0, 5, dtype=torch.float64)[:-1])
    assert seen.tolist() == [999, 749, 499, 249]
    assert SD.model_time(times(*uniform_grid(4))).tolist() == [999, 749, 499, 249]
    assert SD.model_time(times(*uniform_grid(1))).tolist() == [999]


def test_a_table_that_ends_at_zero_snr_ends_there_exactly():
    schedule = ALL["zero-snr"]
    alpha, sigma = schedule.alpha_sigma(times(1.0, 0.875))
    assert alpha[0].item() == 0 and sigma[0].item() == 1
    assert 0 < alpha[1] < math.sqrt(0.1)
    assert schedule.t_of_ratio(times(math.inf)).item() == 1


def test_diffusers_zero_snr_table_is_accepted():
    betas = rescale_zero_terminal_snr(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    schedule = DiscreteVP(tuple((1 - betas).cumprod(0).double().tolist()))
    assert schedule.alpha_sigma(times(1.0))[0].item() == 0


@pytest.mark.parametrize("table", [(), (0.9, 0.9), (1.0, 0.5), (0.5, -0.1)])
def test_a_table_that_does_not_fall_is_refused(table):
    with pytest.raises(ValueError, match="must fall strictly"):
        DiscreteVP(table)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), RectifiedFlow(1.0, 0.0), RectifiedFlow(0.0, 1.0)])
def test_a_flow_networks_clock_runs_between_its_ends(schedule):
    low, high = schedule.clean_time, schedule.noise_time
    close(schedule.model_time(times(0, 0.25, 1)), [low, 0.75 * low + 0.25 * high, high])


def test_an_edm_network_is_fed_a_quarter_of_log_sigma():
    schedule = EDM()
    close(schedule.model_time(schedule.t_of_ratio(times(0.01, 1.0, 80.0))), [math.log(0.01) / 4, 0.0, math.log(80) / 4])


def test_trigflow_is_rectified_flow_in_another_clock():
    # consistency.md 0.5: t = sin u / (sin u + cos u)
    u = GRID * math.pi / 2
    alpha, sigma = TrigFlow().alpha_sigma(GRID)
    close(RectifiedFlow().t_of_ratio(sigma / alpha), u.sin() / (u.sin() + u.cos()))


PAIRS = torch.tensor([(0.0, 0.3), (0.1, 0.6), (0.25, 0.6), (0.5, 0.5), (0.7, 0.99)], dtype=torch.float64).T


@every
def test_the_kernel_after_the_law_at_s_is_the_law_at_t(schedule):
    s, t = PAIRS
    (a_s, sigma_s), (a_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    scale, std = schedule.kernel(s, t)
    close(scale * a_s, a_t)
    close((scale * sigma_s) ** 2 + std**2, sigma_t**2)


@every
def test_kernels_compose(schedule):
    s, m, t = times(0.1, 0.3), times(0.4, 0.5), times(0.6, 0.95)
    (scale_1, std_1), (scale_2, std_2) = schedule.kernel(s, m), schedule.kernel(m, t)
    scale, std = schedule.kernel(s, t)
    close(scale_1 * scale_2, scale)
    close((scale_2 * std_1) ** 2 + std_2**2, std**2)


def test_the_variance_preserving_kernel_has_its_closed_form():
    s, t = PAIRS
    bar_s, bar_t = (SD.alpha_sigma(u)[0] ** 2 for u in PAIRS)
    scale, std = SD.kernel(s, t)
    close(scale**2, bar_t / bar_s)
    close(std**2, 1 - bar_t / bar_s)


def test_the_straight_paths_kernel_has_its_closed_form():
    s, t = PAIRS
    scale, std = RectifiedFlow().kernel(s, t)
    close(scale, (1 - t) / (1 - s))
    close(std**2, (t - s) * (t + s - 2 * t * s) / (1 - s) ** 2)
    assert std[2].item() ** 2 == pytest.approx(0.342, abs=5e-4)  # PCM-SD3's own formula gives 0.218 here


@every
def test_from_clean_the_kernel_is_the_forward_process(schedule):
    x0, noise, t = torch.randn(4, 3, 2).double(), torch.randn(4, 3, 2).double(), times(0.1, 0.4, 0.7, 1.0)
    close(schedule.forward_kernel(x0, noise, torch.zeros_like(t), t), schedule.add_noise(x0, noise, t))


def test_a_coefficient_takes_the_dtype_of_the_image():
    c = like(times(0.25, 0.5), torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16))
    assert c.shape == (2, 1, 1, 1) and c.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def scheduler():
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="trailing"
    )


def of(scheduler):
    return DiscreteVP(tuple(scheduler.alphas_cumprod.double().tolist()))


def test_the_table_of_stable_diffusion_is_diffusers(scheduler):
    close(torch.tensor(SD.alphas_cumprod, dtype=torch.float64), scheduler.alphas_cumprod.double(), 1e-5)


def test_add_noise_is_that_of_diffusers(scheduler):
    x0, eps, i = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double(), torch.tensor([0, 20, 499, 999])
    close(of(scheduler).add_noise(x0, eps, (i.double() + 1) / 1000), scheduler.add_noise(x0, eps, i))


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_are_those_of_diffusers(scheduler, target):
    scheduler.register_to_config(prediction_type=target)
    scheduler.set_timesteps(4)
    out = torch.randn(2, 3).double()
    student = Denoiser(None, of(scheduler), target, lambda net, x, time, cond: out)
    x = torch.randn(2, 3).double()
    for i, s in zip(scheduler.timesteps, [0.75, 0.5, 0.25, 0.0], strict=True):
        prediction = student(x, (i.double() + 1).expand(2) / 1000, Cond({}))
        ours = ddim(student.schedule, prediction, times(s, s), stream(0, 0, 0, 0))
        close(ours, scheduler.step(out, i, x).prev_sample, 1e-6)  # its last alpha is a float32 1
        x = ours


# Score matching above a level s > 0.


def moments(law):
    """Nodes and weights of x0 ~ N(0.4, 0.9^2) on the straight path at s = 0.5, or of two points, times those of a normal draw."""
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(8))
    x_s, share = {"normal": (0.2 + 0.4525**0.5 * z, w / w.sum()), "points": (times(-1.0, 2.0), times(0.3, 0.7))}[law]
    nodes = torch.cartesian_prod(x_s, z)
    return nodes[:, 0], nodes[:, 1], torch.cartesian_prod(share, w / w.sum()).prod(1)


@every
@pytest.mark.parametrize("law", ["normal", "points"])
@pytest.mark.parametrize("s, t", [(0.5, 0.8), (0.25, 0.3), (0.7, 0.99)])
def test_the_target_above_a_level_is_unbiased_for_any_law(schedule, law, s, t):
    """T13: E[eps g(x_t)] = sigma_t E[g'(x_t)] for eps = -sigma score (integrate by parts); here g = 1, x, x^2, x^3."""
    x_s, noise, share = moments(law)
    s, t = (torch.full_like(x_s, v) for v in (s, t))
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = schedule.forward_kernel(x_s, noise, s, t)
    x0, eps = schedule.kernel_target(x_s, noise, s, t)
    close(alpha * x0 + sigma * eps, x_t, 1e-9)
    for k in range(4):
        close((share * eps * x_t**k).sum() / sigma[0], (share * k * x_t ** max(k - 1, 0)).sum(), 1e-9)


def test_noise_minus_sample_is_no_target_above_a_level():
    """T13: of x0 ~ N(0.4, 0.81) on the straight path, brought to 0.8 by way of 0.5: intercept -0.476, not -0.270."""
    schedule = RectifiedFlow()
    x_s, noise, share = moments("normal")
    s, t = torch.full_like(x_s, 0.5), torch.full_like(x_s, 0.8)
    x_t = schedule.forward_kernel(x_s, noise, s, t)
    x0, eps = schedule.kernel_target(x_s, noise, s, t)
    mean = (share * x_t).sum()

    def intercept(target):
        slope = (share * target * (x_t - mean)).sum() / (share * (x_t - mean) ** 2).sum()
        return ((share * target).sum() - slope * mean).item()

    assert intercept(eps - x0) == pytest.approx(-0.476, abs=1e-3)
    assert intercept(noise - x_s) == pytest.approx(-0.270, abs=1e-3)


@every
def test_above_clean_data_the_target_is_the_usual_one_to_the_bit(schedule):
    """T14."""
    x, noise = torch.randn(2, 41, generator=torch.Generator().manual_seed(0))
    t, s = GRID.clamp(min=0.001), torch.zeros(41, dtype=torch.float64)
    x0, eps = schedule.kernel_target(x, noise, s, t)
    assert torch.equal(x0, x) and torch.equal(eps, noise)
    assert torch.equal(schedule.forward_kernel(x, noise, s, t), schedule.add_noise(x, noise, t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_starts_at_the_spread_of_the_noise_end(name):
    """Of pure noise: sigma(1), to the little that a table's end leaves of the data."""
    schedule, noise = SCHEDULES[name], torch.randn(8, 3, dtype=torch.float64)
    sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[1]
    torch.testing.assert_close(schedule.prior(noise), sigma * noise, rtol=0.01, atol=0)
