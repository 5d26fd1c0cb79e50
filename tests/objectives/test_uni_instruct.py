"""Uni-Instruct against the derivative of what it claims to lower (distribution_matching.md, 7.3 and T20)."""

from dataclasses import dataclass

import pytest
import torch
from torch.distributions import Normal
from toys import NOTHING, Quadrature, game, play, players, ring, sliced_w2

from fewstep.config import parse
from fewstep.denoiser import Denoiser
from fewstep.divergences import DIVERGENCES
from fewstep.objectives import Batch, Nets
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.sid import SiD
from fewstep.objectives.uni_instruct import UniInstruct

# alpha, sigma, teacher's mean and std, student's mean and std
A = (0.8, 0.6, 0.3, 1.0, -0.1, 0.7)
VP = (0.8, 0.6, 0.3, 1.0, -0.2, 0.7)
FLOW = (0.4, 0.6, 0.3, 1.0, -0.2, 1.3)

# T20, in score units: d/dmean and d/dstd at A. chi2's phi is twice "neyman"'s.
ANCHORS = {
    "rkl": (-0.512, -1.0787),
    "kl": (-1.1284, -2.5141),
    "neyman": (-0.8217 / 2, -1.6066 / 2),
    "js": (-0.3030, -0.6512),
    "jeffreys": (-1.6404, -3.5928),
}
every = pytest.mark.parametrize("name", DIVERGENCES)


@pytest.fixture
def exact(monkeypatch):
    """Ratios as the judge says them: nodes of a quadrature have weights, which an average over a batch knows nothing of."""
    monkeypatch.setattr("fewstep.objectives.uni_instruct.relative", lambda logit, *_, **__: logit.detach())


@dataclass(frozen=True)
class Knowing:
    """The optimal judge of two Gaussians; `deaf` cuts its logit off from x_t."""

    critic: Denoiser
    real: Normal
    fake: Normal
    deaf: bool = False

    def both(self, x_t, t, cond):
        y = x_t.detach() if self.deaf else x_t
        return self.critic(x_t, t, cond), self.real.log_prob(y) - self.fake.log_prob(y)


def setting(values, target="epsilon", deaf=False) -> Nets:
    a, sig, mu, s, m, r = values
    student, teacher, critic = players(*values, target)
    judge = Knowing(critic, *(Normal(a * v, (a**2 * w**2 + sig**2) ** 0.5) for v, w in ((mu, s), (m, r))), deaf)
    return Nets(student=student, teacher=teacher, grid=(1.0,), step=game(student, teacher).step, critic=critic, judge=judge)


def uni(name, **options):
    """Without a normaliser, and without a cut."""
    return UniInstruct(steps=1, divergence=name, floor=1e6, least=1e-12, most=1e12, **options)


def gradient(objective, nets, nodes=80):
    rng = Quadrature(2, nodes)
    term = objective.student_loss(nets, Batch(NOTHING, (len(rng), 1)), rng).terms["uni"] * 1e6
    clean = nets.student.net.clean
    return [g.item() for g in torch.autograd.grad(rng.mean(term), [clean.mean, clean.std])]


def truth(name, values):
    """d/dmean, d/dstd of E_student[h |difference of x0 predictions|^2], all of whose parts follow the student."""
    a, sig, mu, s, *own = values
    m, r = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in own)
    z, w = Quadrature(1, 180).nodes[:, 0], Quadrature(1, 180).weights
    v_s, v_r = a**2 * s**2 + sig**2, a**2 * r**2 + sig**2
    x_t = a * m + v_r.sqrt() * z
    fake = m + a * r**2 / v_r * (x_t - a * m)
    real = mu + a * s**2 / v_s * (x_t - a * mu)
    log_ratio = Normal(a * mu, v_s**0.5).log_prob(x_t) - Normal(a * m, v_r.sqrt()).log_prob(x_t)
    value = (w * DIVERGENCES[name].weight(log_ratio) * (fake - real) ** 2).sum()
    return [g.item() for g in torch.autograd.grad(value, [m, r])]


@every
@pytest.mark.parametrize("values", [A, FLOW])
def test_the_gradient_is_that_of_the_divergences_loss_to_noise(name, values, exact):
    """T20, for every f."""
    found = gradient(uni(name), setting(values))
    assert found == pytest.approx(truth(name, values), rel=1e-6)
    if values == A and name in ANCHORS:
        assert [g * (0.8 / 0.36) ** 2 for g in found] == pytest.approx(ANCHORS[name], abs=1e-4)


