"""The ratio is the discriminator's own logit, and what it weighs is dmd's direction."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from toys import (
    NOTHING,
    SCHEDULES,
    Gaussian,
    Linear,
    OneLevel,
    Quadrature,
    denoiser,
    expected_gradient,
    game,
    gaussian,
    play,
    ring,
    side_by_side,
    times,
)

from fewstep.denoiser import Denoiser
from fewstep.divergences import DIVERGENCES
from fewstep.objectives import Batch
from fewstep.objectives.dmd import DMD
from fewstep.objectives.f_distill import FDistill
from fewstep.schedules import like
from fewstep.stream import stream

every = pytest.mark.parametrize("divergence", DIVERGENCES)
TARGETS = ["epsilon", "v_prediction", "flow"]
MU, S, M, R = 0.3, 1.0, 0.1, 0.9  # close enough that no ratio reaches its bounds where there are samples

# (alpha, sigma, student's mean and std), d/dmean and d/dstd of distribution_matching.md O5
ROWS = {
    "vp": ((0.8, 0.6, -0.2, 0.7), (-0.267221, -0.270141)),
    "flow": ((0.4, 0.6, -0.2, 1.3), (-0.285533, 0.082906)),
}


@dataclass(frozen=True)
class Knowing:
    """Heads at their optimum: log N(x_t; teacher) - log N(x_t; student), said by two heads that are wrong by as much each way."""

    schedule: object
    student: tuple[float, float] = (M, R)
    critic: Denoiser | None = None
    apart: float = 0.3

    def logits(self, x_t, t, cond):
        def log_density(mean, std):
            a, sig = (like(c, x_t) for c in self.schedule.alpha_sigma(t))
            var = a**2 * std**2 + sig**2
            return -((x_t - a * mean) ** 2) / (2 * var) - var.log() / 2

        exact = log_density(MU, S) - log_density(*self.student)
        return torch.cat([exact - self.apart, exact + self.apart], 1)

    def both(self, x_t, t, cond, graph=True):
        with torch.set_grad_enabled(graph):
            prediction = self.critic(x_t, t, cond)
        return prediction, self.logits(x_t, t, cond)


def nets_of(level, target, m=M, r=R):
    players = denoiser(Linear(m, r), level, target), *(gaussian([x], [y**2], level, target) for x, y in ((MU, S), (m, r)))
    return replace(game(*players), judge=Knowing(level, (m, r), players[-1]))


def ratios(nets, a, sig, m, r, rng):
    """exp(mean logit) at the nodes (B,)."""
    x_t = a * (m + r * rng.nodes[:, :1]) + sig * rng.nodes[:, 1:]
    return nets.judge.logits(x_t, times(*[1.0] * len(rng)), NOTHING).mean(1).exp()


def forward_kl(a, sig, m, r):
    """O5: E_student[r (critic - teacher)] is E_teacher[critic - teacher], in which both are lines."""
    v_s, v_r = a**2 * S**2 + sig**2, a**2 * r**2 + sig**2
    k_s, k_r = a * S**2 / v_s, a * r**2 / v_r
    return (m - MU) * sig**2 / v_r, a * r / v_r * ((k_r - k_s) * v_s - a * (m - MU) ** 2 * sig**2 / v_r)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("target", TARGETS)
def test_under_the_exact_ratio_kl_has_the_closed_gradient(row, target, monkeypatch):
    """O5, without bounds; weights average 1 over nodes, ratios over the student's law."""
    monkeypatch.setattr("fewstep.objectives.f_distill.relative", lambda logit, *_: logit.detach())
    values, anchor = ROWS[row]
    nets, rng = nets_of(OneLevel(*values[:2]), target, *values[2:]), Quadrature(2, num_nodes=40)
    ratio = ratios(nets, *values, rng)
    assert rng.mean(ratio).item() == pytest.approx(1, abs=1e-9)
    found = [1e6 * ratio.mean().item() * g for g in expected_gradient(FDistill(divergence="kl", floor=1e6), nets, rng)]
    assert found == pytest.approx(forward_kl(*values), rel=1e-7)
    assert found == pytest.approx(anchor, abs=1e-6)


