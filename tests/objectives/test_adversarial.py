"""The wrapper adds a contest to whatever it wraps, and changes nothing else."""

import math
from dataclasses import dataclass

import pytest
import torch
from toys import NOTHING, OneLevel, gaussian, play, ring, times

from fewstep.config import parse
from fewstep.losses import CONTESTS
from fewstep.objectives import Batch, Losses, Nets, Turn
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.adversarial_distance import AdversarialDistance
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.contest import View, contest
from fewstep.objectives.dmd import DMD
from fewstep.objectives.f_distill import FDistill
from fewstep.objectives.sid import SiD
from fewstep.objectives.uni_instruct import UniInstruct
from fewstep.objectives.vsd import VSD
from fewstep.sampling import ddim
from fewstep.stream import stream

RULES = CONTESTS["non_saturating"]


@dataclass
class Asked:
    """A judge with a known logit that keeps what it was shown."""

    logit: object
    shown: list

    def logits(self, x_t, t, cond):
        self.shown.append((x_t, t))
        return self.logit(x_t)


def asked(logit=lambda x: x.sum(1, keepdim=True)):
    return Asked(logit, [])


def nets(judge, level=(0.8, 0.6)):
    player = gaussian([0.0], [1.0], OneLevel(*level), "epsilon")
    return Nets(student=player, teacher=player, grid=(1.0,), step=ddim, judge=judge)


def kinds(turns):
    return [turn.movers for turn in turns]


def test_the_heads_learn_where_there_is_something_to_learn_from():
    two = DMD(critic_turns=2)
    assert kinds(Adversarial(inner=two, heads="dmd2").round(0)) == [("critic", "heads")] * 2 + [("student",)]
    assert kinds(Adversarial(inner=two, heads="ladd").round(0)) == [("critic", "heads")] * 2 + [("student",)]
    alone = Consistency()
    assert kinds(Adversarial(inner=alone, heads="ladd").round(0)) == [("heads",), ("student",)]
    assert kinds(Adversarial(inner=alone, heads="dmd2").round(0)) == [("critic", "heads"), ("student",)]
    assert Adversarial(inner=alone, heads="dmd2").needs.roles == ("critic", "heads")
    assert Adversarial(inner=alone, heads="ladd").needs.roles == ("heads",)


@pytest.mark.parametrize("inner", [DMD(steps=2, critic_turns=1), Consistency(steps=2)])
@pytest.mark.parametrize("heads", ["dmd2", "ladd"])
def test_what_it_wraps_is_left_as_it_is(inner, heads):
    """The inner objective's terms are those that it has alone, to the bit, in every turn of its own."""
    objective = Adversarial(inner=inner, heads=heads, weight=0.7)
    world = ring(objective)
    play(objective, world, 2, 32, 1e-3)
    batch = world.batch(16)
    own = {turn.player: turn for turn in inner.round(0)}
    for turn in objective.round(0):
        if turn.player in own:
            wrapped = turn.loss(world.nets, batch, stream(3, 0, 0, 0))
            alone = own[turn.player].loss(world.nets, batch, stream(3, 0, 0, 0))
            assert all(torch.equal(wrapped.terms[name], alone.terms[name]) for name in alone.terms)
            assert set(wrapped.terms) - set(alone.terms) == ({"adversary"} if turn.player == "student" else {"judge"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"inner": DMD(), "low": 0.4}, "low would change nothing: the critic's times are the heads' where they share its pass"),
        ({"inner": DMD(), "shift": 3.0}, "shift would change nothing"),
        ({"inner": DMD(), "heads": "ladd", "shared": False}, "shared would change nothing: ladd heads take passes of their own"),
        ({"inner": DMD(), "heads": "pixel", "high": 0.5}, "high would change nothing: pixels are judged without noise"),
        ({"inner": DMD(), "features": "zoo:other"}, "features would change nothing: dmd2 heads listen to a denoiser"),
        ({"inner": VSD(), "shared": False}, "shared would change nothing: inner's critic is guided"),
        ({"inner": SiD(kappa1=1.5), "shared": False}, "shared would change nothing: inner's critic is guided"),
        ({"inner": FDistill()}, "inner: it trains heads of its own, whose weight is among its settings; leave adversarial away"),
        ({"inner": AdversarialDistance()}, "inner: it trains heads of its own"),
        ({"inner": Adversarial()}, "inner: it trains heads of its own"),
        ({"inner": UniInstruct(divergence="kl"), "loss": "least_squares"}, "loss: inner reads its heads' logit as a log ratio"),
    ],
)
def test_a_setting_that_would_do_nothing_or_mislead_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Adversarial(**settings)
    Adversarial(inner=DMD(), low=0.4, shared=False)
    Adversarial(inner=DMD(), low=0.4, paired=True)
    Adversarial(inner=VSD(), low=0.4)
    Adversarial(inner=SiD(kappa1=1.5), low=0.4)


