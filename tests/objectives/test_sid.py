"""Score identity distillation and its relatives against closed forms (distribution_matching.md, O4)."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import tiny_sd_pipeline, tiny_zimage_pipeline
from toys import (
    NOTHING,
    SCHEDULES,
    Counted,
    Gaussian,
    Quadrature,
    denoiser,
    game,
    players,
    times,
)

from fewstep.denoiser import Cond, Denoiser, Guided, Prediction
from fewstep.families import FAMILIES
from fewstep.heads import Discriminator, Heads
from fewstep.networks import Lora, build, heads_role
from fewstep.objectives import Batch
from fewstep.objectives.sid import SiD
from fewstep.objectives.sim import SIM
from fewstep.objectives.uni_instruct import UniInstruct
from fewstep.sampling import uniform_grid
from fewstep.stream import stream

TARGETS = ["epsilon", "v_prediction", "flow", "sample"]
ALPHAS = [0.0, 0.5, 1.0, 1.2]

# (alpha, sigma, teacher's mean and std, student's mean and std), and d/dmean, d/dstd by SiD's alpha (section 1's anchors)
ROWS = {
    "vp": (
        (0.8, 0.6, 0.3, 1.0, -0.2, 0.7),
        {0.5: (-0.064800, -0.109220), 1.0: (-0.096200, -0.130521), 1.2: (-0.108759, -0.139041)},
        0.064428,
    ),
    "flow": (
        (0.4, 0.6, 0.3, 1.0, -0.2, 1.3),
        {0.5: (-0.239645, 0.199126), 1.0: (-0.197677, 0.180016), 1.2: (-0.180889, 0.172372)},
        0.177739,
    ),
}
rows = pytest.mark.parametrize("row", ROWS)
targets = pytest.mark.parametrize("target", TARGETS)


def sid(alpha=1.0, **options):
    """SiD whose normaliser is a constant: at its floor."""
    return SiD(steps=1, alpha=alpha, floor=1e6, **options)


def formula(alpha, a, sig, mu, s, m, r):
    """O4."""
    v_s, v_r = a**2 * s**2 + sig**2, a**2 * r**2 + sig**2
    b = a**2 * sig**2 * (s**2 - r**2) / (v_s * v_r)
    dm = (m - mu) * (sig**2 / v_s) * (sig**2 / v_r - 2 * (1 - alpha) * b)
    return dm, 2 * r * b * ((1 - alpha) * b - sig**2 / v_r)


def of_dmd(a, sig, mu, s, m, r):
    """O1."""
    v_s, v_r = a**2 * s**2 + sig**2, a**2 * r**2 + sig**2
    return (m - mu) * sig**2 / v_s, a**2 * sig**2 * r * (r**2 - s**2) / (v_r * v_s)


def square(a, sig, mu, s, m, r):
    """E[delta^2] at the critic's optimum."""
    v_s, v_r = a**2 * s**2 + sig**2, a**2 * r**2 + sig**2
    return ((m - mu) * sig**2 / v_s) ** 2 + (a * sig**2 * (s**2 - r**2) / (v_s * v_r)) ** 2 * v_r


@dataclass(frozen=True)
class Detached:
    """A denoiser through whose input no gradient passes: the mistake that T7 is about."""

    inner: Denoiser

    def __call__(self, x_t, t, cond) -> Prediction:
        return self.inner(x_t.detach(), t, cond)


def terms(objective, student, teacher, critic, nodes=6):
    """(the term (B,) at the nodes, the rule that averages it)."""
    rng = Quadrature(2, nodes)
    losses = objective.student_loss(game(student, teacher, critic), Batch(NOTHING, (len(rng), 1)), rng)
    (term,) = losses.terms.values()
    return term * getattr(objective, "floor", 1.0), rng


def gradient(objective, student, teacher, critic, nodes=6):
    term, rng = terms(objective, student, teacher, critic, nodes)
    clean = student.net.clean
    return [g.item() for g in torch.autograd.grad(rng.mean(term), [clean.mean, clean.std])]


@rows
@pytest.mark.parametrize("alpha", ALPHAS)
@targets
def test_the_gradient_is_the_closed_form(row, alpha, target):
    """O4, T6."""
    values, anchors, _ = ROWS[row]
    found = gradient(sid(alpha), *players(*values, target))
    assert found == pytest.approx(formula(alpha, *values), rel=1e-9)
    if alpha in anchors:
        assert found == pytest.approx(anchors[alpha], abs=1e-6)


@rows
@targets
def test_half_is_half_the_gradient_of_the_square_whose_critic_follows(row, target):
    """T6: the theorem that alpha = 1/2 rests on."""
    values, _, anchor = ROWS[row]
    *fixed, m, r = values
    m, r = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, r))
    value = square(*fixed, m, r)
    assert value.item() == pytest.approx(anchor, abs=1e-6)
    true = [g.item() / 2 for g in torch.autograd.grad(value, [m, r])]
    assert gradient(sid(0.5), *players(*values, target)) == pytest.approx(true, rel=1e-9)


