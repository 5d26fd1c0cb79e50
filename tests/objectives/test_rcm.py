import pytest
import torch
from toys import (
    EPS_V_FLOW,
    NOTHING,
    SCHEDULES,
    TEACHERS,
    Blind,
    Counted,
    Double,
    Gaussian,
    Linear,
    denoiser,
    endpoint,
    game,
    gaussian,
    guided,
    posterior,
)

from fewstep.matched import Matched
from fewstep.objectives import Batch
from fewstep.objectives.rcm import RCM
from fewstep.objectives.scm import ANGLE, SCM, TRIG
from fewstep.stream import stream

MEAN, VAR = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.25, 2.0]).double()
teachers = pytest.mark.parametrize("name, target", TEACHERS)
N = 128
GAINS = (endpoint, posterior)  # of the student, whose x0 is where the flow ends, and of the critic


def exact(name, target, mean=MEAN, var=VAR):
    return gaussian(mean.tolist(), var.tolist(), SCHEDULES[name], target)


def batch(cond=NOTHING):
    return Batch(cond, (N, 2), MEAN + VAR.sqrt() * torch.randn(N, 2, dtype=torch.float64))


def rng(length=0):
    return Double(stream(0, 0, 0, 0), length)


@teachers
def test_without_scores_it_is_scm(name, target):
    student, teacher, given = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), SCHEDULES[name], target), exact(name, target), batch()
    nets = game(student, teacher, teacher)
    alone = SCM(mean=-0.8, std=1.6, weighting="none").student_loss(nets, given, stream(0, 0, 0, 0)).total
    both = RCM(score_weight=0.0).student_loss(nets, given, rng()).total
    parameters = list(student.net.parameters())
    for a, b in zip(*(torch.autograd.grad(v, parameters) for v in (alone, both))):
        torch.testing.assert_close(a, b)


@teachers
def test_where_the_critic_is_the_teacher_scores_do_not_push(name, target):
    student, teacher = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), SCHEDULES[name], target), exact(name, target)
    losses = RCM().score(game(student, teacher, teacher), batch(), rng(2))
    grads = torch.autograd.grad(losses.total, list(student.net.parameters()), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in grads)


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_guidance_moves_both_halves_by_the_distance_of_the_means(name, target):
    """Student and critic of the guided law, and they alone, have no tangent and no difference of scores."""
    teacher, cond, mean = guided(name, target, MEAN, VAR)

    def sizes(centre):
        student, critic = (
            denoiser(Blind(Gaussian(centre.tolist(), VAR.tolist(), gain)), SCHEDULES[name], target) for gain in GAINS
        )
        losses = RCM().student_loss(game(student, teacher, critic), batch(cond.expand(N)), rng())
        return losses.stats["tangent"], losses.stats["direction"]

    assert max(sizes(mean)) < 1e-9 < 0.05 < min(sizes(MEAN))


@pytest.mark.parametrize("name, target", [(name, target) for name, target in TEACHERS if name != "edm"])
def test_scores_push_the_students_law_towards_the_teachers(name, target):
    """One step; the critic knows the student's own law (consistency.md 1, sign check)."""
    student = denoiser(Linear(1.0, 1.0), SCHEDULES[name], target)
    teacher, critic = exact(name, target, torch.zeros(2), torch.ones(2)), exact(name, target, torch.ones(2), torch.ones(2))
    losses = RCM(score_weight=1.0).score(game(student, teacher, critic), batch(), rng())
    mean, std = torch.autograd.grad(losses.total, [student.net.clean.mean, student.net.clean.std])
    assert mean > 0.1 and abs(std) < 0.3 * mean


