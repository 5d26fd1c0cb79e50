import math
from dataclasses import replace

import pytest
import torch
from toys import NOTHING, SCHEDULES, TEACHERS, Gaussian, call, gaussian

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.matched import Matched
from fewstep.sampling import ddim
from fewstep.schedules import TrigFlow, like
from fewstep.stream import stream

MEAN, VAR, N = [0.4, -1.0], [0.25, 2.0], 64
teachers = pytest.mark.parametrize("name, target", TEACHERS)
hosts = pytest.mark.parametrize("host", ["trig", "flow", "sd", "edm"])


def places(host, matched):
    """Inputs and times where the two schedules overlap."""
    t = 0.05 + (min(matched.highest, 1.0) - 0.05) * torch.rand(N, dtype=torch.float64)
    return torch.randn(N, 2, dtype=torch.float64), t


@teachers
@hosts
def test_the_exact_teacher_of_one_schedule_is_that_of_every_other(name, target, host):
    """Also sCM's wrapper against the exact drift (consistency.md 0.5)."""
    matched = Matched(gaussian(MEAN, VAR, SCHEDULES[name], target), SCHEDULES[host])
    own = gaussian(MEAN, VAR, SCHEDULES[host], "sample" if host == "edm" else "v_prediction")
    x, t = places(host, matched)
    found, expected = matched(x, t, NOTHING), own(x, t, NOTHING)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.alpha * found.x0 + found.sigma * found.eps, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.v, expected.v, rtol=1e-8, atol=1e-8)


@teachers
def test_on_its_own_schedule_a_denoiser_is_itself(name, target):
    plain = gaussian(MEAN, VAR, SCHEDULES[name], target)
    x, t = places(name, matched := Matched(plain, SCHEDULES[name]))
    torch.testing.assert_close(matched(x, t, NOTHING).eps, plain(x, t, NOTHING).eps, rtol=1e-8, atol=1e-8)


def test_guidance_commutes_with_matching():
    mean = lambda *m: Cond({"mean": torch.tensor([m]).double()})  # noqa: E731
    plain, null, cond = gaussian([0.0, 0.0], VAR, SCHEDULES["sd"], "epsilon"), mean(0.1, 0.2), mean(1.0, -1.0).expand(N)
    outside = Guided(Matched(plain, SCHEDULES["trig"]), 4.0, null)  # type: ignore[arg-type]
    inside = Matched(Guided(plain, 4.0, null), SCHEDULES["trig"])
    x, t = places("trig", inside)
    torch.testing.assert_close(inside(x, t, cond).v, outside(x, t, cond).v)


def test_the_highest_time_is_where_the_network_was_last_trained():
    network = gaussian(MEAN, VAR, SCHEDULES["sd"], "epsilon")
    alpha, sigma = SCHEDULES["sd"].alpha_sigma(torch.ones(1).double())
    assert Matched(network, SCHEDULES["trig"]).highest == pytest.approx(float(torch.atan2(sigma, alpha)) / (math.pi / 2))
    assert Matched(network, SCHEDULES["edm"]).highest < 1
    assert Matched(gaussian(MEAN, VAR, SCHEDULES["flow"], "flow"), SCHEDULES["trig"]).highest == pytest.approx(1)


@teachers
def test_a_jump_is_the_same_in_every_parameterisation(name, target):
    """Euler on the straight path, cos(t - r) x - sin(t - r) F on TrigFlow, x0 + (sigma_r / sigma_t) (x - x0) of EDM."""
    network, trig = gaussian(MEAN, VAR, SCHEDULES[name], target), TrigFlow()
    x, t = places("trig", Matched(network, trig))
    r = t * torch.rand(N, dtype=torch.float64)
    p = Matched(network, trig)(x, t, NOTHING)
    jumped = ddim(trig, p, r, stream(0, 0, 0, 0))
    turn = (t - r) * math.pi / 2
    torch.testing.assert_close(like(turn.cos(), x) * x - like(turn.sin(), x) * p.v, jumped, rtol=1e-10, atol=1e-10)
    (a, s), (a_r, s_r) = ((like(c, x) for c in trig.alpha_sigma(u)) for u in (t, r))
    edm = a_r * (p.x0 + (s_r / a_r) / (s / a) * (x / a - p.x0))
    torch.testing.assert_close(edm, jumped, rtol=1e-8, atol=1e-8)
    straight, end, flow = s / (a + s), s_r / (a_r + s_r), Matched(network, SCHEDULES["flow"])
    velocity = flow(x / (a + s), straight.flatten(), NOTHING).velocity
    torch.testing.assert_close((a_r + s_r) * (x / (a + s) + (end - straight) * velocity), jumped, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_at_the_clean_end_the_match_gives_back_what_it_was_given(name, target, dtype):
    """sCM's boundary, f(x, 0) = x, to the bit (consistency.md 11, point 2)."""
    x, clean = torch.randn(N, 3, 2, dtype=dtype), torch.zeros(N).double()
    student = Matched(Denoiser(lambda x, t, cond: 0.1 * x, SCHEDULES[name], target, call), TrigFlow())
    assert torch.equal(student(x, clean, NOTHING).x0, x)


def test_weights_are_reached_through_the_match():
    network = gaussian(MEAN, VAR, SCHEDULES["sd"], "epsilon")
    x, t = places("trig", matched := Matched(network, SCHEDULES["trig"]))
    matched(x, t, NOTHING).v.sum().backward()
    assert isinstance(network.net.clean, Gaussian) and all(p.grad.abs().max() > 0 for p in network.net.clean.parameters())


@teachers
@pytest.mark.parametrize("host, quantity", [("flow", "flow"), ("trig", "v_prediction")])
def test_the_lever_is_what_an_error_of_the_output_weighs_in_a_velocity(name, target, host, quantity):
    plain = gaussian(MEAN, VAR, SCHEDULES[name], target)
    erring = replace(plain, call=lambda *asked: plain.call(*asked) + 1e-3)
    x, t = places(host, Matched(plain, SCHEDULES[host]))
    exact, off = (Matched(network, SCHEDULES[host])(x, t, NOTHING) for network in (plain, erring))
    read = (lambda p: p.velocity) if quantity == "flow" else (lambda p: p.v)
    weighs = (read(off) - read(exact)).abs().mean(1) / 1e-3
    torch.testing.assert_close(Matched(plain, SCHEDULES[host]).lever(quantity, t), weighs.clamp(min=1), rtol=1e-6, atol=1e-6)
