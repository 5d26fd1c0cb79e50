"""Guidance and distribution matching apart: what they are together, what each is alone, and the shields against either."""

import math

import pytest
import torch
from toys import (
    NOTHING,
    SCHEDULES,
    Blind,
    Counted,
    Gaussian,
    Linear,
    OneLevel,
    Quadrature,
    denoiser,
    expected_gradient,
    game,
    gaussian,
    law,
    reverse_kl,
    times,
)

from fewstep.denoiser import Guided
from fewstep.losses import moments_kl, normalised
from fewstep.objectives import Batch
from fewstep.objectives.base import simulate_steps
from fewstep.objectives.decoupled import Decoupled, augmentation, matching
from fewstep.stream import stream

FLAT = Decoupled(steps=1, floor=1e6)  # both normalisers at their floor: a constant
TARGETS = ["epsilon", "v_prediction", "flow"]
W, MU, MU_U = 3.0, 0.3, -0.1
VP = OneLevel(0.8, 0.6)


def nets_of(schedule, target, m, r, critic=None, grid=(1.0,)):
    """A linear student N(m, r^2), a teacher N(MU, 1) with a prompt and N(MU_U, 1) without, guided by W."""
    network = denoiser(Gaussian([9.0], [9.0]), schedule, target)  # the conditions say its law
    teacher = Guided(network, W, law(MU_U, 1.0))
    critic = denoiser(Blind(Gaussian(*(critic or ([m], [r**2])))), schedule, target)
    return game(denoiser(Linear(m, r), schedule, target), teacher, critic, grid=grid)


def prompted(rng):
    return Batch(law(MU, 1.0).expand(len(rng)), (len(rng), 1))


def gradient(objective, *args, **options):
    rng = Quadrature(3)  # the student's noise, and one noise for each term
    return [FLAT.floor * g for g in expected_gradient(objective, nets_of(*args, **options), rng, prompted(rng))]


@pytest.mark.parametrize("target", TARGETS)
def test_at_one_level_and_one_noise_the_terms_are_dmds(target):
    """T9: where both are taken at the same x_t and divided by the same number, nothing is left of the split."""
    nets, rng = nets_of(VP, target, -0.2, 0.7), Quadrature(2)
    x = -0.2 + 0.7 * rng.nodes[:, :1]
    x_t, t, batch = 0.8 * x + 0.6 * rng.nodes[:, 1:], torch.ones(len(rng)).double(), prompted(rng)
    both = matching(nets, batch, x, x_t, t, 1e6) + augmentation(nets.teacher, batch, x, x_t, t, 1e6)
    fake, real = nets.critic(x_t, t, batch.cond).x0, nets.teacher(x_t, t, batch.cond).x0
    torch.testing.assert_close(both, (fake - real) / 1e6, rtol=1e-9, atol=1e-15)


def test_each_term_is_divided_by_its_own_distance_to_the_unguided_teacher():
    nets, rng = nets_of(VP, "epsilon", -0.2, 0.7), Quadrature(2)
    x, t, batch = rng.nodes[:, :1], torch.ones(len(rng)).double(), prompted(rng)
    x_t = 0.8 * x + 0.6 * rng.nodes[:, 1:]
    plain = nets.teacher.denoiser
    c, u = plain(x_t, t, batch.cond).x0, plain(x_t, t, law(MU_U, 1.0).expand(len(rng))).x0
    fake = nets.critic(x_t, t, batch.cond).x0
    torch.testing.assert_close(matching(nets, batch, x, x_t, t, 1e-4), normalised(fake - c, x, c, 1e-4))
    found = augmentation(nets.teacher, batch, x, x_t, t, 1e-4)
    torch.testing.assert_close(found, -(W - 1) * (c - u) / (x - c).abs().clamp_min(1e-4))


@pytest.mark.parametrize("target", TARGETS)
def test_the_terms_add_up_to_the_divergence_and_a_drift(target):
    """O3: the augmentation is the same wherever the student is, and leaves its spread alone."""
    for m, r in [(-0.2, 0.7), (2.0, 1.3)]:
        dm, dr = reverse_kl(0.8, 0.6, MU, 1.0, m, r)
        drift = -(W - 1) * (MU - MU_U) * 0.36
        assert gradient(FLAT, VP, target, m, r) == pytest.approx([dm + drift, dr], abs=1e-9)
        alone = Decoupled(steps=1, floor=1e6, matching=0.0)
        assert gradient(alone, VP, target, m, r) == pytest.approx([drift, 0], abs=1e-9)


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_the_fixed_point_weighs_the_guidance_by_the_levels_of_its_own(name, target, monkeypatch):
    """O3 on schedules apart: m* = mu + (w - 1) (mu - mu_u) C / D, each of one level here: the middle of its range."""
    schedule, start = SCHEDULES[name], 0.5

    def told(*given):
        found, prediction = simulate_steps(*given)
        return torch.full_like(found, start), prediction

    monkeypatch.setattr("fewstep.objectives.decoupled.simulate_steps", told)
    share = {}
    for term, t in {"dm": (0.02 + 0.98) / 2, "ca": (0.02 + start) / 2}.items():
        a, sig = (float(c) for c in schedule.alpha_sigma(times(round(t, 3))))
        share[term] = sig**2 / (a**2 + sig**2)
    assert share["dm"] > 1.5 * share["ca"]
    m = MU + (W - 1) * (MU - MU_U) * share["ca"] / share["dm"]
    assert gradient(FLAT, schedule, target, m, 1.0) == pytest.approx([0, 0], abs=1e-6)