@teachers
def test_the_critic_learns_the_velocity_of_the_students_samples(name, target):
    """||F - F*||^2 = ||x0 - f||^2 / sin^2, and least at the student's own law."""
    student, critic = denoiser(Linear(0.5, 0.8), SCHEDULES[name], target), exact(name, target)
    asked = []

    def call(net, x, time, cond):
        asked.append((x, time))
        return net(x, time, cond)

    listening = denoiser(critic.net.clean, SCHEDULES[name], target, call)
    losses = RCM(score_mean=0.0, score_std=0.3).critic_loss(game(student, critic, listening), batch(), rng())
    assert losses.sample is not None and not losses.sample.requires_grad
    x_own, time = asked[0]
    own = SCHEDULES[name]
    alpha, sigma = own.alpha_sigma(own.t_of_model_time(time))
    angle = torch.atan2(sigma, alpha)
    x0 = critic(x_own, own.t_of_model_time(time), NOTHING).x0
    torch.testing.assert_close(losses.terms["denoise"], (losses.sample - x0).square().mean(1) / angle.sin() ** 2)
    right = exact(name, target, torch.full((2,), 0.5), torch.full((2,), 0.64))
    assert RCM().critic_loss(game(student, critic, right), batch(), rng()).total < losses.total


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_rollout_falls_from_noise_and_only_its_last_step_has_a_graph(length):
    heard = Counted()
    student = denoiser(Gaussian(MEAN.tolist(), VAR.tolist(), endpoint), SCHEDULES["sd"], "epsilon", heard)
    teacher = exact("sd", "epsilon")
    RCM().score(game(student, teacher, teacher), batch(), rng(length))
    assert heard.with_graph == [False] * length + [True]
    fed = torch.stack(heard.times)
    assert (fed[0] - 999).abs().max() < 1e-4 and (fed.diff(dim=0) <= 0).all()
    assert len(fed[-1].unique()) > 1 or length == 0  # random times, not a grid


def test_an_exact_student_draws_the_data_whatever_the_rollout():
    """consistency.md 0.6: f and fresh noise keep every marginal."""
    student = denoiser(Gaussian(MEAN.tolist(), VAR.tolist(), endpoint), SCHEDULES["flow"], "flow")
    many = Batch(NOTHING, (20_000, 2))
    for length in range(4):
        x = RCM()._sample(game(student, student, student), many, rng(length)).x0.detach()
        assert (x.mean(0) - MEAN).abs().max() < 0.05 and (x.var(0) / VAR - 1).abs().max() < 0.05


def test_warm_up_is_consistency_alone():
    objective = RCM(warmup=4, critic_turns=2)
    assert [[turn.player for turn in objective.round(step)] for step in (0, 3, 4)] == [
        ["student"],
        ["student"],
        ["critic", "critic", "student"],
    ]
    assert [objective.round(step)[0].loss.keywords["warm"] for step in (0, 3)] == [0.25, 1.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tangent_that_is_not_finite_pushes_nobody(bad):
    """The others' gradient is what it was; the whole turn was lost before."""
    student, given = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), SCHEDULES["sd"], "epsilon"), batch()

    def poisoned(net, x, time, cond):
        return net(x, time, cond) + torch.where(torch.arange(N) == 5, bad, 0.0)[:, None]

    teachers = exact("sd", "epsilon"), denoiser(exact("sd", "epsilon").net.clean, SCHEDULES["sd"], "epsilon", poisoned)
    whole, masked = (RCM().consistency(game(student, teacher), given, rng()) for teacher in teachers)
    others = torch.arange(N) != 5
    assert torch.equal(masked.terms["scm"][others], whole.terms["scm"][others]) and masked.terms["scm"][5] == 0
    found, expected = (
        torch.autograd.grad(term.sum(), list(student.net.parameters()))
        for term in (masked.terms["scm"], whole.terms["scm"][others])
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    assert masked.stats["masked"] == 1 and all(value.isfinite() for value in masked.stats.values())


def test_a_rollout_has_a_step():
    with pytest.raises(ValueError, match="at least 1"):
        RCM(rollout_steps=0)


def test_the_students_sample_is_what_it_draws_not_what_it_repairs():
    student, teacher = exact("flow", "flow"), exact("flow", "flow")
    losses = RCM().student_loss(game(student, teacher, teacher), batch(), rng())
    noise_end = torch.full((N,), Matched(student, TRIG).highest, dtype=torch.float64)
    first = stream(0, 0, 0, 0)
    first.normal_like(batch().latents)
    x = first.normal((N, 2), torch.float64)
    torch.testing.assert_close(losses.sample, Matched(student, TRIG)(x, noise_end, NOTHING).x0)
    assert noise_end[0] * ANGLE < torch.pi / 2


def test_the_weight_weighs_the_scores():
    student, teacher = denoiser(Gaussian([0.3, 0.1], [0.5, 0.6]), SCHEDULES["sd"], "epsilon"), exact("sd", "epsilon")
    nets = game(student, teacher, exact("sd", "epsilon", MEAN + 1))
    one, tenth = (RCM(score_weight=w).score(nets, batch(), rng()).terms["dm"] for w in (1.0, 0.1))
    torch.testing.assert_close(tenth, 0.1 * one)
