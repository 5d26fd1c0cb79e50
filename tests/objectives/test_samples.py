"""Samples that heads learn from: what a student's turn hands on, without what else the turn would ask."""

from dataclasses import replace

import pytest
import torch
from every import INNER, made
from toys import Counted, play, ring

from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.contest import drawn
from fewstep.objectives.scm import SCM
from fewstep.objectives.tcd import TCD
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
    alone, passes = asked(made(name), lambda *parts: drawn(*parts, stream(0, 0, 0, 0)))
    assert torch.equal(alone, whole) and passes == {"student": 1, "teacher": 0}


@pytest.mark.parametrize("inner", [Consistency(steps=2), TCD(steps=2), SCM(steps=2)], ids=lambda inner: type(inner).__name__)
def test_heads_of_their_own_ask_the_teacher_for_features_alone(inner):
    """LADD's turn for the heads, SANA-Sprint's among them: the student once, the teacher's blocks once."""
    objective = Adversarial(inner=inner, heads="ladd")
    heads = objective.round(0)[0]
    assert heads.player == "heads"
    _, passes = asked(objective, lambda _, nets, batch: heads.loss(nets, batch, stream(0, 0, 0, 0)))
    assert passes == {"student": 1, "teacher": 0}  # features come through the judge, which is not counted here
