import math
from itertools import product

import numpy as np
import pytest
import torch
from toys import NOTHING, OneLevel, gaussian, times

from fewstep.losses import (
    CONTESTS,
    flat_mean,
    gradient_penalty,
    health,
    jitter_penalty,
    logistic,
    mse,
    non_saturating,
    normalised,
    pseudo_huber,
    push,
    unit,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_push_has_exactly_the_given_gradient(dtype):
    x, direction = torch.randn(3, 2, 4, dtype=dtype, requires_grad=True), torch.randn(3, 2, 4, dtype=dtype)
    push(x, direction).sum().backward()
    torch.testing.assert_close(x.grad, direction / 8, rtol=1e-6, atol=0)


def test_push_in_bfloat16_keeps_a_gradient_that_subtraction_would_lose():
    x = torch.randn(4, 512).bfloat16().requires_grad_()
    direction = 1e-3 * torch.randn(4, 512)

    def error(loss):
        (grad,) = torch.autograd.grad(loss, x)
        return float((grad.float() * 512 - direction).norm() / direction.norm())

    assert error(push(x, direction).sum()) < 0.004
    naive = 0.5 * (x - (x - direction.bfloat16()).detach()).float().square().mean(1)
    assert error(naive.sum()) > 0.2  # what this test would let through, were it not measured


def test_push_is_valued_at_half_the_mean_square_of_its_direction():
    x, direction = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(push(x, direction), 0.5 * direction.square().mean(1))


def test_push_sends_nothing_to_its_direction():
    direction = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    push(x, direction).sum().backward()
    assert direction.grad is None


def test_the_normaliser_makes_the_direction_free_of_scale():
    direction, x, real = torch.randn(3, 8).double(), torch.randn(3, 8).double(), torch.randn(3, 8).double()
    torch.testing.assert_close(normalised(5 * direction, 5 * x, 5 * real), normalised(direction, x, real))


def test_the_normaliser_is_a_number_a_sample_with_a_floor():
    x = torch.tensor([[1.0, -1.0], [0.5, 0.5]])
    real = torch.tensor([[3.0, 1.0], [0.5, 0.5]])
    torch.testing.assert_close(normalised(torch.ones(2, 2), x, real, floor=0.25), torch.tensor([[0.5, 0.5], [4.0, 4.0]]))


def test_the_normaliser_sends_no_gradient():
    x = torch.randn(2, 4, requires_grad=True)
    direction = torch.randn(2, 4, requires_grad=True)
    normalised(direction, x, torch.randn(2, 4)).sum().backward()
    assert x.grad is None and direction.grad is not None


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow", "sample"])
def test_the_normaliser_in_many_dimensions(target):
    """O2: E|x - real| at a=.8, sigma=.6, teacher N(.3, 1), student -.2 + .7 z is .456182."""
    n, level = 100_000, OneLevel(0.8, 0.6)
    x = -0.2 + 0.7 * torch.randn(1, n, dtype=torch.float64)
    t = times(0.5)
    real = gaussian([0.3], [1.0], level, target)(level.add_noise(x, torch.randn_like(x), t), t, NOTHING).x0
    scale = 1 / normalised(torch.ones_like(x), x, real)[0, 0].item()
    s, m = math.sqrt((0.7 * 0.36) ** 2 + 0.8**2 * 0.6**2), -0.5 * 0.36
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))
    assert folded == pytest.approx(0.456182, abs=1e-6)
    assert scale == pytest.approx(folded, rel=0.01)


def test_pseudo_huber_is_absolute_far_out_and_quadratic_near():
    a, b = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    torch.testing.assert_close(pseudo_huber(a, b, 1e-9), (a - b).abs().mean(1), rtol=1e-6, atol=0)
    c = 1e4
    torch.testing.assert_close(2 * c * pseudo_huber(a, b, c), (a - b).square().mean(1), rtol=1e-4, atol=0)
    assert (pseudo_huber(a, a, 0.001) == 0).all()


