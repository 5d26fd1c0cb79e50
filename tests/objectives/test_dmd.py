import math

import pytest
import torch
from torch import nn
from toys import (
    NOTHING,
    SCHEDULES,
    TEACHERS,
    Blind,
    Counted,
    Gaussian,
    Linear,
    OneLevel,
    Quadrature,
    denoiser,
    endpoint,
    expected_gradient,
    game,
    gaussian,
    law,
    reverse_kl,
    times,
)

from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.objectives import Batch
from fewstep.objectives.base import simulate
from fewstep.objectives.decoupled import Decoupled
from fewstep.objectives.dmd import DMD
from fewstep.sampling import STEPS, uniform_grid
from fewstep.stream import stream

FLAT = DMD(steps=1, floor=1e6)  # a normaliser at its floor is a constant: the direction is divided by 1e6, and by nothing else
TARGETS = ["epsilon", "v_prediction", "flow", "sample"]
targets = pytest.mark.parametrize("target", TARGETS)
teachers = pytest.mark.parametrize("name, target", TEACHERS)

# (alpha, sigma, teacher's mean and std, student's mean and std), d/dmean and d/dstd of distribution_matching.md O1
ROWS = {
    "vp": ((0.8, 0.6, 0.3, 1.0, -0.2, 0.7), (-0.180000, -0.122109)),
    "flow": ((0.4, 0.6, 0.3, 1.0, -0.2, 1.3), (-0.346154, 0.157614)),
    "ve": ((1.0, 2.0, 0.3, 1.0, -0.2, 0.7), None),
}


def play(a, sig, mu, s, m, r, target):
    level = OneLevel(a, sig)
    student = denoiser(Linear(m, r), level, target)
    nets = game(student, gaussian([mu], [s**2], level, target), gaussian([m], [r**2], level, target))
    return [FLAT.floor * g for g in expected_gradient(FLAT, nets, Quadrature(2))]


@pytest.mark.parametrize("row", ROWS)
@targets
def test_the_gradient_is_that_of_the_divergence(row, target):
    values, anchor = ROWS[row]
    found = play(*values, target)
    assert found == pytest.approx(reverse_kl(*values), rel=1e-9)
    if anchor:
        assert found == pytest.approx(anchor, abs=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_the_gradient_does_not_depend_on_what_the_networks_predict(row):
    """T2."""
    first, *others = (play(*ROWS[row][0], target) for target in TARGETS)
    for other in others:
        assert other == pytest.approx(first, abs=1e-10)


@targets
def test_the_gradient_vanishes_where_the_student_is_the_teacher(target):
    """T3."""
    assert play(0.8, 0.6, 0.3, 1.0, 0.3, 1.0, target) == pytest.approx([0, 0], abs=1e-9)


def test_the_normaliser_is_the_distance_to_the_teachers_x0():
    level, rng = OneLevel(0.8, 0.6), Quadrature(2)
    student = denoiser(Linear(-0.2, 0.7), level, "epsilon")
    teacher, critic = gaussian([0.3], [1.0], level, "epsilon"), gaussian([-0.2], [0.49], level, "epsilon")
    losses = DMD(steps=1).student_loss(game(student, teacher, critic), Batch(NOTHING, (len(rng), 1)), rng)
    z, eps = rng.nodes[:, :1], rng.nodes[:, 1:]
    x = -0.2 + 0.7 * z
    x_t = 0.8 * x + 0.6 * eps
    real, fake = 0.3 + 0.8 * (x_t - 0.24), -0.2 + 0.8 * 0.49 / (0.64 * 0.49 + 0.36) * (x_t + 0.16)
    direction = (fake - real) / (x - real).abs().clamp_min(1e-4)
    (grad,) = torch.autograd.grad(losses.terms["dm"].sum(), losses.sample)
    torch.testing.assert_close(grad, direction, rtol=1e-9, atol=1e-12)


# The critic


class Affine(nn.Module):
    """A network whose output is a line in x, whatever that output means."""

    def __init__(self):
        super().__init__()
        self.line = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x, time, cond):
        return self.line[0] + self.line[1] * x


