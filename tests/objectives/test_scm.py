import math
from dataclasses import replace

import pytest
import torch
from jumping import MEAN, VAR, clean, exact, jumper, teachers
from toys import (
    EPS_V_FLOW,
    NOTHING,
    SCHEDULES,
    Blind,
    Exact,
    Gaussian,
    call,
    denoiser,
    endpoint,
    game,
    gaussian,
    guided,
)

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.losses import flat_mean, unit
from fewstep.matched import Matched
from fewstep.objectives import Batch
from fewstep.objectives.scm import ANGLE, SCM, TRIG, tangent, times
from fewstep.sampling import ddim
from fewstep.schedules import like
from fewstep.stream import stream
from fewstep.tangents import DERIVATIVES, jvp
from fewstep.times import LogNormal
from fewstep.weighting import Weighting

N = 128


def student_of(name, target, mean=MEAN, var=VAR, gain=endpoint):
    return denoiser(Gaussian(mean.tolist(), var.tolist(), gain), SCHEDULES[name], target)


def tangents(student, teacher, *, warm=1.0, derivative=jvp, cond=NOTHING):
    """(tangent, x_t, t) at noised samples, the noise end among them."""
    t = times(LogNormal(-0.3, 1.4), N, stream(0, 0, 0, 0), matched := Matched(student, TRIG))
    t[:4] = matched.highest
    x_t = TRIG.add_noise(clean(N), torch.randn(N, 2, dtype=torch.float64), t)
    return tangent(game(student, teacher), Batch(cond, (N, 2)), x_t, t, warm, derivative)[0], x_t, t


@teachers
@pytest.mark.parametrize("derivative, tolerance", [("jvp", 1e-12), ("difference", 1e-6)])
def test_the_tangent_vanishes_at_the_consistency_function(name, target, derivative, tolerance):
    g = tangents(student_of(name, target), exact(name, target), derivative=DERIVATIVES[derivative])[0]
    assert g.abs().max() < tolerance
    assert tangents(exact(name, target), exact(name, target))[0].abs().max() > 0.1


def test_the_network_of_unit_data_is_minus_the_tangent_of_half_the_angle():
    unit_data = student_of("sd", "epsilon", torch.zeros(2), torch.ones(2))
    _, x_t, t = tangents(unit_data, unit_data)
    expected = -(like(t, x_t) * ANGLE / 2).tan() * x_t
    torch.testing.assert_close(Matched(unit_data, TRIG)(x_t, t, NOTHING).v, expected)


@teachers
def test_the_gradient_is_the_limit_of_discrete_consistency(name, target):
    """(cos / sin) ||f(x_t, t) - sg f(x_s, s)||^2 / (t - s), x_s one teacher step below: first order in the step (section 11)."""
    student, teacher = student_of(name, target, MEAN + 0.3, 1.5 * VAR), exact(name, target)
    f, parameters = Matched(student, TRIG), list(student.net.parameters())
    _, x_t, t = tangents(student, teacher)
    x_t, t = x_t[4:], t[4:].clamp(0.1)
    g = tangent(game(student, teacher), Batch(NOTHING, (N, 2)), x_t, t, 1.0, jvp)[0]
    limit = torch.cat(torch.autograd.grad(-2 * (g * f(x_t, t, NOTHING).v).sum(), parameters))

    def gap(step):
        with torch.no_grad():
            below = t - step / ANGLE
            x_s = ddim(TRIG, Matched(teacher, TRIG)(x_t, t, NOTHING), below, stream(0, 0, 0, 0))
            target_ = f(x_s, below, NOTHING).x0
        weight = like(1 / (t * ANGLE).tan(), x_t)
        discrete = (weight * (f(x_t, t, NOTHING).x0 - target_).square()).sum() / step
        found = torch.cat(torch.autograd.grad(discrete, parameters))
        return float((found - limit).norm() / limit.norm())

    assert gap(1e-4) < 0.01
    assert gap(1e-3) / gap(1e-4) == pytest.approx(10, rel=0.3)


