"""Two flows in one network, told apart by the sign of the end: their closed forms for Gaussians."""

from dataclasses import replace

import pytest
import torch
from jumping import MEAN, VAR, N, clean, exact, jumper, teachers
from toys import EPS_V_FLOW, NOTHING, SCHEDULES, Jump, call, game, guided

from fewstep.denoiser import Denoiser
from fewstep.matched import Matched
from fewstep.objectives import Batch
from fewstep.objectives.meanflow import FLOW
from fewstep.objectives.rcgm import RCGM, jumps
from fewstep.objectives.twinflow import TwinFlow, twins
from fewstep.schedules import like
from fewstep.stream import stream

AWAY = torch.tensor([0.2, -0.1]).double()


def student(name, target, mean=MEAN, var=VAR):
    """Generator and real flow of N(MEAN, VAR), fake flow of another law."""
    net = Jump(MEAN, VAR, SCHEDULES[name], target, twin=(mean.clone().requires_grad_(), var.clone().requires_grad_()))
    return Denoiser(net, SCHEDULES[name], target, call)


def heard(student, x, seed=0):
    return twins(Matched(student, FLOW), x, NOTHING, stream(seed, 0, 0, 0))


def times(student, seed=0):
    """The times that `twins` draws first."""
    f = Matched(student, FLOW)
    return f.lowest + (f.highest - f.lowest) * stream(seed, 0, 0, 0).uniform(N)


@teachers
def test_the_flows_differ_as_gaussians_do(name, target):
    """consistency.md 1: two laws of one variance and means m apart have velocities -m t / c(t) apart; equal laws none."""
    assert heard(student(name, target), clean())[1].abs().max() < 1e-9
    player = student(name, target, MEAN + AWAY)
    t = times(player)[:, None]
    spread = (1 - t) ** 2 * VAR + t**2
    torch.testing.assert_close(heard(player, clean())[1], -AWAY * t / spread, rtol=1e-6, atol=1e-8)
    assert heard(student(name, target, MEAN + 100), clean())[1].abs().max() == 1


@teachers
def test_the_fake_flow_of_the_samples_own_law_is_at_rest(name, target):
    """No gradient but chance in its law; far more than chance where it is another's."""
    for mean, rests in ((MEAN, True), (MEAN + 3 * AWAY, False)):
        player = student(name, target, mean)
        grads = []
        for seed in range(24):
            torch.manual_seed(seed)
            learned = heard(player, clean(512), seed)[0].mean()
            grads.append(torch.cat(torch.autograd.grad(learned, player.net.twin)))
        found = torch.stack(grads)
        far = (found.mean(0).abs() / (found.std(0) / len(found) ** 0.5)).max()
        assert far < 5 if rests else far > 10


@teachers
def test_samples_move_from_the_fake_flow_to_the_real_one(name, target):
    """Where the fake law lies beyond the real one, the generator's mean has a gradient towards it, and falls: DMD's sign."""
    for away in (AWAY, -AWAY):
        player = student(name, target, MEAN + away)
        terms = (
            TwinFlow().student_loss(game(player, exact(name, target)), Batch(NOTHING, (N, 2), clean()), stream(0, 0, 0, 0)).terms
        )
        (grad,) = torch.autograd.grad(terms["rectify"].mean(), player.net.mean)
        assert (grad * away > 1e-3).all()


def test_the_gradient_is_that_of_the_difference_of_flows():
    """On the straight path x = mean + std z and F = z - x, so that -dF / dmean = 1 and the gradient is E[away t / c] / D."""
    player, given = student("flow", "flow", MEAN + AWAY), Batch(NOTHING, (N, 2), clean())
    nets, rng = game(player, exact("flow", "flow")), stream(0, 0, 0, 0)
    terms = TwinFlow(rectify=3.0).student_loss(nets, given, rng).terms
    (grad,) = torch.autograd.grad(terms["rectify"].mean(), player.net.mean)
    again, f = stream(0, 0, 0, 0), Matched(player, FLOW)
    jumps(nets, given, again, 2, 0.01)
    again.normal((N, 2))
    t = (f.lowest + (f.highest - f.lowest) * again.uniform(N))[:, None]
    expected = 3 * AWAY * (t / ((1 - t) ** 2 * VAR + t**2)).mean(0) / 2
    torch.testing.assert_close(grad, expected, rtol=1e-2, atol=0.0)  # samples are float32, and the toy rounds their times


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_guidance_moves_the_jumps_and_nothing_else(name, target):
    """The two flows are the student's own: where they agree they rest under any teacher, and its law is the guided one."""
    teacher, cond, mean = guided(name, target, MEAN, VAR)

    def stats(centre):
        net = Jump(centre, VAR, SCHEDULES[name], target, twin=(centre.clone(), VAR.clone()))
        player, given = Denoiser(net, SCHEDULES[name], target, call), Batch(cond.expand(N), (N, 2), clean())
        return TwinFlow(delta=1e-3).student_loss(game(player, teacher), given, stream(0, 0, 0, 0)).stats

    right, wrong = stats(mean), stats(MEAN)
    assert right["residual"] < 0.02 and wrong["residual"] > 0.1
    assert right["twins_apart"] < 1e-9 and wrong["twins_apart"] < 1e-9


@teachers
def test_each_term_teaches_its_own_side_and_nobody_else(name, target):
    player, teacher = student(name, target, MEAN + AWAY), exact(name, target)
    nets = replace(game(player, teacher), average=jumper(name, target, MEAN + 0.1))
    losses = TwinFlow().student_loss(nets, Batch(NOTHING, (N, 2), clean()), stream(0, 0, 0, 0))
    own, twin = [player.net.mean, player.net.var], list(player.net.twin)
    for term, moved in (("rcgm", own), ("rectify", own), ("fake", twin)):
        grads = torch.autograd.grad(losses.terms[term].mean(), own + twin, retain_graph=True, allow_unused=True)
        for p, grad in zip(own + twin, grads, strict=True):
            moves = grad is not None and bool((grad != 0).any())
            assert moves == any(p is m for m in moved)
    losses.total.backward()
    assert all(p.grad is None for net in (teacher.net, nets.average.net) for p in net.parameters())


def test_the_jumps_are_those_of_rcgm_and_the_sample_is_drawn_from_noise():
    player, given = student("sd", "epsilon", MEAN + AWAY), Batch(NOTHING, (N, 2), clean())
    nets = game(player, exact("sd", "epsilon"))
    losses = TwinFlow().student_loss(nets, given, stream(0, 0, 0, 0))
    torch.testing.assert_close(losses.terms["rcgm"], RCGM().student_loss(nets, given, stream(0, 0, 0, 0)).terms["rcgm"])
    alpha, sigma = player.schedule.alpha_sigma(torch.ones(1).double())
    z = (losses.sample.detach() - MEAN) / VAR.sqrt()  # the exact map from noise keeps an offset of alpha mean at a table's end
    assert z.mean().abs() < 0.25 and z.std() == pytest.approx(1, abs=0.2)
    assert float(like(alpha, z) / like(sigma, z)) < 0.1
    for wrong in ({"fake": 0.0}, {"rectify": -1.0}):
        with pytest.raises(ValueError, match="positive weights"):
            TwinFlow(**wrong)