@targets
@pytest.mark.parametrize("a, sig, m, r", [(0.8, 0.6, -0.2, 0.7), (0.4, 0.6, -0.2, 1.3)])
def test_the_best_critic_knows_the_students_law(a, sig, m, r, target):
    """T4: least squares over lines gives the closed forms, and the loss left over is the closed floor."""
    level = OneLevel(a, sig)
    critic = Denoiser(Affine(), level, target, lambda net, x, time, cond: net(x, time, cond))
    student = denoiser(Linear(m, r), level, target)

    def loss_and_slope(line):
        rng = Quadrature(2)
        with torch.no_grad():
            critic.net.line.copy_(line)
        losses = DMD(steps=1).critic_loss(game(student, None, critic), Batch(NOTHING, (len(rng), 1)), rng)
        loss = rng.mean(losses.terms["denoise"])
        return loss.item(), torch.autograd.grad(loss, critic.net.line)[0]

    # The loss is quadratic in the line: one Newton step from anywhere ends at its minimum.
    origin, *units = torch.eye(3, 2, dtype=torch.float64).roll(1, 0)
    slope = loss_and_slope(origin)[1]
    curvature = torch.stack([loss_and_slope(unit)[1] - slope for unit in units])
    best = -torch.linalg.solve(curvature, slope)
    v_r = a**2 * r**2 + sig**2
    gain = {"sample": a * r**2 / v_r, "epsilon": sig / v_r, "flow": (sig - a * r**2) / v_r}
    gain["v_prediction"] = a * gain["epsilon"] - sig * gain["sample"]
    offset = {"sample": m, "epsilon": 0, "v_prediction": -sig * m, "flow": -m}[target]
    assert best.tolist() == pytest.approx([offset - gain[target] * a * m, gain[target]], abs=1e-9)
    scale = {"sample": sig**2 / a**2, "epsilon": 1, "v_prediction": (a + sig**2 / a) ** 2, "flow": (1 + sig / a) ** 2}[target]
    assert loss_and_slope(best)[0] == pytest.approx(scale * a**2 * r**2 / v_r, rel=1e-9)


# Guidance


def guided_gradient(target, scale, conditional, unconditional, m, r):
    level, rng = OneLevel(0.8, 0.6), Quadrature(2)
    network = denoiser(Gaussian([9.0], [9.0]), level, target)  # its own law is never used: the conditions say
    student = denoiser(Linear(m, r), level, target)
    critic = denoiser(Blind(Gaussian([m], [r**2])), level, target)
    batch = Batch(law(*conditional).expand(len(rng)), (len(rng), 1))
    nets = game(student, Guided(network, scale, law(*unconditional)), critic)
    return [FLAT.floor * g for g in expected_gradient(FLAT, nets, rng, batch)]


@targets
def test_guidance_moves_the_fixed_point_by_the_distance_of_the_means(target):
    """O3: m* = mu + (w - 1) (mu - mu_u), r* = s."""
    w, mu, mu_u = 3.0, 0.3, -0.1
    m = mu + (w - 1) * (mu - mu_u)
    assert guided_gradient(target, w, (mu, 1.0), (mu_u, 1.0), m, 1.0) == pytest.approx([0, 0], abs=1e-9)
    assert guided_gradient(target, w, (mu, 1.0), (mu_u, 1.0), mu, 1.0)[0] == pytest.approx(-(w - 1) * (mu - mu_u) * 0.36)


@targets
def test_guidance_by_a_wider_law_costs_diversity(target):
    """O3, T29: gradient descent with the best critic ends at the law of p_c^w p_u^(1 - w) of that level."""
    w, mu, mu_u, s, s_u, a, sig = 2.0, 0.3, -0.1, 1.0, 1.4, 0.8, 0.6
    v_s, v_u = a**2 * s**2 + sig**2, a**2 * s_u**2 + sig**2
    p = w / v_s - (w - 1) / v_u
    m, r = mu, s
    for _ in range(150):
        dm, dr = guided_gradient(target, w, (mu, s**2), (mu_u, s_u**2), m, r)
        m, r = m - 1.5 * dm, r - 1.5 * dr
    assert m == pytest.approx((w * mu / v_s - (w - 1) * mu_u / v_u) / p, abs=1e-5)
    assert r == pytest.approx(math.sqrt(1 / p - sig**2) / a, abs=1e-5)
    assert r < s