def asked(objective, grid, seed):
    """Times that the teacher was asked at, without a prompt or in all."""
    seen = []
    nets = nets_of(SCHEDULES["flow"], "flow", 0.1, 0.5, grid=grid)

    def call(net, x, time, cond):
        seen.append(time)
        return net(x, time, cond)

    network = nets.teacher.denoiser
    object.__setattr__(network, "call", call)
    objective.student_loss(nets, Batch(law(MU, 1.0).expand(64), (64, 1)), Doubled(stream(seed, 0, 0, 0)))
    return seen


class Doubled:
    """A stream of float64 noise."""

    def __init__(self, rng):
        self.shared, self.uniform, self.rng = rng.shared, rng.uniform, rng

    def normal(self, shape):
        return self.rng.normal(shape, torch.float64)

    def normal_like(self, x):
        return self.rng.normal_like(x)


def test_guidance_is_asked_only_at_times_cleaner_than_the_students():
    for seed in range(8):
        matched, guided = asked(Decoupled(steps=2), (1.0, 0.3), seed)
        assert len(matched) == 64 and len(guided) == 128  # no prompt is left out where distributions are matched
        steps = [guided[i::2] for i in range(2)]  # the student's; guided: with a prompt, then without
        early, late = sorted(steps, key=torch.max, reverse=True)
        assert late.max() < 1000 * 0.3 and 700 < early.max() < 1000 * 0.98 and matched.max() > 700
        asked(Decoupled(steps=2), (1.0, 0.01), seed)  # a student at the very end has a range, too


def test_before_pure_noise_guidance_has_the_full_range_whatever_time_the_network_is_told():
    """A conditioning_timestep of 399 says nothing of how clean the student's input is."""
    assert asked(Decoupled(steps=1), (0.4,), 0)[1].max() > 900


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_each_term_has_a_time_and_a_noise_of_its_own(name, target):
    """Section 3: two re-noisings of one sample, which have nothing else in common; the critic is asked where DM is."""
    n, schedule, teacher, critic = 512, SCHEDULES[name], Counted(), Counted()
    nets = nets_of(schedule, target, 0.1, 0.5)
    for network, call in ((nets.teacher.denoiser, teacher), (nets.critic, critic)):
        object.__setattr__(network, "call", call)
    batch = Batch(law(MU, 1.0).expand(n), (n, 1))
    x = Decoupled(steps=1).student_loss(nets, batch, Doubled(stream(0, 0, 0, 0))).sample.detach()
    dm, ca = (schedule.t_of_model_time(time[:n].double()) for time in teacher.times)
    levels = [[c[:, None] for c in schedule.alpha_sigma(t)] for t in (dm, ca)]
    eps = [(x_t[:n] - a * x) / sig for x_t, (a, sig) in zip(teacher.inputs, levels, strict=True)]
    for first, second, spread in ((dm, ca, 0.96 / 12**0.5), (eps[0][:, 0], eps[1][:, 0], 1)):
        assert (first - second).abs().min() > 0
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.15
        assert [v.std().item() for v in (first, second)] == pytest.approx([spread] * 2, rel=0.1)
    assert torch.equal(*teacher.inputs[1].split(n))  # with a prompt and without
    assert torch.equal(critic.inputs[0], teacher.inputs[0]) and torch.equal(critic.times[0], teacher.times[0])


def test_without_guidance_there_is_only_the_matching():
    nets, rng = nets_of(VP, "flow", -0.2, 0.7), Quadrature(2)
    plain = game(nets.student, gaussian([MU], [1.0], VP, "flow"), nets.critic)
    found = [FLAT.floor * g for g in expected_gradient(FLAT, plain, rng, Batch(NOTHING, (len(rng), 1)))]
    assert found == pytest.approx(reverse_kl(0.8, 0.6, MU, 1.0, -0.2, 0.7), abs=1e-9)


def test_the_critic_has_no_say_in_the_augmentation():
    """T9: only the matching changes with the critic."""
    alone = Decoupled(steps=1, floor=1e6, matching=0.0)
    assert gradient(alone, VP, "flow", 0.1, 0.7) == gradient(alone, VP, "flow", 0.1, 0.7, critic=([5.0], [4.0]))
    assert gradient(FLAT, VP, "flow", 0.1, 0.7) != gradient(FLAT, VP, "flow", 0.1, 0.7, critic=([5.0], [4.0]))


def test_the_shield_is_the_divergence_of_two_gaussians():
    x = torch.tensor([[[1.0, 3.0]], [[-1.0, 1.0]]], dtype=torch.float64)  # mean 2, spread 1; mean 0, spread 1
    wanted = [(2 - 0.5) ** 2 / 8, 0.5**2 / 8]
    wanted = [w + 1 / 8 - 1 / 2 + math.log(2) for w in wanted]
    assert moments_kl(x, 0.5, 2.0).tolist() == pytest.approx(wanted)
    exact = torch.tensor([[0.5 - 2, 0.5 + 2]], dtype=torch.float64, requires_grad=True)
    value = moments_kl(exact, 0.5, 2.0)
    value.sum().backward()
    assert value.item() == pytest.approx(0) and exact.grad.abs().max() < 1e-12


def test_the_shield_pulls_on_the_students_sample():
    rng = Quadrature(3)
    losses = Decoupled(steps=1, moments=0.5, mean=0.2, std=2.0).student_loss(nets_of(VP, "flow", 0.1, 0.7), prompted(rng), rng)
    torch.testing.assert_close(losses.terms["moments"], 0.5 * moments_kl(losses.sample, 0.2, 2.0))
    assert "moments" not in Decoupled(steps=1).student_loss(nets_of(VP, "flow", 0.1, 0.7), prompted(rng), Quadrature(3)).terms
    with pytest.raises(ValueError, match="std must be positive, not"):
        Decoupled(std=0.0)
