import pytest
import torch
from toys import NOTHING, SCHEDULES, TEACHERS, Counted, Exact, Gaussian, call, denoiser, gaussian, times

from fewstep.denoiser import TARGETS, Cond, Denoiser, Guided, cat
from fewstep.schedules import DiscreteVP, RectifiedFlow

MEAN, VAR = [0.3, -1.0], [0.5, 2.0]
T = times(0.0625, 0.25, 0.5, 0.875)
# Every target is met on every schedule at levels where it determines a prediction.
COMBINATIONS = [(name, target) for name in SCHEDULES for target in TARGETS]
combinations = pytest.mark.parametrize("name, target", COMBINATIONS)
teachers = pytest.mark.parametrize("name, target", TEACHERS)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def noised(schedule, t):
    x0 = torch.randn(len(t), 2, dtype=torch.float64)
    eps = torch.randn_like(x0)
    return x0, eps, schedule.add_noise(x0, eps, t)


@combinations
def test_what_is_predicted_composes_to_the_input(name, target):
    schedule, t = SCHEDULES[name], T
    x_t = noised(schedule, t)[2]
    p = gaussian(MEAN, VAR, schedule, target)(x_t, t, NOTHING)
    close(p.alpha * p.x0 + p.sigma * p.eps, x_t, 1e-9)


@combinations
def test_a_network_that_hits_its_aim_returns_the_x0_and_noise_it_was_made_from(name, target):
    schedule, t = SCHEDULES[name], T
    x0, eps, x_t = noised(schedule, t)
    oracle = Denoiser(None, schedule, target, lambda net, x, time, cond: oracle.aim(x0, eps, t))
    p = oracle(x_t, t, NOTHING)
    close(p.x0, x0, 1e-9)
    close(p.eps, eps, 1e-9)


@combinations
def test_native_is_what_the_network_said(name, target):
    schedule, t = SCHEDULES[name], T
    out = torch.randn(4, 2, dtype=torch.float64)
    student = Denoiser(None, schedule, target, lambda net, x, time, cond: out)
    close(student.native(student(torch.randn(4, 2).double(), t, NOTHING), t), out, 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_gaussian_is_the_same_prediction_in_every_target(name):
    schedule, t = SCHEDULES[name], T
    x_t = noised(schedule, t)[2]
    mean, var = torch.tensor(MEAN).double(), torch.tensor(VAR).double()
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(t))
    total = alpha**2 * var + sigma**2
    for target in TARGETS:
        p = gaussian(MEAN, VAR, schedule, target)(x_t, t, NOTHING)
        close(p.x0, mean + alpha * var / total * (x_t - alpha * mean))
        close(p.eps, sigma / total * (x_t - alpha * mean))
        close(p.score, -(x_t - alpha * mean) / total)
        close(p.velocity, p.eps - p.x0, 0)
        close(p.v, alpha * p.eps - sigma * p.x0, 1e-12)


def test_targets_are_what_diffusers_calls_them():
    x0, eps, a, s = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.8]), torch.tensor([0.6])
    expected = {"epsilon": eps, "sample": x0, "v_prediction": 0.8 * eps - 0.6 * x0, "flow": eps - x0}
    for target, coefficients in TARGETS.items():
        A, B = coefficients(a, s)
        close(A * x0 + B * eps, expected[target], 1e-6)


def test_a_networks_own_precision_does_not_reach_the_algebra():
    seen = Counted()
    student = Denoiser(lambda x, time, cond: 0.1 * x, RectifiedFlow(), "flow", seen, torch.bfloat16)
    p = student(torch.randn(4, 2), T, NOTHING)
    assert seen.inputs[0].dtype == torch.bfloat16
    assert p.x0.dtype == p.eps.dtype == p.alpha.dtype == torch.float32


def test_bfloat16_input_is_predicted_in_float32():
    student = Denoiser(lambda x, time, cond: 0.1 * x, RectifiedFlow(), "flow", call)
    x_t = torch.randn(4, 2, dtype=torch.bfloat16)
    p = student(x_t, T, NOTHING)
    assert p.x0.dtype == torch.float32
    close(p.alpha * p.x0 + p.sigma * p.eps, x_t.float(), 1e-6)


