import pytest
import torch
from jumping import MEAN, VAR, N, clean, exact, jumper, teachers
from toys import EPS_V_FLOW, NOTHING, game, guided

from fewstep.matched import Matched
from fewstep.objectives import Batch
from fewstep.objectives.meanflow import FLOW
from fewstep.objectives.rcgm import RCGM, drawn, residual
from fewstep.stream import stream


def asked(student):
    """(t, r, x_t): what is drawn in training, with empty jumps among it."""
    f = Matched(student, FLOW)
    t, r = drawn(N, stream(0, 0, 0, 0), f)
    r[-3:] = t[-3:]
    return t, r, FLOW.add_noise(clean(), torch.randn(N, 2, dtype=torch.float64), t)


@teachers
@pytest.mark.parametrize("order", [1, 3])
def test_at_the_exact_mean_velocity_the_residual_is_of_the_order_of_the_step(name, target, order):
    student, teacher = jumper(name, target), exact(name, target)
    t, _, x_t = asked(student)
    t = t.clamp(0.3, 0.9)

    def largest(delta, other=student):
        return residual(game(other, teacher), Batch(NOTHING, (N, 2)), x_t, t, 0 * t, order, delta)[0].abs().max()

    assert largest(1e-2) / largest(5e-3) == pytest.approx(2, rel=0.1)
    assert largest(1e-4) < 5e-3 < 0.05 < largest(1e-4, jumper(name, target, MEAN + 0.3))


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_guidance_moves_the_flow_by_the_distance_of_the_means(name, target):
    teacher, cond, mean = guided(name, target, MEAN, VAR)

    def largest(centre):
        student = jumper(name, target, centre)
        t, _, x_t = asked(student)
        t = t.clamp(0.3, 0.9)
        return residual(game(student, teacher), Batch(cond.expand(N), (N, 2)), x_t, t, 0 * t, 2, 1e-4)[0].abs().max()

    assert largest(mean) < 5e-3 < 0.05 < largest(MEAN)


@teachers
def test_empty_and_tiny_jumps_learn_the_velocity_and_nothing_is_infinite(name, target):
    student, teacher = jumper(name, target, MEAN + 0.3), exact(name, target)
    t, r, x_t = asked(student)
    nets, batch = game(student, teacher), Batch(NOTHING, (N, 2))
    assert residual(nets, batch, x_t, t, r, 2, 0.01)[0].isfinite().all()
    for end in (t, t - 0.004):
        error, told = residual(nets, batch, x_t, t, end, 2, 0.01)
        gap = Matched(student, FLOW)(x_t, t, NOTHING, r=t).velocity - Matched(teacher, FLOW)(x_t, t, NOTHING).velocity
        torch.testing.assert_close(error, gap)
        assert torch.equal(told, t)
    losses = RCGM().student_loss(nets, Batch(NOTHING, (N, 2), clean()), stream(1, 0, 0, 0))
    losses.total.backward()
    assert all(p.grad is None for p in teacher.net.parameters())
    assert all(p.grad.abs().max() > 0 for p in student.net.parameters())


def test_the_rollout_is_the_averages_and_has_no_gradient():
    student, teacher, other = jumper("flow", "flow"), exact("flow", "flow"), jumper("flow", "flow", MEAN + 1)
    t, r, x_t = asked(student)
    found = [
        residual(type(nets := game(student, teacher))(**{**vars(nets), "average": a}), Batch(NOTHING, (N, 2)), x_t, t, r, 2, 0.01)
        for a in (None, student, other)
    ]
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][0] - found[2][0]).abs().max() > 1 and not found[2][0].requires_grad


def test_the_three_kinds_of_jump_are_drawn_alike():
    f = Matched(exact("sd", "epsilon"), FLOW)
    t, r = drawn(3000, stream(0, 0, 0, 0), f)
    whole, small = (r == 0) & (t == f.highest), t - r <= 0.05 * t
    assert whole.double().mean() == pytest.approx(1 / 3, abs=0.04)
    assert small.double().mean() == pytest.approx(1 / 3 + 0.05 / 3, abs=0.04)
    assert ((f.lowest <= t) & (r >= 0) & (r <= t)).all()
    for wrong in ({"order": 0}, {"delta": 0.0}):
        with pytest.raises(ValueError, match="order is at least 1"):
            RCGM(**wrong)