@pytest.mark.parametrize("loss", [mse, lambda a, b: pseudo_huber(a, b, 0.001)])
def test_distances_are_a_number_a_sample_and_wide(loss):
    a, b = torch.randn(3, 2, 4, 4).bfloat16(), torch.randn(3, 2, 4, 4).bfloat16()
    assert loss(a, b).shape == (3,) and loss(a, b).dtype == torch.float32
    torch.testing.assert_close(loss(a, b)[1:2], loss(a[1:2], b[1:2]))
    assert loss(a.double(), b.double()).dtype == torch.float64


def test_mse_and_mean_are_what_they_say():
    a, b = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    torch.testing.assert_close(mse(a, b), ((a - b) ** 2).mean((1, 2)))
    torch.testing.assert_close(flat_mean(a), a.mean((1, 2)))


def test_gan_pairs_at_an_undecided_discriminator():
    """T21: log 2 for the generator, 2 log 2 for the discriminator; fooling pays, being right pays."""
    zero = torch.zeros(2)
    torch.testing.assert_close(non_saturating(zero), torch.full((2,), math.log(2)))
    torch.testing.assert_close(logistic(zero, zero), torch.full((2,), 2 * math.log(2)))
    assert non_saturating(torch.tensor(9.0)) < 1e-3 and non_saturating(torch.tensor(-9.0)) > 8.9
    assert logistic(torch.tensor(9.0), torch.tensor(-9.0)) < 1e-3 and logistic(torch.tensor(-9.0), torch.tensor(9.0)) > 17.9