@pytest.mark.parametrize("a, sig", [(0.8, 0.6), (0.4, 0.6)])
@pytest.mark.parametrize("target", TARGETS)
def test_kl_covers_what_the_student_misses(target, a, sig):
    """O5: forward KL under the exact ratio, whose average over the nodes is what the normalisation divides by."""
    level, rng = OneLevel(a, sig), Quadrature(2, num_nodes=24)
    objective, nets = FDistill(divergence="kl", floor=1e6), nets_of(level, target)
    average = ratios(nets, a, sig, M, R, rng).clamp(0.1, 20).mean()
    found = [1e6 * average.item() * g for g in expected_gradient(objective, nets, rng)]
    assert found == pytest.approx(forward_kl(a, sig, M, R), rel=1e-5)


@every
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_at_rest_where_the_student_is_the_teacher(divergence, target):
    """T3, for every divergence."""
    level = OneLevel(0.8, 0.6)
    objective = FDistill(divergence=divergence)
    assert expected_gradient(objective, nets_of(level, target, MU, S), Quadrature(2)) == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_reverse_kl_is_dmd(target):
    """T19, to the last bit, whatever the heads say."""
    level = OneLevel(0.8, 0.6)
    own = expected_gradient(FDistill(divergence="rkl"), nets_of(level, target), Quadrature(2))
    assert own == expected_gradient(DMD(), nets_of(level, target), Quadrature(2))


@pytest.mark.parametrize("heads", ["dmd2", "ladd", "projected"])
def test_the_score_is_the_critics_wherever_the_heads_listen(heads):
    """Reverse KL is `dmd` for heads on the frozen teacher, too, which tell the ratio and nothing of what the student draws."""
    objective = FDistill(divergence="rkl", steps=1, heads=heads)
    world = ring(objective)
    play(objective, world, 3, 32, 1e-3)  # away from the start, where critic and teacher are one
    batch, own, other = world.batch(16), FDistill.student_loss, DMD.student_loss
    mine = own(objective, world.nets, batch, stream(1, 0, 0, 0)).terms["dm"]
    assert torch.equal(mine, other(DMD(steps=1), world.nets, batch, stream(1, 0, 0, 0)).terms["dm"])
    assert mine.abs().max() > 0


@every
def test_the_weight_is_made_of_the_logit_and_of_no_loss(divergence):
    """A reference code forms r as -L / (1 - L) of the loss's value L; here samples weigh by h of exp(mean logit)."""
    logits, t = torch.tensor([[1.0, 3.0], [-1.0, -1.0], [0.5, -0.5]], dtype=torch.float64), times(0.3, 0.3, 0.3)
    r = [math.exp(2.0), math.exp(-1.0), 1.0]
    r = torch.tensor([x / (sum(r) / 3) for x in r], dtype=torch.float64)
    h = DIVERGENCES[divergence].weight(r.log())
    torch.testing.assert_close(FDistill(divergence=divergence, bins=1).weights(logits, t, Tensor.detach), h / h.mean())


def test_the_averages_are_those_of_all_processes():
    """T19: two processes with half a batch each weigh their samples as one with all of it; the mean over both is 1."""
    objective = FDistill(divergence="kl", bins=3)
    logits, t = 3 * stream(0, 0, 0, 0).normal((64, 2), torch.float64), stream(0, 0, 0, 1).uniform(64)
    whole = objective.weights(logits, t, Tensor.detach)
    halves = [slice(32), slice(32, None)]
    parts = side_by_side(lambda rank, everywhere: objective.weights(logits[halves[rank]], t[halves[rank]], everywhere))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert whole.mean().item() == pytest.approx(1)


def test_each_range_of_time_has_an_average_of_its_own():
    """Heads that are sure at clean times and not at noisy ones do not make the clean ones heavier."""
    t = times(0.03, 0.2, 0.8, 0.97)
    logits = torch.tensor([[2.0], [1.0], [0.1], [-0.1]], dtype=torch.float64)
    clean, noisy = FDistill(divergence="kl", bins=2).weights(logits, t, Tensor.detach).split(2)
    assert clean.mean().item() == pytest.approx(1) and noisy.mean().item() == pytest.approx(1)
    assert FDistill(divergence="kl", bins=1).weights(logits, t, Tensor.detach)[:2].mean() > 1.3
    assert FDistill(divergence="kl", bins=2).weights(logits, times(0.02, 0.98, 0.02, 0.98), Tensor.detach).shape == (
        4,
    )  # the ends belong