@teachers
def test_without_its_second_half_the_tangent_matches_velocities(name, target):
    student, teacher = student_of(name, target), exact(name, target)
    g, x_t, t = tangents(student, teacher, warm=0.0)
    gap = Matched(student, TRIG)(x_t, t, NOTHING).v - Matched(teacher, TRIG)(x_t, t, NOTHING).v
    torch.testing.assert_close(g, -like((t * ANGLE).cos() ** 2, g) * gap)
    assert tangents(teacher, teacher, warm=0.0)[0].abs().max() == 0


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_guidance_moves_the_consistency_function_by_the_distance_of_the_means(name, target):
    teacher, cond, mean = guided(name, target, MEAN, VAR)

    def largest(centre):
        student = denoiser(Blind(Gaussian(centre.tolist(), VAR.tolist(), endpoint)), SCHEDULES[name], target)
        return tangents(student, teacher, cond=cond.expand(N))[0].abs().max()

    assert largest(mean) < 1e-11 < 0.1 < largest(MEAN)


def test_warm_up_lets_the_second_half_in_over_rounds():
    def warm(step, warmup):
        return SCM(warmup=warmup).round(step)[0].loss.keywords["warm"]  # type: ignore[attr-defined]

    assert [warm(s, 10) for s in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    assert warm(0, 0) == 1.0


@teachers
def test_the_student_is_pushed_along_the_normalised_tangent_and_nobody_else_is(name, target):
    student, teacher, given = student_of(name, target, MEAN + 0.3), exact(name, target), clean(N)
    objective, batch = SCM(floor=0.2, mean=0.0, std=0.5, weighting="none"), Batch(NOTHING, (N, 2), given)
    losses = objective.student_loss(game(student, teacher), batch, stream(3, 0, 0, 0), 0.5)
    rng, f = stream(3, 0, 0, 0), Matched(student, TRIG)
    t = times(LogNormal(0.0, 0.5), N, rng, f)
    x_t = TRIG.add_noise(given, rng.normal_like(given), t)
    g = unit(tangent(game(student, teacher), batch, x_t, t, 0.5, jvp)[0], 0.2)
    prediction = f(x_t, t, NOTHING)
    expected = 0.5 * (prediction.v - (prediction.v + g).detach()).square().mean(1)
    torch.testing.assert_close(losses.terms["scm"], expected)
    parameters = list(student.net.parameters())
    for a, b in zip(*(torch.autograd.grad(v.mean(), parameters, retain_graph=True) for v in (losses.total, expected))):
        torch.testing.assert_close(a, b)
    losses.total.backward()
    assert all(p.grad is None for p in teacher.net.parameters())
    torch.testing.assert_close(losses.sample, prediction.x0)


@teachers
@pytest.mark.parametrize("weighting", ["none", "adaptive"])
def test_a_share_of_samples_at_the_noise_end_is_judged_but_not_pushed(name, target, weighting):
    student, teacher = student_of(name, target, MEAN + 0.3), exact(name, target)
    batch, objective = Batch(NOTHING, (N, 2), clean(N)), SCM(noise_share=0.5, weighting=weighting)
    nets = replace(game(student, teacher), weighting=lambda t: 0.3 + 0 * t)
    losses = objective.student_loss(nets, batch, stream(0, 0, 0, 0))
    resting = losses.terms["scm"] == 0
    assert 0.35 < resting.double().mean() < 0.65
    assert losses.sample is not None and (losses.sample[resting].std(0) > 0.1).all()
    with pytest.raises(ValueError, match="share of samples"):
        SCM(noise_share=1.0)


def test_times_stay_where_the_student_was_trained():
    f = Matched(exact("sd", "epsilon"), TRIG)
    t = times(LogNormal(0.0, 50.0), 1000, stream(0, 0, 0, 0), f)
    time = SCHEDULES["sd"].model_time(SCHEDULES["sd"].t_of_ratio((t * ANGLE).tan()))
    assert time.min() == pytest.approx(0, abs=1e-6) and time.max() == pytest.approx(999, abs=1e-4)
    assert math.isclose(float(t.max()), f.highest)


@teachers
def test_the_tangent_of_a_jump_to_any_end_vanishes_at_the_exact_flow_map(name, target):
    """The tangent of CTM on TrigFlow, -cos(t - s) (F - dx/dt) - sin(t - s) (x + dF/dt) in angles: the derivative along the
    teacher's trajectory of where the jump from t to s lands (consistency.md 11, point 4)."""
    x, teacher = torch.randn(N, 2, dtype=torch.float64), Matched(exact(name, target), TRIG)
    t = 0.2 + (teacher.highest - 0.2) * torch.rand(N, dtype=torch.float64)
    s = t * (0.1 + 0.8 * torch.rand(N, dtype=torch.float64))
    cos, sin = ((f((t - s) * ANGLE))[:, None] for f in (torch.cos, torch.sin))

    def largest(mean):
        student = Matched(jumper(name, target, mean), TRIG)
        with torch.no_grad():
            velocity = teacher(x, t, NOTHING).v
            along = velocity, torch.full_like(t, 1 / ANGLE)
            f, slope = torch.func.jvp(lambda x, t: student(x, t, NOTHING, r=s).v, (x, t), along)
        return float((-cos * (f - velocity) - sin * (x + slope)).abs().max())

    assert largest(MEAN) < 1e-7 and largest(MEAN + 0.3) > 0.05


# What is fed: guidance.


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_one_network_that_is_fed_the_scale_is_at_rest_at_every_scale(name, target):
    """SANA-Sprint: at scale g the guided Gaussian's mean is null + g (mean - null)."""
    mean, null, seen = (lambda m: Cond({"mean": m})), MEAN + 0.3, []
    network = Exact(Gaussian([0.0, 0.0], VAR.tolist(), endpoint), SCHEDULES[name], target)

    def fed(x, time, cond, guidance_scale):
        seen.append(guidance_scale)
        return network(x, time, mean(null + guidance_scale[:, None] * (cond.tensors["mean"] - null)))

    objective = SCM(guidance=(1.0, 6.0), weighting="none")
    teacher = Guided(gaussian([0.0, 0.0], VAR.tolist(), SCHEDULES[name], target), 99.0, mean(null[None]))
    batch = Batch(mean(MEAN.expand(N, 2)), (N, 2), clean(N))

    def loss(net):
        nets = game(Denoiser(net, SCHEDULES[name], target, call), teacher)
        return objective.student_loss(nets, batch, stream(0, 0, 0, 0)).terms["scm"]

    assert objective.needs.inputs == ("guidance_scale",) and SCM().needs.inputs == ()
    assert loss(fed).max() < 1e-12
    assert seen[0].min() < 1.2 and seen[0].max() > 5.8 and all(torch.equal(seen[0], again) for again in seen)
    assert loss(lambda *given, guidance_scale: fed(*given, torch.full_like(guidance_scale, 3.5))).mean() > 0.01


def test_a_range_of_scales_that_falls_is_refused():
    with pytest.raises(ValueError, match=r"a range of scales, \[lowest, highest\], not \[6.0, 2.0\]"):
        SCM(guidance=(6.0, 2.0))


# What is masked: tangents that are not finite.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_no_push_and_the_others_are_what_they_were(bad):
    student, teacher = student_of("sd", "epsilon", MEAN + 0.3), exact("sd", "epsilon")
    others = torch.arange(N) != 7

    def poisoned(*given):
        value, slope = jvp(*given)
        return value, torch.where(others[:, None], slope, bad)

    torch.manual_seed(0)
    t = times(LogNormal(-0.3, 1.4), N, stream(0, 0, 0, 0), Matched(student, TRIG))
    x_t, nets = TRIG.add_noise(clean(N), torch.randn(N, 2, dtype=torch.float64), t), game(student, teacher)
    (whole, _), (g, stats) = (tangent(nets, Batch(NOTHING, (N, 2)), x_t, t, 1.0, d) for d in (jvp, poisoned))
    assert torch.equal(g[others], whole[others]) and (g[7] == 0).all()
    assert stats["masked"] == 1
    torch.testing.assert_close(stats["tangent"], flat_mean(whole[others].square()).sqrt().mean())


def test_where_nothing_is_finite_nothing_is_hidden():
    """Such a turn is the trainer's to skip, and a run of them its to stop."""
    student, teacher = student_of("sd", "epsilon"), exact("sd", "epsilon")
    nets = replace(game(student, teacher), weighting=Weighting())
    losses = SCM().student_loss(nets, Batch(NOTHING, (N, 2), clean(N) * float("nan")), stream(0, 0, 0, 0))
    assert losses.terms["scm"].isnan().all() and losses.stats["masked"] == 0
