"""A mixture of experts along time: who answers, and that no one else is touched."""

import pytest
import torch
from torch.testing import assert_close
from toys import NOTHING, SCHEDULES, Exact, Gaussian, call, times

from fewstep.denoiser import Cond, Denoiser
from fewstep.experts import PhasedExperts, hand_over, switches

KINDS = [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow"), ("flow-reversed", "flow"), ("edm", "sample")]
LAWS = [([0.3, -1.0], [0.5, 2.0]), ([0.0, 0.4], [1.5, 0.2]), ([2.0, 1.0], [0.1, 0.1])]


def mixture(name, target, dtype=torch.float64):
    schedule = SCHEDULES[name]
    nets = [Exact(Gaussian(*law), schedule, target).to(dtype) for law in LAWS]
    alone = [Denoiser(net, schedule, target, call) for net in nets]
    experts = PhasedExperts("student", nets, call)
    return Denoiser(experts, schedule, target, hand_over, switches=(0.75, 0.25)), alone


@pytest.mark.parametrize(("name", "target"), KINDS)
def test_every_row_is_answered_by_the_expert_of_its_time(name, target):
    """A switch belongs to the expert that starts there; rows keep their order, their prompts and their further inputs."""
    denoiser, alone = mixture(name, target)
    t = times(0.25, 0.9, 0.75, 0.3, 0.76, 0.1)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = Cond({"mean": torch.arange(12, dtype=torch.float64).reshape(6, 2)})
    found = denoiser(x, t, cond)
    for i, k in enumerate((2, 0, 1, 1, 0, 2)):
        row = slice(i, i + 1)
        assert_close(found.x0[row], alone[k](x[row], t[row], cond[row]).x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_a_deployed_time_is_its_own_experts_in_float32_too(shift):
    """The times of a grid are where switches lie: no rounding may hand them to the expert before."""
    grid = [shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25)]
    for name in ("flow", "flow-reversed"):
        schedule = SCHEDULES[name]
        read = schedule.t_of_model_time(schedule.model_time(times(*grid)).float().double())
        denoiser, _ = mixture(name, "flow", torch.float32)
        told = Denoiser(denoiser.net, schedule, "flow", hand_over, switches=switches(grid, 4)).told
        for t in (times(*grid), read):
            assert told(t.double(), None, None, torch.device("cpu"), torch.float32).inputs["experts"] == [0, 1, 2, 3]


def test_who_is_not_asked_has_no_gradient():
    denoiser, _ = mixture("flow", "flow")
    denoiser(torch.randn(3, 2, dtype=torch.float64), times(0.5, 0.6, 0.75), NOTHING).x0.sum().backward()
    silent = [all(p.grad is None for p in expert.parameters()) for expert in denoiser.net.experts]
    assert silent == [True, False, True]


def test_phases_begin_at_deployed_times():
    assert switches((1.0, 0.75, 0.5, 0.25), 2) == (0.5,)
    assert switches((1.0, 0.9375, 0.8333, 0.625), 4) == (0.9375, 0.8333, 0.625)
    assert switches((1.0, 0.5), 1) == ()
    with pytest.raises(ValueError, match="4 steps cannot be shared out over 3 phases; choose a multiple of 3"):
        switches((1.0, 0.75, 0.5, 0.25), 3)
