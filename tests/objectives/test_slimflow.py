"""Annealed reflow and flow-guided distillation in closed form."""

import pytest
import torch
from straight import MEAN, STD, N, Straight, pairs, teachers
from toys import NOTHING, SCHEDULES, Counted, Linear, ddim_factor, denoiser, game, gaussian

from fewstep.config import parse
from fewstep.objectives.reflow import huber
from fewstep.objectives.slimflow import AnnealedReflow, FlowGuided, two_steps
from fewstep.schedules import like
from fewstep.stream import stream


class Coupled(torch.nn.Module):
    """E[x0 | x_t] where x0 = mean + std e and the noise is sqrt(1 - b^2) e + b fresh; at the end that alone is known."""

    def __init__(self, schedule, fresh):
        super().__init__()
        self.schedule, self.fresh, self.own = schedule, fresh, (1 - fresh**2) ** 0.5

    def forward(self, x, t, alpha, sigma, cond):
        n = x / self.schedule.prior(torch.ones_like(x))
        apart = alpha * STD + sigma * self.own
        gain = STD * apart / (apart**2 + (sigma * self.fresh) ** 2)
        return MEAN + torch.where(t[:, None] > 1 - 1e-9, STD * self.own * n, gain * (x - alpha * MEAN))


@teachers
@pytest.mark.parametrize("fresh", [0.0, 0.6, 1.0])
def test_the_noise_is_as_much_its_own_as_the_round_says(name, target, fresh):
    """Of the students that expect this share or that, the one that expects the true one has the least squared error."""
    schedule, objective, shares = SCHEDULES[name], AnnealedReflow(huber=1e2), (0.0, 0.3, 0.6, 0.8, 1.0)
    players = [denoiser(Coupled(schedule, share), schedule, target) for share in shares]
    lost = torch.zeros(len(shares), dtype=torch.float64)
    for seed in range(8):
        given = pairs()
        for k, player in enumerate(players):
            lost[k] += objective.student_loss(game(player, None), given, stream(seed, 0, 0, 0), fresh=fresh).total
    assert shares[int(lost.argmin())] == fresh and (lost[0] < 1e-9 or fresh > 0)


@teachers
def test_at_the_end_it_is_reflow_which_straight_lines_satisfy(name, target):
    student, given = denoiser(Straight(), SCHEDULES[name], target), pairs()
    assert AnnealedReflow().student_loss(game(student, None), given, stream(0, 0, 0, 0)).terms["reflow"].max() < 1e-9
    assert AnnealedReflow().student_loss(game(student, None), given, stream(0, 0, 0, 0), fresh=0.5).total > 0.01


def test_the_share_falls_in_a_line_and_a_run_that_ends_before_is_refused():
    objective = AnnealedReflow(anneal=8)
    shares = [objective.round(k)[0].loss.keywords["fresh"] for k in (0, 2, 4, 8, 50)]
    assert shares == [1.0, 0.75, 0.5, 0.0, 0.0]
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "data": {"prompts": "zoo:sprites", "pairs": 8}}
    with pytest.raises(ValueError, match="needs at least 9 rounds, not 8"):
        parse({**tree, "objective": {"name": "annealed_reflow", "anneal": 8}, "train": {"rounds": 8}})


@teachers
def test_two_steps_land_where_two_ddim_factors_lead(name, target):
    schedule, n = SCHEDULES[name], 32
    t, share, x = torch.ones(n).double(), torch.linspace(0.2, 0.8, n).double(), torch.randn(n, 2).double()
    found = two_steps(gaussian(MEAN.tolist(), (STD**2).tolist(), schedule, target), x, t, NOTHING, share, stream(0, 0, 0, 0))
    alpha, sigma = schedule.alpha_sigma(t)
    u = share * sigma / (alpha + sigma)
    m = schedule.t_of_ratio(u / (1 - u))
    factors = [torch.stack([ddim_factor(schedule, a, b, v) for v in STD**2], -1) for a, b in ((t, m), (m, torch.zeros_like(m)))]
    expected = MEAN + factors[0] * factors[1] * (x - like(alpha, x) * MEAN)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@teachers
def test_the_student_rests_where_the_pairs_lead(name, target):
    straight = denoiser(Straight(), SCHEDULES[name], target)
    losses = FlowGuided(steps=1).student_loss(game(straight, straight, grid=(1.0,)), pairs(), stream(0, 0, 0, 0))
    assert losses.terms["regression"].max() < 1e-6


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("flow")])
@pytest.mark.parametrize("steps", [1, 2])
def test_of_a_path_that_ends_in_noise_it_rests_where_the_straightened_teacher_leads_too(name, steps):
    """A table's end keeps a trace of data, which the pure noise of a first step lacks."""
    straight = denoiser(Straight(), SCHEDULES[name], "flow")
    losses = FlowGuided(steps=steps).student_loss(game(straight, straight, grid=(1.0, 0.5)[:steps]), pairs(), stream(0, 0, 0, 0))
    assert losses.terms["regression"].max() < 1e-6 and losses.terms["guide"].max() < 1e-6


@pytest.mark.parametrize("first", [1.0, 0.4])
def test_the_guide_starts_from_its_own_noise_end_wherever_the_student_is_told_it_begins(first):
    teacher, student = (gaussian([0.3, 0.1], var, SCHEDULES["sd"], "epsilon") for var in ([0.5, 2.0], [0.1, 0.1]))
    given = pairs()
    losses = FlowGuided(huber=0.0).student_loss(game(student, teacher, grid=(first,)), given, stream(0, 0, 0, 0))
    rng = stream(0, 0, 0, 0)
    rng.shared.integer(1)
    share = 0.2 + 0.6 * rng.uniform(N)
    goal = two_steps(teacher, given.noise, torch.ones(N).double(), NOTHING, share, rng)
    drawn = student(given.noise, torch.full((N,), first).double(), NOTHING).x0
    torch.testing.assert_close(losses.terms["guide"], huber(drawn, goal, 0.0))


def test_both_terms_are_distances_of_one_step_and_only_the_student_learns():
    teacher, given, heard = gaussian([0.3, 0.1], [0.5, 2.0], SCHEDULES["flow"], "flow"), pairs(), Counted()
    student = denoiser(Linear(0.3, 0.8), SCHEDULES["flow"], "flow", heard)
    losses = FlowGuided(guide=3.0, huber=0.0).student_loss(game(student, teacher), given, stream(0, 0, 0, 0))
    rng = stream(0, 0, 0, 0)
    rng.shared.integer(1)
    share = 0.2 + 0.6 * rng.uniform(N)
    drawn = 0.3 + 0.8 * given.noise
    goal = two_steps(teacher, given.noise, torch.ones(N).double(), NOTHING, share, rng)
    torch.testing.assert_close(losses.terms["regression"], huber(drawn, given.latents, 0.0))
    torch.testing.assert_close(losses.terms["guide"], 3 * huber(drawn, goal, 0.0))
    losses.total.backward()
    assert len(heard.inputs) == 1 and all(p.grad.abs() > 0 for p in student.net.parameters())
    assert all(p.grad is None for p in teacher.net.parameters())
    for kind, wrong, said in ((FlowGuided, {"guide": 0.0}, "positive weight"), (AnnealedReflow, {"anneal": 0}, "counts rounds")):
        with pytest.raises(ValueError, match=said):
            kind(**wrong)