@rows
@targets
def test_the_loss_is_affine_in_alpha_and_below_zero_beyond_one(row, target):
    """T5: a sample loses alpha delta^2; the mean is (1 - alpha) E[delta^2]."""
    values, _, _ = ROWS[row]
    (start, rng), *others = (terms(sid(alpha), *players(*values, target)) for alpha in ALPHAS)
    unit = terms(sid(1.0), *players(*values, target))[0]
    for alpha, (term, _) in zip(ALPHAS[1:], others, strict=True):
        torch.testing.assert_close(term, start + alpha * (unit - start), rtol=1e-9, atol=1e-12)
        assert rng.mean(term).item() == pytest.approx((1 - alpha) * square(*values), abs=1e-9)


@rows
@targets
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_detached_input_would_make_it_dmd(row, alpha, target):
    """T7: cut x_t off inside both networks, and any alpha gives O1. This implementation does not."""
    values, _, _ = ROWS[row]
    student, teacher, critic = players(*values, target)
    dmd = of_dmd(*values)
    assert gradient(sid(alpha), student, Detached(teacher), Detached(critic)) == pytest.approx(dmd, rel=1e-9)
    found = gradient(sid(alpha), student, teacher, critic)
    assert all(abs(mine - theirs) > 0.005 for mine, theirs in zip(found, dmd, strict=True))


@pytest.mark.parametrize("objective", [*(sid(alpha) for alpha in ALPHAS), SIM(steps=1)])
@targets
def test_the_gradient_vanishes_where_the_student_is_the_teacher(objective, target):
    """T3."""
    assert gradient(objective, *players(0.8, 0.6, 0.3, 1.0, 0.3, 1.0, target)) == pytest.approx([0, 0], abs=1e-9)


def test_the_normaliser_is_the_distance_to_the_teachers_x0_and_has_no_gradient():
    values = ROWS["vp"][0]
    student, teacher, critic = players(*values, "epsilon")
    bare, rng = terms(sid(1.0), student, teacher, critic)
    normed, _ = terms(replace(sid(1.0), floor=1e-5), student, teacher, critic)
    x = -0.2 + 0.7 * rng.nodes[:, 0]
    x_t = 0.8 * x + 0.6 * rng.nodes[:, 1]
    far = (x - (0.3 + 0.8 * (x_t - 0.24))).abs()
    torch.testing.assert_close(normed / 1e-5 * far, bare, rtol=1e-9, atol=1e-12)
    clean = student.net.clean
    mine, wanted = (torch.autograd.grad(v, [clean.mean, clean.std]) for v in ((normed / 1e-5).sum(), (bare / far).sum()))
    torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


# SIM


@targets
def test_a_wide_huber_is_sid_with_alpha_one(target):
    """T5."""
    values = ROWS["vp"][0]
    flat, _ = terms(SIM(steps=1, huber=1e4), *players(*values, target))
    wanted, _ = terms(sid(1.0), *players(*values, target))
    torch.testing.assert_close(flat * 1e4, wanted, rtol=1e-6, atol=1e-9)


@rows
@targets
@pytest.mark.parametrize("huber", [0.03, 0.5])
def test_sim_lowers_the_pseudo_huber_distance_of_the_two_scores(row, target, huber):
    """Its gradient is that of E[sqrt(delta^2 + c^2)] over x_t ~ sg(student), where the critic follows the student."""
    (a, sig, mu, s, m, r), _, _ = ROWS[row]
    z, w = Quadrature(1, 150).nodes[:, 0], Quadrature(1, 150).weights
    x_t = a * m + (a**2 * r**2 + sig**2) ** 0.5 * z
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, r))
    fake = mean + a * std**2 / (a**2 * std**2 + sig**2) * (x_t - a * mean)
    real = mu + a * s**2 / (a**2 * s**2 + sig**2) * (x_t - a * mu)
    true = torch.autograd.grad((w * ((fake - real) ** 2 + huber**2).sqrt()).sum(), [mean, std])
    found = gradient(SIM(steps=1, huber=huber), *players(a, sig, mu, s, m, r, target), nodes=150)
    assert found == pytest.approx([g.item() for g in true], rel=2e-2 if huber < 0.1 else 1e-6)


def test_sims_distance_needs_its_corner_rounded():
    with pytest.raises(ValueError, match="huber must be positive"):
        SIM(huber=0.0)


# Turns, steps, cost


def recorded(steps):
    seen, heard, judged, schedule = Counted(), Counted(), Counted(), SCHEDULES["sd"]
    student = denoiser(Gaussian([0.1, 0.2], [0.5, 0.7]), schedule, "epsilon", seen)
    teacher = denoiser(Gaussian([0.5, 0.0], [1.0, 1.0]), schedule, "epsilon", heard)
    critic = denoiser(Gaussian([0.2, 0.2], [0.6, 0.8]), schedule, "epsilon", judged)
    return game(student, teacher, critic, grid=uniform_grid(steps)), seen, heard, judged


