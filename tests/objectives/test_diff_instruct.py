import pytest
from toys import Linear, OneLevel, Quadrature, denoiser, expected_gradient, game, gaussian, reverse_kl

from fewstep.objectives.diff_instruct import DiffInstruct

# (alpha, sigma, teacher's mean and std, student's mean and std)
ROWS = [(0.8, 0.6, 0.3, 1.0, -0.2, 0.7), (0.4, 0.6, 0.3, 1.0, -0.2, 1.3), (1.0, 2.0, 0.3, 1.0, -0.2, 0.7)]


def play(a, sig, mu, s, m, r, target):
    level = OneLevel(a, sig)
    nets = game(denoiser(Linear(m, r), level, target), *(gaussian([x], [y**2], level, target) for x, y in ((mu, s), (m, r))))
    return expected_gradient(DiffInstruct(), nets, Quadrature(2))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow", "sample"])
def test_the_gradient_is_that_of_the_divergence_as_it_is(row, target):
    """O1 without a normaliser; the variance-exploding row is the paper's own setting."""
    assert play(*row, target) == pytest.approx(reverse_kl(*row), rel=1e-9)


def test_twice_as_far_is_twice_as_fast():
    a, sig, mu, s, m, r = ROWS[0]
    near, far = play(a, sig, mu, s, m, r, "flow"), play(a, sig, mu, s, mu + 2 * (m - mu), r, "flow")
    assert far[0] == pytest.approx(2 * near[0])
