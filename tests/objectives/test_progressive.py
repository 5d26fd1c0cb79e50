"""Progressive and guidance distillation in closed form."""

import pytest
import torch
from products import MEAN, VAR, N, Optimum, batch, exact, teachers
from toys import NOTHING, SCHEDULES, Gaussian, denoiser, game, gaussian, times

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.losses import mse, snr_weight
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.guidance import GuidanceDistillation
from fewstep.objectives.progressive import Progressive
from fewstep.sampling import sample, uniform_grid
from fewstep.stream import stream


def loss(objective, student, teacher, cond=NOTHING):
    with torch.no_grad():
        nets = game(student, teacher, grid=uniform_grid(objective.steps))
        (term,) = objective.student_loss(nets, batch(cond), stream(0, 0, 0, 0)).terms.values()
        return term


def product(steps, factor, name, target):
    """The student whose every step is `factor` DDIM steps of the Gaussian teacher."""
    grid = uniform_grid(steps)
    optimum = Optimum(Consistency(steps=steps, solver_steps=steps * factor), SCHEDULES[name], grid)
    return denoiser(optimum, SCHEDULES[name], target)


@teachers
@pytest.mark.parametrize("steps, factor", [(4, 2), (2, 5), (1, 8)])
def test_the_optimum_lands_where_the_teachers_steps_land(name, target, steps, factor):
    assert loss(Progressive(steps=steps, factor=factor), product(steps, factor, name, target), exact(name, target)).max() < 1e-8


@teachers
def test_a_factor_of_one_has_the_teacher_as_its_optimum(name, target):
    assert loss(Progressive(factor=1), exact(name, target), exact(name, target)).max() < 1e-12
    assert loss(Progressive(factor=2), exact(name, target), exact(name, target)).mean() > 1e-5


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_halvings_compose_to_the_first_teachers_steps(name, target):
    """8 steps, then 4, 2 and 1, each from the student before: the last one draws what the first teacher draws in 8."""
    teacher = exact(name, target)
    for steps in (4, 2, 1):
        student = product(steps, 8 // steps, name, target)
        assert loss(Progressive(steps=steps), student, teacher).max() < 1e-8
        teacher = student
    noise, rng = torch.randn(16, 2).double(), stream(0, 0, 0, 0)
    many = sample(exact(name, target), noise, uniform_grid(8), NOTHING, rng=rng)
    torch.testing.assert_close(sample(teacher, noise, (1.0,), NOTHING, rng=rng), many, rtol=1e-6, atol=1e-6)


def test_a_factor_below_one_is_refused():
    with pytest.raises(ValueError, match="factor counts the teacher's steps in one of the student's"):
        Progressive(factor=0)


def guided(name, target, null):
    network = denoiser(Gaussian([0.0, 0.0], VAR.tolist()), SCHEDULES[name], target)
    return network, Guided(network, 99.0, Cond({"mean": null[None]})), Cond({"mean": MEAN[None]}).expand(N)


def fed(network, null, told=True):
    """The network whose mean is that of the guided Gaussian at the scale it is fed (at 1 where it does not listen)."""

    def net(x, time, cond, guidance_scale):
        scale = guidance_scale[:, None] if told else 1.0
        return network.net(x, time, Cond({"mean": null + scale * (MEAN - null)}))

    return Denoiser(net, network.schedule, network.target, lambda net, x, time, cond: net(x, time, cond))


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_one_network_draws_at_every_scale_what_the_teacher_draws_in_two_passes(name, target):
    network, teacher, cond = guided(name, target, MEAN + 0.3)
    objective = GuidanceDistillation(steps=4, guidance=(0.0, 6.0))
    assert loss(objective, fed(network, MEAN + 0.3), teacher, cond).max() < 1e-10
    deaf = fed(network, MEAN + 0.3, told=False)
    assert loss(objective, deaf, teacher, cond).mean() > 1e-2
    assert loss(GuidanceDistillation(steps=4, guidance=(1.0, 1.0)), deaf, teacher, cond).max() < 1e-10  # w = 0 is no guidance


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("flow", "flow")])
def test_both_stages_at_once_have_the_product_at_the_guided_mean(name, target):
    _, teacher, cond = guided(name, target, MEAN + 0.3)
    null, factor = MEAN + 0.3, 4
    optimum = Optimum(Consistency(steps=2, solver_steps=2 * factor), SCHEDULES[name], uniform_grid(2))
    student = denoiser(optimum, SCHEDULES[name], target)

    def net(x, time, cond, guidance_scale):
        optimum.mean = null + guidance_scale[:, None] * (MEAN - null)
        return student.net(x, time, cond)

    told = Denoiser(net, student.schedule, target, lambda net, x, time, cond: net(x, time, cond))
    assert loss(Progressive(steps=2, factor=factor, guidance=(1.0, 5.0)), told, teacher, cond).max() < 1e-8


def test_the_weight_takes_the_larger_error_of_x0_and_eps():
    schedule, t = SCHEDULES["sd"], times(0.05, 0.3, 0.9)
    x = torch.randn(3, 2).double()
    a, b = (gaussian([m, 0.2], [0.5, 0.7], schedule, "epsilon")(x, t, NOTHING) for m in (0.1, -0.4))
    larger = torch.maximum(mse(a.x0, b.x0), mse(a.eps, b.eps))
    torch.testing.assert_close(snr_weight(*schedule.alpha_sigma(t)) * mse(a.x0, b.x0), larger)