@pytest.mark.parametrize("target", ["v_prediction", "flow", "sample"])
def test_what_the_networks_predict_changes_nothing(target, exact):
    wanted = gradient(uni("js"), setting(A), 20)
    assert gradient(uni("js"), setting(A, target), 20) == pytest.approx(wanted, rel=1e-9)


def test_a_detached_ratio_would_be_biased(exact):
    """The trap of 7.3: half of the kl loss, exact and with the heads cut off."""
    whole, cut = (gradient(uni("kl"), setting(VP, deaf=deaf)) for deaf in (False, True))
    assert [g / 2 for g in whole] == pytest.approx([-0.1428, -0.2887], abs=1e-4)
    assert cut[1] / 2 == pytest.approx(-0.2097, abs=1e-4)


@every
def test_the_gradient_vanishes_where_the_student_is_the_teacher(name, exact):
    """T3."""
    assert gradient(uni(name), setting((0.8, 0.6, 0.3, 1.0, 0.3, 1.0)), 20) == pytest.approx([0, 0], abs=1e-9)


def test_the_reverse_divergence_is_twice_sid_at_one_half_and_asks_no_judge():
    nets = setting(A)
    rng = Quadrature(2)
    batch = Batch(NOTHING, (len(rng), 1))
    sid = SiD(steps=1, alpha=0.5).student_loss(nets, batch, Quadrature(2)).terms["sid"]
    bare = game(nets.student, nets.teacher, nets.critic)
    torch.testing.assert_close(UniInstruct().student_loss(bare, batch, rng).terms["uni"], 2 * sid, rtol=1e-9, atol=1e-12)
    assert UniInstruct().needs.roles == ("critic",)
    assert UniInstruct(divergence="kl").needs.roles == ("critic", "heads")


@dataclass(frozen=True)
class Saying:
    """A judge that says what it is told."""

    critic: Denoiser
    logits: torch.Tensor

    def both(self, x_t, t, cond):
        return self.critic(x_t, t, cond), self.logits


def test_ratios_are_cut_and_average_one():
    """Of a batch whose judge sees ratios 1/100, 1, 3 and 100 in turn: cut to [1/2, 4], over their mean."""
    nets, n = setting(A), 36
    logits = torch.tensor([0.01, 1, 3, 100], dtype=torch.float64).log().repeat(n // 4)[:, None].expand(n, 3)  # three heads agree
    nets = Nets(nets.student, nets.teacher, nets.grid, nets.step, nets.critic, Saying(nets.critic, logits))
    batch = Batch(NOTHING, (n, 1))
    found = uni_cut().student_loss(nets, batch, Quadrature(2)).terms["uni"]
    equal = Nets(nets.student, nets.teacher, nets.grid, nets.step, nets.critic, Saying(nets.critic, 0 * logits))
    plain = uni_cut().student_loss(equal, batch, Quadrature(2)).terms["uni"]
    torch.testing.assert_close(found / plain, torch.tensor([0.5, 1, 3, 4], dtype=torch.float64).repeat(n // 4) / 2.125)


def uni_cut():
    return UniInstruct(divergence="kl", least=0.5, most=4.0)


def test_a_ratio_that_nobody_learns_is_refused_with_the_wrapper_that_would():
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "data": {"images": "zoo:sprites"}}
    with pytest.raises(ValueError, match=r"needs heads that nobody trains.*name: adversarial, inner"):
        parse({**tree, "objective": {"name": "uni_instruct", "divergence": "kl"}})
    parse({**tree, "objective": {"name": "adversarial", "inner": {"name": "uni_instruct", "divergence": "kl"}}})


@pytest.mark.parametrize(
    "options", [{"least": 1.5}, {"most": 0.5}, {"bins": 0}, {"divergence": "kll"}, {"low": 0.9, "high": 0.1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        UniInstruct(**options)


def test_with_learning_heads_it_improves_a_world_of_eight_modes():
    objective = Adversarial(inner=UniInstruct(divergence="jeffreys"), judge_weight=1.0)
    torch.manual_seed(0)
    world = ring(objective)
    goal = world.many_steps()
    before = sliced_w2(world.sampled(), goal)
    play(objective, world, 250, 128, 2e-3)
    assert sliced_w2(world.sampled(), goal) < before / 2