@pytest.mark.parametrize("loss", CONTESTS)
def test_the_students_term_is_the_contests_loss_of_its_noised_sample(loss):
    """... whose gradient reaches the sample through the noising: alpha d loss / d logit for a logit that is a sum."""
    judge, x = asked(), torch.randn(64, 1, dtype=torch.float64, requires_grad=True)
    inner = Turn("student", lambda nets, batch, rng: Losses({}, sample=x))
    batch = Batch(NOTHING, (64, 1), torch.randn(64, 1, dtype=torch.float64))
    objective = Adversarial(heads="ladd", loss=loss, weight=0.5)
    losses = objective.student_loss(inner, nets(judge), batch, stream(0, 0, 0, 0))
    ((shown, t),) = judge.shown
    parts = [part.detach().requires_grad_() for part in shown.sum(1, keepdim=True).chunk(2 if loss == "relativistic" else 1)]
    expected = 0.5 * CONTESTS[loss].student(parts[0], parts[-1]).mean(1)
    torch.testing.assert_close(losses.terms["adversary"], expected)
    (slope,) = torch.autograd.grad(expected.sum(), parts[-1])
    torch.testing.assert_close(torch.autograd.grad(losses.total * 64, x)[0], 0.8 * slope)
    assert len(shown) == 64 * len(parts) and float(t.min()) >= 0.001