def test_a_unit_direction_has_the_same_length_at_every_resolution_and_scale():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(flat_mean(unit(x, 0.0).square()), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(unit(1e3 * x, 0.0), unit(x, 0.0))
    torch.testing.assert_close(unit(x, 0.5), unit(x.repeat(1, 7, 1), 0.5)[:, :2])
    assert (unit(torch.zeros(1, 4), 0.1) == 0).all()


@pytest.mark.parametrize(
    ("name", "judge", "student"),
    [
        ("non_saturating", 2 * math.log(2), math.log(2)),
        ("hinge", 2.0, 0.0),
        ("hinge_both", 2.0, 1.0),
        ("least_squares", 1.0, 1.0),
        ("relativistic", math.log(2), math.log(2)),
    ],
)
def test_every_contest_at_an_undecided_judge(name, judge, student):
    """T21, and which way it pays to move: real up and fake down for the judge, fake up for the student."""
    rules = CONTESTS[name]
    real, fake = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for loss, value, signs in ((rules.judge, judge, (-1, 1)), (rules.student, student, (None, -1))):
        found = loss(real, fake)
        torch.testing.assert_close(found.detach(), torch.full((2,), value, dtype=torch.float64))
        for sign, grad in zip(signs, torch.autograd.grad(found.sum(), (real, fake), allow_unused=True), strict=True):
            assert sign is None or bool((grad * sign > 0).all()) or (name == "least_squares" and sign == 1 and not grad.any())
    assert rules.pairs == (name == "relativistic")


@pytest.mark.parametrize(
    ("level", "mu", "s", "m", "r"),
    [((0.8, 0.6), 0.3, 1.0, -0.2, 0.7), ((0.4, 0.6), 0.3, 1.0, -0.2, 1.3), ((0.8, 0.6), 0.3, 1, 0.3, 1)],
)
def test_the_best_judge_gives_the_students_loss_the_gradient_of_reverse_kl(level, mu, s, m, r):
    """O6: with D = log p_real - log p_student of x_t, E[-D] has (alpha / sigma)^2 times the gradient O1 of distribution matching;
    the non-saturating loss has sigmoid(-D) times it inside the expectation. The third row is the fixed point (T3)."""
    (alpha, sigma), d = level, {"dtype": torch.float64}
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z, n = (torch.tensor(v, **d) for v in zip(*product(nodes, nodes), strict=True))
    w = torch.tensor([a * b for a, b in product(weights, weights)], **d) / (2 * math.pi)
    mean, std = torch.tensor(m, **d, requires_grad=True), torch.tensor(r, **d, requires_grad=True)
    x_t = alpha * (mean + std * z) + sigma * n
    real_var, fake_var = ((alpha * v) ** 2 + sigma**2 for v in (s, r))

    def best(x):
        return (
            -((x - alpha * mu) ** 2) / (2 * real_var) + (x - alpha * m) ** 2 / (2 * fake_var) + math.log(fake_var / real_var) / 2
        )

    found = torch.autograd.grad((w * CONTESTS["hinge"].student(x_t, best(x_t))).sum(), (mean, std), retain_graph=True)
    o1 = ((m - mu) * sigma**2 / real_var, r * sigma**2 * alpha**2 * (r * r - s * s) / real_var / fake_var)
    anchors = {(0.8, 0.7): (-0.18, -0.122109), (0.4, 1.3): (-0.346154, 0.157614), (0.8, 1): (0.0, 0.0)}[alpha, r]
    assert o1 == pytest.approx(anchors, abs=1e-6)
    assert [float(g) for g in found] == pytest.approx([(alpha / sigma) ** 2 * g for g in o1], abs=1e-9)

    tempered = torch.autograd.grad((w * non_saturating(best(x_t))).sum(), (mean, std), retain_graph=True)
    weighed = torch.autograd.grad((w * torch.sigmoid(-best(x_t)).detach() * -best(x_t)).sum(), (mean, std))
    torch.testing.assert_close(tempered, weighed)


def along_every_axis(judge, x, std):
    """The jitter penalty of one sample (1, D), its expectation taken exactly: sqrt(D) times each axis, both ways."""
    steps = math.sqrt(x.shape[1]) * torch.cat([torch.eye(x.shape[1]), -torch.eye(x.shape[1])]).double()
    return jitter_penalty(judge(x).expand(len(steps), -1), judge(x + std * steps), std).mean()


def test_the_slope_of_a_straight_judge_is_known():
    """T21: |w|^2 by either form, whatever the step; K logits are averaged by one, their mean is differentiated by the other."""
    w, x = torch.randn(5, 3).double(), torch.randn(2, 5).double().requires_grad_()
    torch.testing.assert_close(gradient_penalty(x @ w[:, :1], x), w[:, 0].square().sum().expand(2))
    torch.testing.assert_close(gradient_penalty(x @ w, x), w.mean(1).square().sum().expand(2))
    for std in (0.01, 3.0):
        torch.testing.assert_close(along_every_axis(lambda x: x @ w[:, :1], x[:1], std), w[:, 0].square().sum())
        torch.testing.assert_close(along_every_axis(lambda x: x @ w, x[:1], std), w.square().sum(0).mean())


def test_the_approximate_slope_tends_to_the_exact_one():
    """T21, of a judge that bends."""
    w, x = torch.randn(4, 6).double(), torch.randn(1, 4).double().requires_grad_()

    def judge(x):
        return (x @ w).tanh().sum(1, keepdim=True)

    exact = gradient_penalty(judge(x), x)
    errors = [abs(float((along_every_axis(judge, x, std) - exact).detach())) for std in (0.1, 0.01, 0.001)]
    assert errors[0] > 20 * errors[1] > 400 * errors[2]


def test_another_sample_in_the_place_of_the_jittered_one_is_not_a_slope():
    """The trap of a public code base, which compares D(noised real) with D(clean real + s n): 100 times too much and more."""
    w, x = torch.randn(6, 1).double(), torch.randn(256, 6).double()
    noised, n, std = 0.6 * x + 0.8 * torch.randn_like(x), torch.randn_like(x), 0.01
    right = jitter_penalty(noised @ w, (noised + std * n) @ w, std).mean()
    assert float(right) == pytest.approx(float(w.square().sum()), rel=0.3)
    assert float(jitter_penalty(noised @ w, (x + std * n) @ w, std).mean()) > 100 * float(right)


def test_a_penalty_teaches_the_judge_to_be_flat():
    w = torch.randn(3, 1).double().requires_grad_()
    x = torch.randn(2, 3).double().requires_grad_()
    gradient_penalty(x @ w, x).mean().backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_the_health_of_heads_is_counted():
    real, fake = torch.tensor([[3.0, 1.0], [11.0, 1.0]]), torch.tensor([[-1.0, 1.0], [-3.0, -12.0]])
    found = {k: float(v) for k, v in health(real, fake).items()}
    assert found == pytest.approx({"gap": (2 + 13.5) / 2, "gap_std": (13.5 - 2) / 2, "accuracy": 7 / 8, "clipped": 2 / 8})
