import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from toys import NOTHING, SCHEDULES, game

from fewstep.denoiser import Denoiser
from fewstep.matched import Matched
from fewstep.objectives import Batch
from fewstep.objectives.scm import SCM
from fewstep.schedules import TrigFlow
from fewstep.stream import stream
from fewstep.tangents import DERIVATIVES, STEP, difference, jvp


class Block(nn.Module):
    """A Diffusers transformer block over four tokens, told the time by waves."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(8, num_attention_heads=2, attention_head_dim=4, attention_bias=True)

    def forward(self, x, time, cond):
        waves = torch.sin(time[:, None] * torch.arange(1, 9) / 300)
        return self.block(x + waves[:, None])


@pytest.fixture
def places():
    torch.manual_seed(0)
    x, dx = torch.randn(2, 6, 4, 8, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    return x, t, dx, torch.linspace(0.3, 0.1, 6, dtype=torch.float64)


def field(name, target):
    torch.manual_seed(1)
    network = Denoiser(Block().double(), SCHEDULES[name], target, lambda net, x, time, cond: net(x, time, cond))
    matched = Matched(network, TrigFlow())
    return lambda x, t: matched(x, t, NOTHING).v


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_the_derivative_through_a_transformer_block_is_the_central_difference(name, target, places):
    x, t, dx, dt = places
    f, h = field(name, target), 1e-6
    value, slope = jvp(f, x, t, dx, dt)
    with torch.no_grad():
        expected = (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(value, f(x, t).detach())
    assert (slope - expected).abs().max() / expected.abs().max() < 1e-6
    assert not value.requires_grad and not slope.requires_grad


def test_differences_behind_are_of_second_order(places, monkeypatch):
    f = field("flow", "flow")
    exact = jvp(f, *places)[1]

    def error(step):
        monkeypatch.setattr("fewstep.tangents.STEP", step)
        return float((difference(f, *places)[1] - exact).norm())

    assert error(2e-3) / error(1e-3) == pytest.approx(4, rel=0.05)
    assert error(STEP) < 1e-4 * float(exact.norm())


def test_differences_never_look_beyond_t(places):
    x, t, dx, dt = places
    asked = []
    difference(lambda x, u: asked.append(u) or x, x, t, dx, dt)
    assert torch.stack(asked).max(0)[0].equal(t)


def test_what_does_not_depend_on_its_input_has_no_slope(places):
    x, *rest = places
    assert all((d(lambda y, t: torch.ones_like(x), x, *rest)[1] == 0).all() for d in DERIVATIVES.values())


class Fused(torch.autograd.Function):
    """Stands for a kernel like flash attention: a backward, and no forward differentiation."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_kernel_without_forward_differentiation_is_named_with_a_remedy(places):
    with pytest.raises(ValueError, match=r"objective\.derivative: difference"):
        jvp(lambda x, t: Fused.apply(x), *places)


def test_another_error_of_the_network_is_its_own(places):
    def broken(x, t):
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        jvp(broken, *places)


def test_the_difference_serves_such_a_kernel():
    schedule = SCHEDULES["flow"]
    student = Denoiser(nn.Linear(2, 2), schedule, "flow", lambda net, x, time, cond: Fused.apply(net(x)))
    batch = Batch(NOTHING, (4, 2), torch.randn(4, 2))
    loss = SCM(derivative="difference", weighting="none").student_loss(game(student, student), batch, stream(0, 0, 0, 0)).total
    loss.backward()
    assert student.net.weight.grad.abs().max() > 0
