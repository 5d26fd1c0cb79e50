"""sCM's adaptive weighting: a weight of every level, learned along the way."""

import math
from dataclasses import replace

import pytest
import torch
from jumping import MEAN, VAR, clean, exact
from toys import NOTHING, SCHEDULES, Gaussian, denoiser, endpoint, game

from fewstep.losses import unit
from fewstep.objectives import Batch
from fewstep.objectives.scm import ANGLE, SCM, TRIG, tangent
from fewstep.stream import stream
from fewstep.tangents import jvp
from fewstep.weighting import Weighting

N = 128
EXACT = exact("flow", "flow")


def student_of(mean):
    return denoiser(Gaussian(mean.tolist(), VAR.tolist(), endpoint), SCHEDULES["flow"], "flow")


def weighed(student, teacher, w, **options):
    """The losses of one turn under log-weights w(t)."""
    torch.manual_seed(0)
    nets = replace(game(student, teacher), weighting=w)
    return SCM(**options).student_loss(nets, Batch(NOTHING, (N, 2), clean(N)), stream(0, 0, 0, 0))


def test_each_samples_gradient_is_weighted_by_its_level():
    student, teacher = student_of(MEAN + 0.3), EXACT
    asked = []
    plain = weighed(student, teacher, None, weighting="none").terms["scm"]
    losses = weighed(student, teacher, lambda t: asked.append(t) or 3 * t.float() - 1)
    factor = (3 * asked[0].float() - 1).exp()
    assert factor.min() < 0.5 and factor.max() > 4
    parameters = list(student.net.parameters())
    (a, b) = (torch.autograd.grad(v, parameters) for v in (losses.total, (factor * plain).mean()))
    for found, expected in zip(a, b):
        torch.testing.assert_close(found, expected)
    assert SCM().round(0)[0].movers == ("student", "weighting") and SCM(weighting="none").round(0)[0].movers == ("student",)


def test_a_log_weight_is_at_rest_at_minus_the_log_of_the_mean_square():
    student, teacher = student_of(MEAN + 0.3), EXACT
    square = 2 * weighed(student, teacher, None, weighting="none").terms["scm"].detach()  # the loss is half of it

    def slope(value):
        w = torch.tensor(value, requires_grad=True)
        return float(torch.autograd.grad(weighed(student, teacher, lambda t: w.expand(len(t))).total, w)[0])

    best = -float(square.mean().log())
    assert abs(slope(best)) < 1e-6 and slope(best - 1) < -0.1 < 0.1 < slope(best + 1)


def test_nothing_is_weighed_where_nothing_pushes():
    student, teacher = student_of(MEAN + 0.3), EXACT
    w = torch.ones(N, requires_grad=True)
    losses = weighed(student, teacher, lambda t: w, noise_share=0.5)
    (slope,) = torch.autograd.grad(losses.total, w)
    resting = losses.terms["weighting"] == 0
    assert 0.35 < resting.double().mean() < 0.65
    assert (slope[resting] == 0).all() and (slope[~resting] != 0).all()


def test_log_weights_are_learned_under_which_every_level_loses_alike():
    student, teacher, w = student_of(MEAN + 0.3), EXACT, Weighting()
    student.net.requires_grad_(False)
    nets, optimizer = replace(game(student, teacher), weighting=w), torch.optim.Adam(w.parameters(), lr=3e-3)
    objective = SCM(mean=0.0, std=1.5, noise_share=0.3)
    assert (w(torch.rand(5)) == 0).all()
    for k in range(40):
        objective.student_loss(nets, Batch(NOTHING, (N, 2), clean(N)), stream(0, 0, k, 0)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    def levels(ratio):
        """(w(t), -log E[L | t])"""
        t = torch.full((N,), math.atan(ratio) / ANGLE, dtype=torch.float64)
        x_t = TRIG.add_noise(clean(N), torch.randn(N, 2, dtype=torch.float64), t)
        g = unit(tangent(nets, Batch(NOTHING, (N, 2)), x_t, t, 1.0, jvp)[0], objective.floor)
        return float(w(t[:1]).detach()), -float(g.square().mean().log())

    found, best = zip(*(levels(ratio) for ratio in (0.1, 0.5, 2.0, 8.0)), strict=True)
    assert max(best) - min(best) > 1
    assert found == pytest.approx(best, abs=0.5)
