"""A contest between where the student lands and where it should: who is shown what, and what is learned from it."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from products import MEAN, VAR, N, Optimum, batch, exact
from tiny import tiny_sd_pipeline
from toys import EPS_V_FLOW, SCHEDULES, Gaussian, denoiser, game, gaussian

from fewstep.adapters import teacher_of
from fewstep.config import parse
from fewstep.losses import CONTESTS, flat_mean
from fewstep.objectives import Batch
from fewstep.objectives.adversarial_distance import AdversarialDistance
from fewstep.objectives.consistency import Consistency
from fewstep.objectives.dmd import DMD
from fewstep.objectives.progressive import Progressive
from fewstep.objectives.tcd import TCD
from fewstep.sampling import ddim, uniform_grid
from fewstep.schedules import like
from fewstep.stream import stream
from fewstep.study import study_of

INNER = [Progressive(steps=4), Consistency(steps=4, solver_steps=20), TCD(steps=4, solver_steps=20)]


@dataclass
class Judge:
    """A judge with a known logit that keeps what it was shown."""

    points: list = field(default_factory=list)
    origins: list = field(default_factory=list)

    def beside(self, points, origin, cond):
        self.points.append(points)
        self.origins.append(origin)
        return [self.logit(x, origin) for x, _ in points]

    def logit(self, x, origin):
        """The inner product of both points, or the sum of the one."""
        return (x if origin is None else x * origin[0]).sum(1, keepdim=True)


@dataclass
class Learned(Judge):
    """A judge of one point whose logit is linear in the point and in its squares."""

    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64, requires_grad=True))

    def logit(self, x, origin):
        return torch.cat([x, x.square()], 1).double() @ self.weights[:, None]


def shown(objective, student, teacher, turn, judge=None, seed=0):
    """(what a turn loses, the judge with what it saw)."""
    torch.manual_seed(seed)
    judge = judge or Judge()
    nets = replace(game(student, teacher, grid=uniform_grid(objective.steps)), judge=judge)
    return objective.round(0)[turn].loss(nets, batch(), stream(seed, 0, 0, 0)), judge, nets


def other(name, target):
    """A student that is not at its optimum."""
    return gaussian([0.1, 0.3], [0.5, 0.6], SCHEDULES[name], target)


@pytest.mark.parametrize("inner", INNER, ids=lambda i: type(i).__name__)
@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_landings_are_judged_where_they_are_and_clean_ones_under_noise(name, target, inner):
    schedule = SCHEDULES[name]
    objective = AdversarialDistance(inner=inner, low=0.02, high=0.6)
    losses, judge, nets = shown(objective, other(name, target), exact(name, target), 0)
    ((real, t), (fake, same)) = judge.points[0]
    x_t, start = judge.origins[0]
    landing = losses.landing
    assert torch.equal(t, same) and torch.equal(x_t, landing.x_t) and torch.equal(start, landing.t) and (start > landing.s).all()
    jumped = ddim(schedule, nets.student(x_t, start, batch().cond), landing.s, stream(0, 0, 0, 0))
    torch.testing.assert_close(landing.x_s, jumped, rtol=1e-5, atol=1e-5)
    clean = landing.s == 0
    assert 0 < clean.sum() < N and (landing.s[~clean] >= 0.02).all()
    assert torch.equal(t[~clean], landing.s[~clean]) and (t[clean] >= 0.02).all() and (t[clean] <= 0.6).all()
    for seen, landed in ((real, landing.target), (fake, landing.x_s)):
        assert torch.equal(seen[~clean], landed[~clean])
        alpha, sigma = (like(c, landed) for c in schedule.alpha_sigma(t))
        noise = ((seen - alpha * landed) / sigma)[clean].detach()
        assert abs(noise.mean()) < 0.3 and 0.7 < noise.std() < 1.3
    left = ((real - fake) / like(schedule.alpha_sigma(t)[0], real) - (landing.target - landing.x_s))[clean]
    assert left.abs().min() > 1e-6  # real and fake have noise of their own


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_heads_cannot_tell_a_student_that_lands_where_its_teacher_does(name, target):
    """consistency.md 10.3: with student = teacher D is at a half; here what is shown is the very same."""
    inner = Progressive(steps=4)
    optimum = Optimum(Consistency(steps=4, solver_steps=8), SCHEDULES[name], uniform_grid(4))
    losses, judge, _ = shown(AdversarialDistance(inner=inner), denoiser(optimum, SCHEDULES[name], target), exact(name, target), 0)
    (real, _), (fake, _) = judge.points[0]
    noisy = losses.landing.s > 0
    torch.testing.assert_close(real[noisy], fake[noisy], rtol=1e-5, atol=1e-5)
    losses, judge, _ = shown(AdversarialDistance(inner=inner), other(name, target), exact(name, target), 0)
    assert (judge.points[0][0][0] - judge.points[0][1][0])[noisy].abs().mean() > 1e-2


@pytest.mark.parametrize("rules", CONTESTS)
def test_both_sides_lose_what_the_rules_say_and_the_distance_is_weighed(rules):
    inner = Progressive(steps=4)
    plain, _, _ = shown(AdversarialDistance(inner=inner), other("flow", "flow"), exact("flow", "flow"), -1)
    for distance in (0.0, 0.3):
        objective = AdversarialDistance(inner=inner, distance=distance, weight=0.7, loss=rules, judge_turns=2)
        losses, judge, nets = shown(objective, other("flow", "flow"), exact("flow", "flow"), -1)
        seen = [judge.logit(x, judge.origins[0]) for x, _ in judge.points[0]]
        assert len(seen) == (2 if CONTESTS[rules].pairs else 1)
        torch.testing.assert_close(losses.terms["adversary"], 0.7 * flat_mean(CONTESTS[rules].student(seen[0], seen[-1])))
        assert losses.terms.keys() == ({"adversary", "progressive"} if distance else {"adversary"})
        if distance:
            torch.testing.assert_close(losses.terms["progressive"], distance * plain.terms["progressive"])
        grads = torch.autograd.grad(losses.total, list(nets.student.net.parameters()))
        assert any(g.abs().max() > 0 for g in grads)
    first, second, last = objective.round(0)
    assert first.movers == second.movers == ("critic", "heads") and last.movers == ("student",)
    losses, judge, nets = shown(objective, other("flow", "flow"), exact("flow", "flow"), 0)
    real, fake = (judge.logit(x, judge.origins[0]) for x, _ in judge.points[0])
    torch.testing.assert_close(losses.terms["judge"], flat_mean(CONTESTS[rules].judge(real, fake)))
    assert not losses.terms["judge"].requires_grad  # nobody's here: the judge has no weights, and the student is not asked


def test_only_conditional_heads_are_shown_where_the_jump_began():
    for conditional in (True, False):
        objective = AdversarialDistance(inner=Progressive(steps=4), conditional=conditional)
        for turn in (0, 1):
            _, judge, _ = shown(objective, other("flow", "flow"), exact("flow", "flow"), turn)
            assert (judge.origins[0] is not None) == conditional
        assert objective.needs.heads.kind == ("beside" if conditional else "dmd2")
        assert objective.needs.roles == ("critic", "heads") and objective.needs.images


def mirror(name, target, mean=(0.0, 0.0), away=0.0):
    """(a teacher of a law that is its own mirror image, a student that lands at 2 mean - x where the teacher's four steps land at
    x; `away` from there)."""
    schedule = SCHEDULES[name]
    optimum = Optimum(Consistency(steps=1, solver_steps=4), schedule, (1.0,))
    student = Gaussian([m + away for m in mean], [1.0, 1.0], lambda a, s, v: -optimum.factors[-1])
    return gaussian(mean, VAR.tolist(), schedule, target), denoiser(student, schedule, target)


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_where_the_laws_are_one_the_contest_is_at_rest(name, target):
    """SDXL-Lightning's equilibrium (consistency.md 10.3): at zero logits heads lose 2 log 2, have no gradient but chance, and
    give the student none; where the laws differ the heads have one."""
    objective = AdversarialDistance(inner=Progressive(steps=1, factor=4), conditional=False, distance=0.0, low=0.05, high=0.1)
    for away, rests in ((0.0, True), (0.5, False)):
        teacher, student = mirror(name, target, MEAN.tolist(), away)  # the law of the batch
        grads = []
        for seed in range(24):
            losses, judge, _ = shown(objective, student, teacher, 0, Learned(), seed)
            torch.testing.assert_close(losses.terms["judge"], torch.full((N,), 2 * math.log(2), dtype=torch.float64))
            grads += torch.autograd.grad(losses.total, judge.weights)
        found = torch.stack(grads)
        far = (found.mean(0).abs() / (found.std(0) / len(found) ** 0.5)).max()
        assert far < 5 if rests else far > 20
    losses, _, nets = shown(objective, student, teacher, -1, Learned())
    torch.testing.assert_close(losses.terms["adversary"], torch.full((N,), 0.1 * math.log(2), dtype=torch.float64))
    (grad,) = torch.autograd.grad(losses.total, [nets.student.net.clean.mean])
    assert (grad == 0).all()


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_the_right_law_on_wrong_trajectories_is_found_out_by_conditional_heads_alone(name, target):
    """A student that lands at -x where its teacher, of a law that is its own mirror image, lands at x."""
    inner, (teacher, mirrored) = Progressive(steps=1, factor=4), mirror(name, target)
    found = {}
    for conditional in (True, False):
        objective = AdversarialDistance(inner=inner, conditional=conditional, low=0.05, high=0.1)
        losses, judge, _ = shown(objective, mirrored, teacher, 0)
        found[conditional] = float(losses.stats["accuracy"])
        (real, _), (fake, _) = judge.points[0]
    assert found[True] > 0.9 and abs(found[False] - 0.5) < 0.1
    torch.testing.assert_close(real.var(0), fake.var(0), rtol=0.1, atol=0.02)


# PCM's adversary


def pcm(**options):
    """PCM as its paper has it (consistency.md 3.3), its heads on the frozen teacher."""
    inner = Consistency(steps=4, solver_steps=20, sampler="ddim")
    plain = {"conditional": False, "heads": "ladd", "loss": "hinge_both", "push": 0.25, "low": 0.001}
    return AdversarialDistance(inner=inner, **{**plain, **options})


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_a_push_is_the_exact_kernel_with_noise_of_its_own(name, target):
    """consistency.md 0.3: real and fake go to one time in [s, s + push), each by a noise that knows nothing of the other's."""
    losses, judge, _ = shown(pcm(), other(name, target), exact(name, target), 0)
    ((real, t), (fake, same)), landing = judge.points[0], losses.landing
    s = landing.s
    assert torch.equal(t, same) and (t >= s.clamp(min=0.001)).all() and (t < s + 0.25).all()
    assert float((t - s).mean()) == pytest.approx(0.125, abs=0.015) and float((t - s).std()) == pytest.approx(0.072, abs=0.01)
    scale = SCHEDULES[name].alpha_sigma(t)[0] / SCHEDULES[name].alpha_sigma(s)[0]
    var = (t - s) * (t + s - 2 * t * s) / (1 - s) ** 2 if name == "flow" else 1 - scale**2
    noises = []
    for seen, landed in ((real, landing.target), (fake, landing.x_s)):
        noises.append((seen - like(scale, landed) * landed) / like(var.sqrt(), landed))
        assert noises[-1].mean().abs() < 0.15 and noises[-1].std() == pytest.approx(1, abs=0.1)
    assert (noises[0] * noises[1]).mean().abs() < 0.15


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_pushed_players_that_are_equal_are_at_rest_in_the_mean(name, target):
    """Undecided heads have nothing to learn from a student that lands where it should, though noises differ; of another they
    have."""

    def pull(student):
        """How far from zero the heads' gradient over sixteen batches is, in its own standard errors."""
        judge = Judge()
        weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        judge.logit = lambda x, origin: (x @ weights)[:, None]
        nets = replace(game(student, exact(name, target), grid=uniform_grid(4)), judge=judge)
        for seed in range(16):
            (pcm().judge_loss(pcm().inner.round(0)[0], nets, batch(), stream(seed, 0, 0, 0)).total / 16).backward()
        apart = torch.cat([fake - real for (real, _), (fake, _) in judge.points])
        torch.testing.assert_close(weights.grad, apart.mean(0), rtol=1e-5, atol=1e-6)
        return (weights.grad / (apart.std(0) / len(apart) ** 0.5)).abs().max()

    inner = pcm().inner
    optimum = denoiser(Optimum(inner, SCHEDULES[name], uniform_grid(4)), SCHEDULES[name], target)
    wrong = denoiser(Gaussian([4.0, 4.0], [0.5, 0.6]), SCHEDULES[name], target)
    assert pull(optimum) < 3 and pull(wrong) > 10