METHODS = pytest.mark.parametrize("kind", [SiD, SIM])
PAIR = Batch(NOTHING, (6, 2))


@METHODS
def test_every_steps_output_is_trained_on_and_known_to_the_critic(kind):
    """Few-step SiD: steps are shared out over the samples, none preferred, only the last pass with a graph."""
    counts = {"student": [], "critic": []}
    for round_ in range(40):
        for i, turn in enumerate(kind(steps=4, critic_turns=1).round(round_)):
            nets, seen, _, _ = recorded(4)
            turn.loss(nets, PAIR, stream(0, 0, round_, i))
            assert seen.with_graph == [False, False, False, turn.player == "student"]
            assert [time.unique().tolist() for time in seen.times[:-1]] == [[999], [749], [499]]
            counts[turn.player] += seen.times[-1].tolist()
    for found in counts.values():
        assert all(abs(found.count(t) - 60) < 12 for t in (999, 749, 499, 249))


@METHODS
def test_a_student_turn_costs_one_pass_of_either_frozen_network(kind):
    for i, turn in enumerate(kind(steps=1).round(0)[-2:]):
        nets, seen, heard, judged = recorded(1)
        turn.loss(nets, PAIR, stream(0, 0, 0, i))
        student = turn.player == "student"
        assert (len(seen.inputs), heard.with_graph, judged.with_graph) == (1, [True] * student, [True])


@METHODS
@pytest.mark.parametrize("turns", [1, 5])
def test_the_critic_moves_first_and_so_often(kind, turns):
    assert [turn.player for turn in kind(critic_turns=turns).round(3)] == ["critic"] * turns + ["student"]


# Through real networks


@pytest.mark.parametrize("objective", [SiD(steps=2), UniInstruct(steps=2, divergence="kl")])
@pytest.mark.parametrize("family", ["unet", "transformer"])
def test_the_gradient_reaches_the_student_through_frozen_networks_whatever_recomputes_them(family, objective):
    """T8: adapters on one base, checkpointed or not, give the gradients of separate networks; the frozen ones get none."""
    pipe = tiny_sd_pipeline() if family == "unet" else tiny_zimage_pipeline()
    known, net = FAMILIES[type(pipe).__name__], getattr(pipe, family)
    schedule = known.schedule(pipe.scheduler)
    wanted = {"student": Lora(4), "critic": Lora(4)}
    words, null = (torch.randn(n, 5, 16, generator=torch.Generator().manual_seed(n)) for n in (3, 1))
    cond = Cond({"prompt": words, "length": torch.tensor([5, 4, 3])})
    empty = Cond({"prompt": null, "length": torch.tensor([2])})
    found = []
    for shared, checkpointing in ((True, True), (True, False), (False, False)):
        bases = [copy.deepcopy(net)] * 3 if shared else [copy.deepcopy(net) for _ in range(3)]
        if shared:
            roles = build(bases[0], wanted, lora_targets=known.lora_targets, checkpointing=checkpointing)
        else:
            roles = {"teacher": build(bases[0], {}, lora_targets=())["teacher"]}
            for base, (name, lora) in zip(bases[1:], wanted.items(), strict=True):
                roles[name] = build(base, {name: lora}, lora_targets=known.lora_targets)[name]
        for i, name in enumerate(wanted):
            rng = torch.Generator().manual_seed(i)
            for p in roles[name].parameters():
                p.data += 0.1 * torch.randn(p.shape, generator=rng)
            roles[name].requires_grad_(name == "student")
        player = {name: Denoiser(role, schedule, known.target(pipe.scheduler), known.call) for name, role in roles.items()}
        heads = heads_role(roles, Heads(), seed=0).requires_grad_(False)
        judge = Discriminator(player["critic"], Heads().taps_on(roles["critic"].net), heads)
        nets = game(player["student"], Guided(player["teacher"], 3.0, empty), player["critic"], grid=(1.0, 0.5))
        objective.student_loss(replace(nets, judge=judge), Batch(cond, (3, 4, 8, 8)), stream(0, 0, 0, 0)).total.backward()
        with torch.no_grad():
            player["teacher"](torch.randn(3, 4, 8, 8), times(0.4, 0.5, 0.6), cond)  # a switch of role between two turns
        student = roles["student"].weights()
        assert all(p.grad is not None for p in student.values())
        own = {id(p) for p in student.values()}
        assert all(p.grad is None for net in (*bases, heads) for p in net.parameters() if id(p) not in own)
        found.append(torch.cat([p.grad.flatten() for p in student.values()]))
    recomputed, kept, separate = found
    assert (recomputed - kept).norm() <= 1e-5 * kept.norm()
    assert (kept - separate).norm() <= 1e-5 * separate.norm()
