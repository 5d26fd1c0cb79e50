"""Losses whose value is what is minimised: their gradient is its slope while targets stay (consistency.md 11, point 9)."""

import copy
from dataclasses import replace

import pytest
import torch
from toys import Double, ring

from fewstep.objectives import Batch, objectives
from fewstep.stream import stream

# How often the student is asked with a graph and, for targets, without one. The others push along a direction (`losses.push`).
ASKED = {
    "annealed_reflow": (1, 0),
    "boot": (2, 1),
    "consistency": (1, 1),
    "ect": (1, 1),
    "flow_guided": (1, 1),
    "guidance": (1, 0),
    "ict": (1, 1),
    "progressive": (1, 0),
    "reflow": (1, 0),
    "regression": (1, 1),
    "shortcut": (1, 2),
    "tcd": (1, 1),
}
# Without a step to walk, or with targets of data alone, nobody would be asked for them.
OPTIONS = {"ect": {"closest": 0.9, "q": 100.0}, "shortcut": {"average": None}}


class Twofold(torch.nn.Module):
    """A network that answers with the weights it is given where there is a graph, and with those it had at first where not."""

    def __init__(self, net):
        super().__init__()
        self.net, self.first, self.asked = net, copy.deepcopy(net), [0, 0]

    def forward(self, *given, **inputs):
        live = torch.is_grad_enabled()
        self.asked[0 if live else 1] += 1
        return (self.net if live else self.first)(*given, **inputs)


@pytest.mark.parametrize("name", ASKED)
def test_the_gradient_is_the_slope_of_the_loss_while_targets_stay(name):
    objective = objectives()[name](steps=2, **OPTIONS.get(name, {}))
    world = ring(objective, torch.float64)
    student = Twofold(world.players["student"])
    for p in student.net.mlp[-1].parameters():
        torch.nn.init.normal_(p, std=0.3)
    student.first.load_state_dict(student.net.state_dict())
    nets, drawn = replace(world.nets, student=replace(world.nets.student, net=student)), world.batch(16)
    latents, noise = (None if x is None else x.double() for x in (drawn.latents, drawn.noise))
    batch, (turn,) = Batch(drawn.cond, drawn.shape, latents, noise), objective.round(0)

    def loss():
        return turn.loss(nets, batch, Double(stream(0, 0, 0, 0))).total

    parameters = list(student.net.parameters())
    grads = torch.autograd.grad(loss(), parameters)
    assert tuple(student.asked) == ASKED[name]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope, step, ends = sum(float((g * w).sum()) for g, w in zip(grads, way)), 1e-6, []
        for side in (1, -1):
            for p, w in zip(parameters, way):
                p.data += side * step * w
            ends.append(float(loss().detach()))
            for p, w in zip(parameters, way):
                p.data -= side * step * w
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5) and abs(slope) > 1e-6
