"""Samples that heads learn from: what a student's turn hands on, without what else the turn would ask."""

from dataclasses import replace

import pytest
import torch
from every import INNER, JUDGED, made
from jumping import MEAN, VAR, clean, exact, jumper
from torch import nn
from toys import NOTHING, Counted, Joined, play, ring

from fewstep.denoiser import Guided
from fewstep.objectives import Batch, Nets
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.scm import SCM
from fewstep.objectives.tcd import TCD
from fewstep.sampling import ddim, uniform_grid
from fewstep.stream import stream


def asked(objective, look):
    """(what `look(student's turn, nets, batch)` found in a toy world that is no longer at its start, passes of each network)."""
    torch.manual_seed(0)
    world = ring(objective)
    play(objective, world, 2, 32, 1e-3)
    calls = {name: Counted() for name in ("student", "teacher")}
    nets = replace(world.nets, **{name: replace(getattr(world.nets, name), call=call) for name, call in calls.items()})
    turn = next(turn for turn in objective.round(0) if turn.player == "student")
    with torch.no_grad():
        found = look(turn, nets, world.batch(32))
    return found, {name: len(call.inputs) for name, call in calls.items()}


OFFERED = [name for name in INNER if any(turn.sample for turn in made(name).round(0))]


def test_whose_turns_offer_a_sample():
    assert OFFERED == ["consistency", "scm", "tcd"]


@pytest.mark.parametrize("name", OFFERED)
def test_it_is_the_losses_own_to_the_bit_for_one_pass_of_the_student(name):
    def both(turn, nets, batch):
        return turn.loss(nets, batch, stream(0, 0, 0, 0).child("sample")).sample

    whole, passes = asked(made(name), both)
    assert passes["teacher"] >= 1
    alone, passes = asked(made(name), lambda turn, *parts: turn.sample(*parts, stream(0, 0, 0, 0).child("sample")))
    assert torch.equal(alone, whole) and passes == {"student": 1, "teacher": 0}


@pytest.mark.parametrize(
    "inner", [Consistency(steps=2, segments=1), TCD(steps=2), SCM(steps=2)], ids=lambda inner: type(inner).__name__
)
def test_heads_of_their_own_ask_the_teacher_for_features_alone(inner):
    """LADD's turn for the heads, SANA-Sprint's among them: the student once, the teacher's blocks once."""
    objective = Adversarial(inner=inner, heads="ladd")
    heads = objective.round(0)[0]
    assert heads.player == "heads"
    _, passes = asked(objective, lambda _, nets, batch: heads.loss(nets, batch, stream(0, 0, 0, 0)))
    assert passes == {"student": 1, "teacher": 0}  # features come through the judge, which is not counted here


POINTS = [name for name in JUDGED if not made(name).draws]


def test_whose_losses_hand_on_points_on_the_way():
    told = ["meanflow", "rcgm", "shortcut"]
    assert set(POINTS) == {"annealed_reflow", "boot", "consistency", "guidance", "progressive", "reflow", *told}


class Sees:
    """A judge that is shown pictures and keeps them."""

    def logits(self, x, t, cond):
        self.shown = x
        return x.sum(1, keepdim=True)


class Deaf(nn.Module):
    """A network that has no ear for a scale."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, time, cond, guidance_scale=None, **told):
        return self.net(x, time, cond, **told)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", POINTS)
def test_what_heads_judge_of_an_exact_student_is_spread_as_the_data_is(name, steps):
    """In both turns; the x0 that the loss itself hands on is narrower by a fifth and more."""
    steps, n = 1 if name == "boot" else steps, 4096
    objective, grid = Adversarial(inner=made(name, steps), heads="pixel"), uniform_grid(steps)
    player, teacher, judge = jumper("flow", "flow", grid=grid), exact("flow", "flow"), Sees()
    player, teacher = replace(player, net=Deaf(player.net)), Guided(replace(teacher, net=Deaf(teacher.net)), 1.0, NOTHING)
    nets = Nets(player, teacher, grid, ddim, judge=judge, average=player)
    batch = Batch(NOTHING, (n, 2), clean(n), torch.randn(n, 2).double())
    for turn in objective.round(0):
        turn.loss(nets, batch, Joined((stream(0, 0, 0, 0),), n))
        shown = judge.shown[-n:].detach()
        torch.testing.assert_close(shown.mean(0), MEAN, rtol=0, atol=0.08)
        torch.testing.assert_close(shown.var(0), VAR, rtol=0.08, atol=0)