def test_heads_on_the_teacher_learn_and_leave_it_as_it_is():
    plain = {"name": "adversarial_distance", "inner": {"name": "consistency", "steps": 4, "sampler": "ddim", "solver_steps": 4}}
    contest = {"conditional": False, "heads": "ladd", "loss": "hinge_both", "push": 0.25}
    tree = {"teacher": {"path": "tiny"}, "student": {"rank": 2}, "data": {"images": "zoo:sprites"}, "objective": plain | contest}
    study = study_of(parse(tree), teacher_of("tiny", tiny_sd_pipeline()))
    assert study.roles.keys() == {"teacher", "student", "heads"}
    for p in study.roles["student"].parameters():  # away from the identity that adapters start as
        p.data += 0.1 * torch.randn_like(p)
    nets, cond = study.nets(study.roles), study.teacher.encode(["a", "b"])
    shape = (2, *study.teacher.latent_shape)
    given = Batch(cond, shape, torch.randn(shape))
    before = {k: v.clone() for k, v in study.teacher.net.state_dict().items() if ".lora_" not in k}
    judge, last = study.config.objective.round(0)
    assert judge.movers == ("heads",) and last.movers == ("student",)
    for turn in (judge, last):
        for name in ("student", "heads"):
            study.roles[name].requires_grad_(name in turn.movers)
        turn.loss(nets, given, stream(0, 0, 0, 0)).total.backward()
        for name in ("student", "heads"):
            grads = [p.grad for p in study.roles[name].parameters()]
            assert (name in turn.movers) == any(g is not None and g.abs().max() > 0 for g in grads)
            study.roles[name].zero_grad(set_to_none=True)
    assert all(p.grad is None for p in study.teacher.net.parameters())
    after = study.teacher.net.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    point = torch.randn(shape), torch.tensor([0.3, 0.6], dtype=torch.float64)
    logits = nets.judge.logits(*point, cond)
    for p in study.roles["student"].parameters():
        p.data += 0.1
    assert torch.equal(nets.judge.logits(*point, cond), logits)  # of the teacher's features, whatever the student is


def test_what_no_heads_can_see_is_refused():
    with pytest.raises(ValueError, match="heads: ladd see the landing alone, not where the jump began; set conditional: false"):
        AdversarialDistance(heads="ladd")
    for push in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="push is a width in time, from 0 .* to 1, not"):
            pcm(push=push)


@pytest.mark.parametrize("inner", [DMD(steps=1), AdversarialDistance()], ids=["dmd", "itself"])
def test_what_does_not_land_is_refused(inner):
    with pytest.raises(ValueError, match="inner: .* has no landing to judge; wrap progressive, consistency or tcd"):
        AdversarialDistance(inner=inner)


@pytest.mark.parametrize("wrong", [{"judge_turns": 0}, {"weight": 0.0}, {"distance": -1.0}])
def test_weights_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="judge_turns must be at least 1, weight positive, and distance not negative"):
        AdversarialDistance(**wrong)