def test_the_network_is_fed_its_own_clock_in_float32():
    seen = Counted()
    gaussian_sd = denoiser(Gaussian(MEAN, VAR), SCHEDULES["sd"], "epsilon", seen)
    gaussian_sd(torch.randn(4, 2), times(1, 0.75, 0.5, 0.25), NOTHING)
    assert seen.times[0].dtype == torch.float32 and seen.times[0].tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    "schedule, target, t",
    [
        (RectifiedFlow(), "epsilon", 1.0),
        (SCHEDULES["trig"], "epsilon", 1.0),
        (DiscreteVP((0.5, 0.0)), "epsilon", 1.0),
        (SCHEDULES["sd"], "sample", 0.0),
        (RectifiedFlow(), "sample", 0.0),
    ],
)
def test_where_nothing_is_determined_the_denoiser_refuses(schedule, target, t):
    asked = Counted()
    student = denoiser(Gaussian(MEAN, VAR), schedule, target, asked)
    with pytest.raises(ValueError, match=f"'{target}' .* at t = {t:g}; keep that time out of the grid"):
        student(torch.randn(2, 2), times(0.5, t), NOTHING)
    assert not asked.inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_at_the_clean_end_a_prediction_is_what_it_was_given(name, target, dtype):
    """f(x, 0) = x to the bit, whatever the network says (consistency.md 11, point 2); one that predicts x0 is not asked there."""
    x, clean = torch.randn(64, 3, 2, dtype=dtype), torch.zeros(64).double()
    student = Denoiser(lambda x, t, cond: 0.1 * x, SCHEDULES[name], target, call)
    assert torch.equal(student(x, clean, NOTHING).x0, x)


# Guidance


C, U = [2.0, -1.0], [-0.5, 0.5]


def condition(mean, n):
    return Cond({"mean": torch.tensor([mean]).double().expand(n, -1)})


def guided(name, target, scale):
    seen = Counted()
    network = denoiser(Gaussian(MEAN, VAR), SCHEDULES[name], target, seen)
    return Guided(network, scale, condition(U, 1)), seen


@teachers
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 7.5])
def test_guidance_between_gaussians_is_a_gaussian_with_the_mean_moved(name, target, scale):
    teacher, _ = guided(name, target, scale)
    x_t, t = torch.randn(4, 2).double(), T
    moved = gaussian([u + scale * (c - u) for c, u in zip(C, U)], VAR, teacher.schedule, target)
    a, b = teacher(x_t, t, condition(C, 4)), moved(x_t, t, NOTHING)
    close(a.x0, b.x0, 1e-4)
    close(a.eps, b.eps, 1e-4)


def test_guidance_of_one_is_no_guidance_and_no_second_half():
    teacher, seen = guided("sd", "epsilon", 1.0)
    x_t = torch.randn(4, 2).double()
    p = teacher(x_t, T, condition(C, 4))
    assert [len(x) for x in seen.inputs] == [4]
    assert torch.equal(p.x0, teacher.denoiser(x_t, T, condition(C, 4)).x0)


def test_both_halves_are_one_batch():
    teacher, seen = guided("sd", "epsilon", 4.0)
    x_t = torch.randn(4, 2).double()
    c, u = teacher.both(x_t, T, condition(C, 4))
    assert [len(x) for x in seen.inputs] == [8]
    close(c.x0, teacher.denoiser(x_t, T, condition(C, 4)).x0, 1e-12)
    close(u.x0, teacher.denoiser(x_t, T, condition(U, 4)).x0, 1e-12)


@teachers
def test_guidance_in_x0_is_the_pipelines_formula_on_the_networks_output(name, target):
    """T10: u + g (c - u) of Diffusers' pipelines, c + w (c - u) of LCM with g = 1 + w."""
    teacher, _ = guided(name, target, 4.0)
    x_t, t = torch.randn(4, 2).double(), T
    raw = Exact(Gaussian(MEAN, VAR), teacher.schedule, target)
    time = teacher.schedule.model_time(t).float()
    c, u = raw(x_t, time, condition(C, 4)), raw(x_t, time, condition(U, 4))
    ours = teacher.denoiser.native(teacher(x_t, t, condition(C, 4)), t)
    close(ours, u + 4.0 * (c - u), 1e-8)
    close(ours, c + 3.0 * (c - u), 1e-8)


def test_conditions_slice_join_and_expand_by_their_batch_axis():
    a = Cond({"text": torch.arange(6.0).view(2, 3), "size": torch.tensor([1, 2])})
    joined = cat([a, a[1:].expand(2)])
    assert len(joined) == 4
    assert joined[2:4].tensors["size"].tolist() == [2, 2]
    assert joined.tensors["text"][3].tolist() == [3, 4, 5]
    assert a[torch.tensor([1])].tensors["size"].tolist() == [2]
