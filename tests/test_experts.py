"""A mixture of experts along time: who answers, and that no one else is touched."""

import copy

import pytest
import torch
from tiny import tiny_wan22_pipeline
from torch.testing import assert_close
from toys import NOTHING, SCHEDULES, Exact, Gaussian, call, times

from fewstep.denoiser import Cond, Denoiser
from fewstep.embedders import END, gain
from fewstep.experts import PhasedExperts, Relay, hand_over, switches
from fewstep.families import FAMILIES
from fewstep.heads import Heads
from fewstep.networks import Full, Lora, build
from fewstep.taps import Enough, tapped, taps_of

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


# A teacher of two networks


@pytest.fixture(scope="module")
def relay():
    pipe = tiny_wan22_pipeline()
    return Relay({"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}, 0.875).requires_grad_(False)


def fed(relay, t, grad=False):
    """(the Denoiser around a relay, x, t, cond) for some times."""
    wan, rng = FAMILIES["WanPipeline"], torch.Generator().manual_seed(0)
    denoiser = Denoiser(relay, wan.schedule(None), wan.target(None), wan.call, switches=(0.875 - 1e-8,))
    x = torch.randn(len(t), 4, 2, 4, 4, generator=rng).requires_grad_(grad)
    return denoiser, x, times(*t), Cond({"prompt": torch.randn(len(t), 3, 16, generator=rng)})


def test_every_row_is_answered_by_the_network_of_its_time_and_the_boundary_is_the_firsts(relay):
    denoiser, x, t, cond = fed(relay, (0.2, 0.9, 0.875, 0.874, 1.0))
    assert relay.switches == denoiser.switches
    found = denoiser(x, t, cond)
    for i, name in enumerate(("transformer_2", "transformer", "transformer", "transformer_2", "transformer")):
        row = slice(i, i + 1)
        alone = Denoiser(getattr(relay, name), denoiser.schedule, "flow", denoiser.call)
        assert_close(found.x0[row], alone(x[row], t[row], cond[row]).x0)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("t", [(0.2, 0.9, 0.5), (0.9, 1.0, 0.95), (0.1, 0.2, 0.3)])
def test_a_tap_on_two_networks_sees_every_row_in_its_place(relay, t, stop):
    denoiser, x, t, cond = fed(relay, t)
    taps = taps_of(relay, tuple(Heads("dmd2").taps_on(relay).blocks))
    ended = False
    with tapped(taps.blocks, "stop" if stop else "go on") as found:
        try:
            denoiser(x, t, cond)
        except Enough:
            ended = True
    (whole,) = taps.read(found, x, cond)
    assert ended is stop and whole.shape == (3, 16, 4, 2)
    for i, time in enumerate(t.tolist()):
        net = relay.transformer if time >= 0.875 else relay.transformer_2
        with tapped({"blocks.0": net.blocks[0]}) as alone:
            denoiser.call(net, x[i : i + 1], denoiser.schedule.model_time(t[i : i + 1]).float(), cond[i : i + 1])
        assert_close(whole[i], alone["blocks.0"][0].T.unflatten(1, (4, 2)))
    assert not any(block._forward_hooks for net in relay.children() for block in net.blocks)


def test_inputs_that_two_networks_cannot_take_are_refused_in_a_sentence(relay):
    gain(relay, ())
    with pytest.raises(ValueError, match="the student the end_time, which a student of two networks .* cannot be told; use"):
        gain(relay, (END,))


@pytest.mark.parametrize("wanted", [Lora(2), Full()])
def test_checkpointing_two_networks_changes_no_gradient_and_the_idle_one_gets_none(relay, wanted):
    found = []
    for checkpointing in (False, True):
        roles = build(copy.deepcopy(relay), {"student": wanted}, lora_targets=["to_q"], checkpointing=checkpointing, seed=1)
        denoiser, x, t, cond = fed(roles["student"], (0.2, 0.5, 0.3), grad=True)
        with torch.no_grad():
            for p in roles["student"].parameters():
                p.add_(0.01)
        denoiser(x, t, cond).x0.square().sum().backward()
        grads = {k: p.grad for k, p in roles["student"].weights().items()}
        assert all((g is None) == k.startswith("transformer.") for k, g in grads.items())
        found.append([g for g in grads.values() if g is not None])
    assert len(found[0]) > 1
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
