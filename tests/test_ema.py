"""The average of the weights."""

import pytest
import torch

from fewstep.ema import Ema


def test_bfloat16_weights_move_a_float32_average():
    weights = {"w": torch.ones(8, dtype=torch.bfloat16)}
    ema = Ema(weights, 0.999)
    assert ema.shadow["w"].dtype == torch.float32
    weights["w"].fill_(2)
    ema.update(weights, 100_000)
    # In bfloat16 1 + 0.001 is 1: an average kept there would never move.
    torch.testing.assert_close(ema.shadow["w"], torch.full((8,), 1.001), rtol=0, atol=1e-6)


def test_without_decay_it_is_the_last_weights():
    ema = Ema({"w": torch.zeros(3)}, 0.0)
    for n, value in enumerate(torch.randn(4, 3)):
        ema.update({"w": value}, n)
        assert torch.equal(ema.shadow["w"], value)


def test_the_decay_is_warmed_up_and_then_constant():
    ema = Ema({"w": torch.zeros(1)}, 0.5)
    expected = 0.0
    for n in range(20):
        ema.update({"w": torch.ones(1)}, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + 1 - decay
        assert float(ema.shadow["w"]) == pytest.approx(expected, abs=1e-6)


def test_the_average_is_no_view_of_the_weights():
    weights = {"w": torch.zeros(3, requires_grad=True)}
    ema = Ema(weights, 0.9)
    with torch.no_grad():
        weights["w"].fill_(5)
    assert torch.equal(ema.shadow["w"], torch.zeros(3)) and not ema.shadow["w"].requires_grad


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema is a decay in \[0, 1\)"):
        Ema({}, decay)