@every
def test_weights_are_positive_average_one_and_have_no_graph(divergence):
    logits = (5 * stream(0, 0, 0, 0).normal((256, 3))).requires_grad_()
    h = FDistill(divergence=divergence).weights(logits, stream(0, 0, 0, 1).uniform(256), Tensor.detach)
    assert h.min() > 0 and h.mean().item() == pytest.approx(1, abs=1e-5) and not h.requires_grad


def test_the_student_feels_the_heads_and_the_heads_not_the_student():
    """The GAN term's graph runs through x_t; the direction's does not, so that ratios are weights and nothing else."""
    nets = nets_of(OneLevel(0.8, 0.6), "flow")
    rng = Quadrature(2)
    losses = FDistill(weight=0.5).student_loss(nets, Batch(NOTHING, (len(rng), 1)), rng)
    x_t = (0.8 * losses.sample + 0.6 * rng.nodes[:, 1:]).detach().requires_grad_()
    logits = nets.judge.logits(x_t, times(*[0.5] * len(rng)), NOTHING)
    torch.testing.assert_close(losses.terms["adversary"], 0.5 * torch.nn.functional.softplus(-logits).mean(1))
    (through,) = torch.autograd.grad(losses.terms["adversary"].sum(), losses.sample, retain_graph=True)
    (at,) = torch.autograd.grad(0.5 * torch.nn.functional.softplus(-logits).mean(1).sum(), x_t)
    torch.testing.assert_close(through, 0.8 * at)
    (direction,) = torch.autograd.grad(losses.terms["dm"].sum(), losses.sample)
    rng = Quadrature(2)
    plain = DMD().student_loss(nets, Batch(NOTHING, (len(rng), 1)), rng)
    (unweighted,) = torch.autograd.grad(plain.terms["dm"].sum(), plain.sample)
    h = FDistill().weights(logits, times(*[0.5] * len(rng)), Tensor.detach)
    torch.testing.assert_close(direction, h[:, None] * unweighted)


def test_the_heads_learn_from_real_data_and_the_students_at_all_times():
    objective = FDistill(judge_weight=0.25)
    world = ring(objective)
    seen = []

    class Recording:
        def logits(self, x_t, t, cond):
            seen.append((x_t, t))
            return world.nets.judge.logits(x_t, t, cond)

    losses = objective.critic_loss(replace(world.nets, judge=Recording()), world.batch(512), stream(0, 0, 0, 0))
    ((x_t, t),) = seen  # one pass
    assert len(x_t) == 1024 and t.min() < 0.05 and t.max() > 0.95
    assert x_t[:512].std() != x_t[512:].std()
    assert losses.terms["judge"].mean().item() == pytest.approx(0.25 * 2 * math.log(2), rel=0.2)  # undecided at the start
    assert losses.terms.keys() == {"denoise", "judge"} and "gap" in losses.stats


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_the_ratio_averages_one_over_the_students_samples(name, target):
    """E_student[r] = 1 at the heads' optimum, at every level: what the normalisation makes of a batch is true of the law."""
    schedule, n = SCHEDULES[name], 4000
    student = denoiser(Gaussian([M], [R**2]), schedule, target)
    judge, rng = Knowing(schedule), stream(0, 0, 0, 0)
    x = M + R * rng.normal((n, 1), torch.float64)
    for level in (0.1, 0.5, 0.9):
        t = times(*[level] * n)
        x_t = student.schedule.add_noise(x, rng.normal((n, 1), torch.float64), t)
        assert judge.logits(x_t, t, NOTHING).mean(1).exp().mean().item() == pytest.approx(1, abs=0.03)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="there is no divergence 'kll'; there are: rkl, kl, "):
        FDistill(divergence="kll")
    with pytest.raises(ValueError, match="bins is a number of ranges of time, at least 1"):
        FDistill(bins=0)
