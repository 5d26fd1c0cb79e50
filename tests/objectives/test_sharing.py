"""One pass of the critic serves its score and the heads' features, where both are asked of the same sample."""

from dataclasses import replace

import pytest
import torch
from toys import NOTHING, play, ring, times

from fewstep.losses import CONTESTS
from fewstep.objectives import Losses, Turn, objectives
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.dmd import DMD
from fewstep.objectives.phased_dmd import PhasedDMD
from fewstep.objectives.sid import SiD
from fewstep.objectives.vsd import VSD
from fewstep.stream import stream

RULES = CONTESTS["non_saturating"]


class Ear:
    """A judge that keeps what it was shown, when, and what it said."""

    def __init__(self, judge):
        self.judge, self.heard = judge, []

    def logits(self, x_t, t, cond):
        self.heard.append((x_t, t, self.judge.logits(x_t, t, cond)))
        return self.heard[-1][2]

    def both(self, x_t, t, cond, graph=True):
        prediction, logits = self.judge.both(x_t, t, cond, graph=graph)
        self.heard.append((x_t, t, logits))
        return prediction, logits


def learned(objective, rounds=2):
    """(a toy world that is no longer at its start, its players, how many samples each pass of its critic or judge had)."""
    torch.manual_seed(0)
    world = ring(objective)
    play(objective, world, rounds, 32, 1e-3)
    passes = []

    def call(net, x, time, cond):
        passes.append(len(x))
        return net(x, time, cond)

    critic = replace(world.nets.critic, call=call)
    judge = replace(world.nets.judge, denoiser=replace(world.nets.judge.denoiser, call=call))
    return world, replace(world.nets, critic=critic, judge=judge), passes


def test_one_pass_of_the_critic_gives_its_score_and_the_heads_features():
    """Shared, a critic's turn runs it on n samples, and on n real ones as far as the tap; apart, on 2 n as far as the tap."""
    seen = {}
    for shared in (True, False):
        objective = Adversarial(inner=DMD(steps=1, critic_turns=1), shared=shared)
        world, players, passes = learned(objective)
        turn, before = objective.round(0)[0], len(passes)
        losses = turn.loss(players, world.batch(16), stream(0, 0, 0, 0))
        assert set(losses.terms) == {"denoise", "judge"}
        seen[shared] = passes[before:]
    assert seen == {True: [16, 16], False: [16, 32]}


SCORED = ["dmd", "dmd1", "decoupled", "diff_instruct", "phased_dmd", "sid", "sim", "uni_instruct"]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in SCORED), ("uni_instruct", {"divergence": "kl"})])
def test_the_pass_that_scores_the_students_sample_is_the_one_that_judges_it(name, options):
    kind = objectives()[name]
    objective = Adversarial(inner=kind(steps=max(1, kind().needs.phases), critic_turns=1, **options))
    world, players, passes = learned(objective)
    before = len(passes)
    losses = objective.round(0)[-1].loss(players, world.batch(16), stream(0, 0, 0, 0))
    assert passes[before:] == [16] and losses.terms["adversary"].requires_grad


@pytest.mark.parametrize("inner", [SiD(steps=1, critic_turns=1), VSD(steps=1, critic_turns=1), Consistency(steps=1)])
def test_heads_that_share_no_pass_judge_at_their_own_times(inner):
    """... in both turns, whether the critic is theirs alone, guided, or told to take a pass of its own."""
    objective = Adversarial(inner=inner, low=0.2, high=0.3, shared=not isinstance(inner, SiD))
    world, players, _ = learned(objective)
    for turn in objective.round(0):
        ear = Ear(players.judge)
        turn.loss(replace(players, judge=ear), world.batch(256), stream(0, 0, 0, 0))
        seen = torch.cat([t for _, t, _ in ear.heard])
        assert seen.min() >= 0.2 and seen.max() <= 0.3, turn.player


def test_heads_judge_a_phase_where_they_have_learned_it():
    """Above the level where the next expert begins: x_s under the forward law, in the critic's turn and in the student's."""
    objective = Adversarial(inner=PhasedDMD(steps=2, critic_turns=1))
    world, players, _ = learned(objective)
    for turn in objective.round(0):
        ear = Ear(players.judge)
        turn.loss(replace(players, judge=ear), world.batch(256), stream(0, 0, 0, 0))
        seen = torch.cat([t for _, t, _ in ear.heard])
        assert 0.5 <= seen.min() < 0.55 and seen.max() > 0.95, turn.player


def test_a_shared_view_has_the_logits_that_a_pass_of_its_own_would_give():
    objective = Adversarial(inner=DMD(steps=1, critic_turns=1))
    world, players, _ = learned(objective)
    ear = Ear(players.judge)
    losses = objective.round(0)[0].loss(replace(players, judge=ear), world.batch(16), stream(0, 0, 0, 0))
    (x_t, t, fake), (_, t_real, real) = ear.heard
    torch.testing.assert_close(fake, players.judge.logits(x_t, t, NOTHING))
    assert torch.equal(t, t_real)  # real and fake are told apart by what they show, not by when
    torch.testing.assert_close(losses.terms["judge"], objective.judge_weight * RULES.judge(real, fake).mean(1))
    assert float(losses.stats["gap"]) == pytest.approx(float((real - fake).mean()), abs=1e-6)


@pytest.mark.parametrize("inner", ["detached", "attached", "score"])
def test_the_student_shares_a_pass_only_where_its_sample_has_a_way_through(inner):
    """A score at x_t that the sample has made (distribution matching) is heard, though it is wanted without a graph; one at a
    detached x_t has nothing to teach the student by: then the term has its own pass."""
    objective = Adversarial(inner=DMD(steps=1, critic_turns=1), weight=1.0)
    world, players, passes = learned(objective)
    x = torch.randn(16, 2, requires_grad=True)

    def loss(nets, batch, rng):
        with torch.no_grad():
            nets.critic(x.detach(), times(0.3).expand(16), NOTHING)  # nobody's sample is never listened to
        x_t = 0.5 * (x.detach() if inner == "detached" else x)
        with torch.set_grad_enabled(inner != "score"):
            seen = nets.critic(x_t, times(0.5).expand(16), NOTHING)
        assert not (inner == "score" and seen.x0.requires_grad)
        return Losses({"toy": seen.x0.mean(1)}, sample=x)

    before = len(passes)
    losses = objective.student_loss(Turn("student", loss), players, world.batch(16), stream(0, 0, 0, 0))
    assert len(passes) - before == (3 if inner == "detached" else 2)
    (grad,) = torch.autograd.grad(losses.terms["adversary"].sum(), losses.sample)
    assert bool((grad.abs().sum(1) > 0).all())