# Turns and backward simulation


@pytest.mark.parametrize("kind", [DMD, Decoupled])
def test_the_critic_follows_where_it_is_told_to(kind):
    assert [turn.followers for turn in kind(ida=0.97, critic_turns=1).round(0)] == [{}, {"critic": pytest.approx(0.03)}]
    assert not any(turn.followers for turn in kind().round(0))
    with pytest.raises(ValueError, match="ida is the share of its weights that the critic keeps"):
        kind(ida=1.5)


@pytest.mark.parametrize("turns", [1, 5, 10])
def test_the_critic_moves_so_many_times_before_the_student(turns):
    """T12."""
    for round_ in (0, 1, 7):
        assert [turn.player for turn in DMD(critic_turns=turns).round(round_)] == ["critic"] * turns + ["student"]


def recorded(grid, name="sd", target="epsilon"):
    """(nets, what the student was asked) of a three-player game with trainable players."""
    seen, schedule = Counted(), SCHEDULES[name]
    student = denoiser(Gaussian([0.1, 0.2], [0.5, 0.7], endpoint), schedule, target, seen)
    critic = denoiser(Gaussian([0.2, 0.2], [0.6, 0.8]), schedule, target)
    teacher = denoiser(Gaussian([0.5, 0.0], [1.0, 1.0]), schedule, target)
    return game(student, teacher, critic, grid=grid), seen


BATCH = Batch(NOTHING, (6, 2))


@teachers
@pytest.mark.parametrize("n, least, most", [(8, 2, 2), (6, 1, 2), (1, 0, 1)])
def test_a_batch_is_shared_out_over_the_steps_alike_on_all_processes(name, target, n, least, most):
    """T16, for every share of a batch: the passes and their sizes are those of all processes, and steps come up equally often."""
    counts = torch.zeros(4)
    clock = SCHEDULES[name].model_time(times(*uniform_grid(4))).tolist()
    for round_ in range(200 if n < 4 else 24):
        made = []
        for rank in range(3):
            nets, seen = recorded(uniform_grid(4), name, target)
            simulate(nets, Batch(NOTHING, (n, 2)), stream(0, rank, round_, 5))
            made.append([(len(x), time.tolist()) for x, time in zip(seen.inputs, seen.times, strict=True)])
        assert made[0] == made[1] == made[2]
        _, last = made[0][-1]
        here = torch.tensor([last.count(pytest.approx(t, rel=1e-6)) for t in clock])
        assert here.sum() == n and least <= here.min() and here.max() <= most
        counts += here
    assert (counts / counts.sum()).tolist() == pytest.approx([0.25] * 4, abs=0.08)


@teachers
def test_simulation_starts_from_pure_noise_and_only_its_last_call_has_a_graph(name, target):
    schedule = SCHEDULES[name]
    told = [999, 749, 499, 249] if name == "sd" else schedule.model_time(times(1, 0.75, 0.5, 0.25)).float().tolist()
    nets, seen = recorded(uniform_grid(4), name, target)
    prediction = simulate(nets, Batch(NOTHING, (8, 2)), stream(0, 1, 3, 0))
    noise = schedule.prior(stream(0, 1, 3, 0).normal((8, 2)))
    begins = seen.times[-1] == told[0]
    assert torch.equal(seen.inputs[0], noise[~begins]) and torch.equal(seen.inputs[-1][begins], noise[begins])
    assert [len(x) for x in seen.inputs] == [6, 4, 2, 8]
    assert [time.unique().tolist() for time in seen.times[:-1]] == [[t] for t in told[:-1]]
    assert sorted(seen.times[-1].tolist()) == sorted(told * 2)
    assert seen.with_graph == [False, False, False, True] and prediction.x0.requires_grad