def views(**options):
    judge = asked()
    batch = Batch(NOTHING, (512, 1), torch.zeros(512, 1, dtype=torch.float64))
    objective = Adversarial(heads="ladd", **options)
    sample = torch.zeros(512, 1, dtype=torch.float64)
    losses = objective.heads_loss(None, sample, nets(judge), batch, stream(0, 0, 0, 0))
    ((x_t, t),) = judge.shown
    return losses, x_t.chunk(len(x_t) // 512), t.chunk(len(t) // 512)


def test_real_and_fake_have_times_and_noises_of_their_own_unless_paired():
    _, (real, fake), (t_real, t_fake) = views()
    assert not torch.equal(t_real, t_fake) and abs(float(torch.corrcoef(torch.cat([real, fake], 1).T)[0, 1])) < 0.15
    _, (real, fake), (t_real, t_fake) = views(paired=True)
    assert torch.equal(t_real, t_fake) and torch.equal(real, fake)


def test_times_are_those_that_were_asked_for():
    _, _, (t, _) = views(low=0.2, high=0.6, shift=3.0)
    assert float(t.min()) >= 0.2 and float(t.max()) <= 0.6 and float(t.mean()) > 0.43


@pytest.mark.parametrize("side", ["r1", "r2"])
def test_the_slope_is_measured_at_the_very_input_that_is_judged(side):
    """The trap: a clean or a freshly noised real in the place of the jittered one. Same noise, same time, a step of 0.01."""
    losses, shown, at = views(**{side: 2.0})
    judged = {"r1": 0, "r2": 1}[side]
    assert len(shown) == 3 and torch.equal(at[2], at[judged])
    step = (shown[2] - shown[judged]) / 0.01
    assert 0.9 < float(step.std()) < 1.1 and abs(float(step.mean())) < 0.15
    torch.testing.assert_close(losses.terms[side], 1e-2 * 2.0 * step.square()[:, 0])
    assert set(losses.terms) == {"judge", side}


def test_exact_and_approximate_penalties_cost_one_pass_and_agree():
    curved = asked(lambda x: torch.tanh(2 * x).sum(1, keepdim=True))
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    view = View(x, times(0.5).expand(4001))
    found = {
        jitter: contest(nets(curved), NOTHING, view, view, RULES, stream(0, 0, 0, 0), r1=1.0, r2=3.0, jitter=jitter)
        for jitter in (0.0, 1e-3)
    }
    assert len(curved.shown) == 2
    exact = (2 / torch.cosh(2 * x) ** 2).square()[:, 0]
    torch.testing.assert_close(found[0.0].terms["r1"], exact)
    torch.testing.assert_close(found[0.0].terms["r2"], 3 * exact)
    for name, weight in (("r1", 1), ("r2", 3)):
        assert float(found[1e-3].terms[name].mean()) == pytest.approx(weight * float(exact.mean()), rel=0.06)


def test_an_exact_penalty_is_not_taken_of_logits_that_have_no_way_back():
    """A shared fake was judged before anyone asked for its slope: it is judged again."""
    judge = asked(lambda x: 2 * x)
    fake = View(torch.randn(8, 1).double(), times(0.5).expand(8), torch.zeros(8, 1).double())
    real = View(torch.randn(8, 1).double(), times(0.5).expand(8))
    losses = contest(nets(judge), NOTHING, real, fake, RULES, stream(0, 0, 0, 0), r1=0.0, r2=1.0, jitter=0.0)
    torch.testing.assert_close(losses.terms["r2"], torch.full((8,), 4.0).double())
    assert len(judge.shown[0][0]) == 16


def test_heads_report_how_they_do():
    losses, *_ = views()
    assert {"gap", "gap_std", "accuracy", "clipped"} <= set(losses.stats)
    assert abs(float(losses.stats["gap"])) < 0.1 and abs(float(losses.stats["accuracy"]) - 0.5) < 0.1


def test_heads_come_to_tell_apart_what_differs():
    """Taught by turns alone, heads on the frozen teacher end near the logit that is best, log p_real - log p_student."""
    objective = Adversarial(inner=Consistency(steps=1), heads="ladd", judge_weight=1.0, low=0.1, high=0.12)
    torch.manual_seed(0)
    world = ring(objective)
    turn = next(turn for turn in objective.round(0) if turn.player == "heads")
    batch, rng = world.batch(256), stream(0, 0, 0, 0)
    shifted = batch.latents + torch.tensor([1.5, 0.0])
    optimizer = torch.optim.Adam(world.players["heads"].parameters(), 3e-3)
    for i in range(60):
        losses = objective.heads_loss(turn, shifted, world.nets, batch, rng.child(str(i)))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(losses.stats["gap"]) > 1 and float(losses.stats["accuracy"]) > 0.75
    assert float(losses.terms["judge"].detach().mean()) < 0.8 * 2 * math.log(2)


@pytest.mark.parametrize("data", [{"images": "zoo:sprites"}, {"prompts": "zoo:sprites", "pairs": 64}])
def test_the_real_are_images_or_the_teachers_own_samples(data):
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "objective": {"name": "adversarial"}, "data": data}
    assert parse(tree).objective.needs.images
    with pytest.raises(ValueError, match="objective adversarial needs images"):
        parse({**tree, "data": {"prompts": "zoo:sprites"}})


def test_pixels_are_judged_without_noise():
    judge, x = asked(), torch.randn(8, 1, dtype=torch.float64)
    batch = Batch(NOTHING, (8, 1), torch.randn(8, 1, dtype=torch.float64))
    Adversarial(heads="pixel").heads_loss(None, x, nets(judge), batch, stream(0, 0, 0, 0))
    ((shown, t),) = judge.shown
    assert torch.equal(shown, torch.cat([batch.latents, x])) and not t.any()


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (UniInstruct(divergence="kl"), {"heads": "ladd"}),
        (UniInstruct(divergence="kl"), {"taps": ("down_blocks.0",)}),
    ],
)
def test_what_the_inner_objective_decides_is_refused_and_not_ignored(inner, options):
    Adversarial(inner=inner)
    with pytest.raises(
        ValueError, match="inner: it says itself which heads it needs; leave heads, taps and features of adversarial away"
    ):
        Adversarial(inner=inner, **options)


def test_heads_that_the_inner_objective_reads_may_be_held_flat():
    assert Adversarial(inner=UniInstruct(divergence="kl"), r1=0.1).r1 == 0.1
