import pytest
import torch
from toys import SCHEDULES

from fewstep.stream import stream
from fewstep.times import LogNormal, Uniform

N = 20_000


def draw(law, seed=0):
    return law.sample(N, stream(seed, 0, 0, 0))


def assert_law(t, quantile):
    """The sample's quantiles are those of the law (Kolmogorov and Smirnov, far beyond chance)."""
    p = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    assert (t.sort()[0] - quantile(p)).abs().max() < 2.5 / N**0.5


def test_uniform_times_fill_their_range():
    t = draw(Uniform(0.02, 0.98))
    assert t.dtype == torch.float64 and t.shape == (N,)
    assert t.min() >= 0.02 and t.max() <= 0.98
    assert_law(t, lambda p: 0.02 + 0.96 * p)


def test_a_shift_moves_times_towards_noise():
    assert_law(draw(Uniform(shift=5.0)), lambda p: 5 * p / (1 + 4 * p))


def test_a_shift_keeps_the_ends_of_the_range():
    t = draw(Uniform(0.1, 0.9, shift=5.0))
    assert 0.1 <= t.min() < 0.11 and 0.89 < t.max() <= 0.9


def test_times_come_from_the_stream():
    assert torch.equal(draw(Uniform()), draw(Uniform()))
    assert not torch.equal(draw(Uniform()), draw(Uniform(), seed=1))


@pytest.mark.parametrize("low, high", [(-0.1, 1), (0, 1.1), (0.5, 0.5), (0.6, 0.4)])
def test_an_empty_or_outside_range_is_refused(low, high):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        Uniform(low, high)


@pytest.mark.parametrize("shift", [0, -1])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="shift must be positive"):
        Uniform(shift=shift)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_log_normal_law_is_one_of_noise_ratios_on_every_schedule(name):
    """Up to the schedule's ends, where what lies beyond is put."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.alpha_sigma(LogNormal(-0.3, 1.4).sample(N, stream(0, 0, 0, 0), schedule))
    p = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    expected = (-0.3 + 1.4 * torch.special.ndtri(p)).exp()
    end = float(torch.div(*schedule.alpha_sigma(torch.ones(1).double())[::-1]))
    assert ((sigma / alpha).log().sort()[0] - expected.clamp(max=end).log())[500:-500].abs().max() < 0.1


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        LogNormal(0.0, 0.0)