def test_a_one_step_student_is_asked_once_at_the_noise_end():
    nets, seen = recorded(uniform_grid(1))
    simulate(nets, BATCH, stream(0, 0, 0, 0))
    assert [time.tolist() for time in seen.times] == [[999] * 6]


@teachers
def test_simulation_walks_as_the_student_is_deployed(name, target):
    schedule = SCHEDULES[name]
    for step in STEPS.values():
        seen = Counted()
        student = denoiser(Gaussian([0.1, 0.2], [0.5, 0.7]), schedule, target, seen)
        rng = stream(0, 0, 0, 0)
        simulate(game(student, None, grid=(1.0, 0.5), step=step), BATCH, Counting(rng))
        again = Counting(type(rng)(rng.key))
        noise = schedule.prior(again.normal(BATCH.shape))
        walked = seen.times[1] != seen.times[0][0]
        first = student(noise[walked], torch.ones(3, dtype=torch.float64), NOTHING)
        torch.testing.assert_close(seen.inputs[1][walked], step(schedule, first, times(*[0.5] * 3), again))


def test_each_sample_walks_under_its_own_condition():
    n, seen = 6, []

    def call(net, x, time, cond):
        seen.append(cond.tensors["label"])
        return net(x, time, cond)

    student = denoiser(Gaussian([0.1, 0.2], [0.5, 0.7]), SCHEDULES["flow"], "flow", call)
    labels = torch.arange(n)
    simulate(game(student, None, grid=uniform_grid(3)), Batch(Cond({"label": labels}), (n, 2)), stream(0, 0, 0, 0))
    assert [len(label) for label in seen] == [4, 2, 6] and seen[-1].tolist() == labels.tolist()
    assert all(label[: len(label) // 2].tolist() == (label[len(label) // 2 :] - 3).tolist() for label in seen)


class Counting:
    """A stream that is used through the two draws that simulation makes."""

    def __init__(self, rng):
        self.rng, self.shared = rng, rng.shared

    def normal(self, shape):
        return self.rng.normal(shape)

    def normal_like(self, x):
        return self.rng.normal_like(x)


def moved(nets, loss):
    """Names of the players that a loss gives gradients to."""
    loss.total.backward()
    roles = {"student": nets.student, "critic": nets.critic, "teacher": nets.teacher}
    return {name for name, role in roles.items() if any(p.grad is not None for p in role.net.parameters())}


def test_a_turn_gives_gradients_to_its_player_alone():
    for round_ in range(6):
        for turn in DMD().round(round_)[-2:]:
            nets, _ = recorded(uniform_grid(4))
            assert moved(nets, turn.loss(nets, BATCH, stream(0, 0, round_, turn.player))) == {turn.player}


def test_the_students_sample_is_handed_on_with_its_graph():
    nets, _ = recorded(uniform_grid(4))
    losses = DMD().student_loss(nets, BATCH, stream(0, 0, 0, 0))
    assert losses.sample.shape == BATCH.shape and losses.sample.requires_grad
    assert losses.terms["dm"].shape == (6,)


@teachers
def test_the_exact_student_is_at_rest_at_every_step(name, target):
    """T17: with the critic at the student's law, which is the teacher's, the gradient is zero wherever simulation stops."""
    schedule, asked = SCHEDULES[name], Counted()
    nets = game(
        denoiser(Gaussian([0.3, -1.0], [0.5, 2.0], endpoint), schedule, target, asked),
        gaussian([0.3, -1.0], [0.5, 2.0], schedule, target),
        gaussian([0.3, -1.0], [0.5, 2.0], schedule, target),
        grid=uniform_grid(3),
    )
    for round_ in range(8):
        DMD(steps=3).student_loss(nets, BATCH, stream(0, 0, round_, 0)).total.backward()
        assert len(asked.times[-1].unique()) == 3
    assert all((p.grad == 0).all() for p in nets.student.net.parameters())
