import math

import pytest
import torch
from toys import NOTHING, OneLevel, gaussian, times

from fewstep.losses import flat_mean, logistic, mse, non_saturating, normalised, pseudo_huber, push, unit


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


def test_the_normaliser_in_many_dimensions():
    """O2: E|x - real| at a=.8, sigma=.6, teacher N(.3, 1), student -.2 + .7 z is .456182."""
    n, level = 100_000, OneLevel(0.8, 0.6)
    x = -0.2 + 0.7 * torch.randn(1, n, dtype=torch.float64)
    t = times(0.5)
    real = gaussian([0.3], [1.0], level, "epsilon")(level.add_noise(x, torch.randn_like(x), t), t, NOTHING).x0
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
