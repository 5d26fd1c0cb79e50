import pytest
from toys import (
    SCHEDULES,
    Blind,
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
)

from fewstep.denoiser import Guided
from fewstep.objectives import Batch
from fewstep.objectives.vsd import VSD
from fewstep.stream import stream

TARGETS = ["epsilon", "v_prediction", "flow"]
ROWS = [(0.8, 0.6, 0.3, 1.0, -0.2, 0.7), (0.4, 0.6, 0.3, 1.0, -0.2, 1.3)]
W, MU, MU_U = 3.0, 0.3, -0.1


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_is_alpha_sigma_times_the_divergences(row, target):
    """O1 under SwiftBrush's weight: sigma^2 (eps_teacher - eps_critic) has its sign and a sig of its size."""
    a, sig, mu, s, m, r = row
    level = OneLevel(a, sig)
    nets = game(denoiser(Linear(m, r), level, target), *(gaussian([x], [y**2], level, target) for x, y in ((mu, s), (m, r))))
    found = expected_gradient(VSD(), nets, Quadrature(2))
    assert found == pytest.approx([a * sig * g for g in reverse_kl(*row)], rel=1e-9)


def told(target, m, r, scale=W):
    """Player networks that are told their law: the critic knows the student's, with a prompt and without."""
    level = OneLevel(0.8, 0.6)
    teacher = Guided(denoiser(Gaussian([9.0], [9.0]), level, target), scale, law(MU_U, 1.0))
    critic = denoiser(Shifted(m - MU, r), level, target)
    return game(denoiser(Linear(m, r), level, target), teacher, critic)


class Shifted(Gaussian):
    """What the teacher is told, moved and of another spread."""

    def __init__(self, by, std):
        super().__init__([9.0], [9.0])
        self.by, self.width = by, std

    def forward(self, x, t, alpha, sigma, cond):
        return super().forward(x, t, alpha, sigma, {"mean": cond["mean"] + self.by, "var": cond["var"] * self.width**2})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_the_same_guidance_on_both_leaves_the_teachers_law_at_rest(scale, target):
    """Guidance of the teacher alone moves the fixed point away (test_dmd.py); here it is its own law for every scale."""
    rng = Quadrature(2)
    batch = Batch(law(MU, 1.0).expand(len(rng)), (len(rng), 1))
    assert expected_gradient(VSD(), told(target, MU, 1.0, scale), rng, batch) == pytest.approx([0, 0], abs=1e-12)
    found = expected_gradient(VSD(), told(target, MU + 0.4, 1.0, scale), Quadrature(2), batch)
    assert found == pytest.approx([0.48 * g for g in reverse_kl(0.8, 0.6, MU, 1.0, MU + 0.4, 1.0)], abs=1e-12)


def test_random_guidance_is_one_number_a_turn_on_which_processes_agree():
    objective = VSD(kappa=(0.5, 4.0))
    drawn = []
    for round_ in range(64):
        ranks = [objective.guided(told("flow", 0.0, 1.0), stream(0, rank, round_, 1)) for rank in range(2)]
        scales = {player.scale for pair in ranks for player in pair}
        assert len(scales) == 1
        drawn += scales
    assert 0.5 <= min(drawn) < 0.8 and 3.7 < max(drawn) < 4.0
    fixed = VSD().guided(told("flow", 0.0, 1.0), stream(0, 0, 0, 1))
    assert [player.scale for player in fixed] == [W, W]


def test_the_critic_learns_a_tenth_of_its_prompts_away():
    """Its null branch is asked for as part of the guidance, so it must know the student's law, too."""
    seen, schedule = [], SCHEDULES["flow"]
    student, n = denoiser(Linear(0.0, 1.0), schedule, "flow"), 4000
    asked = denoiser(
        Gaussian([0.0], [1.0]), schedule, "flow", lambda net, x, time, cond: (seen.append(cond), net(x, time, cond))[1]
    )
    teacher = Guided(denoiser(Gaussian([9.0], [9.0]), schedule, "flow"), W, law(MU_U, 1.0))
    batch = Batch(law(MU, 1.0).expand(n), (n, 1))
    for objective, share in ((VSD(), 0.1), (VSD(dropout=0.0), 0.0)):
        objective.critic_loss(game(student, teacher, asked), batch, stream(0, 0, 0, 0))
        left_out = (seen[-1].tensors["mean"] == MU_U).double().mean().item()
        assert left_out == pytest.approx(share, abs=0.02)
        assert set(seen[-1].tensors["mean"].unique().tolist()) <= {MU, MU_U}


@pytest.mark.parametrize("target", TARGETS)
def test_the_critics_loss_is_its_error_in_eps_times_alpha_squared(target):
    """The floor of the best critic is E |eps - eps*|^2 = a^2 r^2 / V_r, and a^2 of that."""
    a, sig, m, r = 0.8, 0.6, -0.2, 0.7
    level, rng = OneLevel(a, sig), Quadrature(2)
    critic = denoiser(Blind(Gaussian([m], [r**2])), level, target)
    nets = game(denoiser(Linear(m, r), level, target), gaussian([0.0], [1.0], level, target), critic)
    loss = VSD().critic_loss(nets, Batch(law(0.0, 1.0).expand(len(rng)), (len(rng), 1)), rng)
    floor = a**2 * r**2 / (a**2 * r**2 + sig**2)
    assert rng.mean(loss.terms["denoise"]).item() == pytest.approx(a**2 * floor, rel=1e-9)


def test_wrong_ranges_are_refused():
    with pytest.raises(ValueError, match=r"kappa is a range \[low, high\] of guidance"):
        VSD(kappa=(4.0, 0.5))
    with pytest.raises(ValueError, match=r"dropout is a share of prompts in \[0, 1\)"):
        VSD(dropout=1.0)
