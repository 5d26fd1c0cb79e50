"""SiD's long and short guidance: whom each kappa guides, in which turn, and by whose prompt."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny import MAKERS, save
from torch import nn
from toys import (
    Counted,
    Gaussian,
    Linear,
    OneLevel,
    Quadrature,
    denoiser,
    game,
    times,
)

from fewstep.adapters import load_teacher
from fewstep.config import parse
from fewstep.denoiser import Cond, Denoiser, Guided
from fewstep.objectives import Batch
from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.sid import SiD
from fewstep.stream import stream
from fewstep.study import study_of


def law(mean, var):
    return Cond({"mean": times(mean)[None], "var": times(var)[None]})


PROMPT, NULL = law(0.3, 1.0), law(-0.5, 1.2)


class Shifted(nn.Module):
    """A critic that knows another law than the teacher under each condition."""

    def __init__(self):
        super().__init__()
        self.inner = Gaussian([9.0], [9.0])

    def forward(self, x, t, alpha, sigma, cond):
        return self.inner(x, t, alpha, sigma, {"mean": cond["mean"] - 0.5, "var": cond["var"] * 0.49})


class Listener(Counted):
    """A family's call that keeps the conditions' means, too."""

    def __init__(self):
        super().__init__()
        self.means = []

    def __call__(self, net, x, time, cond):
        self.means.append(cond.tensors["mean"])
        return super().__call__(net, x, time, cond)


def guided_game(target="epsilon", teacher_scale=3.0):
    """(nets, what the teacher heard, what the critic heard)."""
    level, to_teacher, to_critic = OneLevel(0.8, 0.6), Listener(), Listener()
    teacher = denoiser(Gaussian([9.0], [9.0]), level, target, to_teacher)
    critic = denoiser(Shifted(), level, target, to_critic)
    student = denoiser(Linear(-0.2, 0.7), level, target)
    return game(student, Guided(teacher, teacher_scale, NULL), critic), to_teacher, to_critic


def x0(x_t, kappa, shift=0.0, factor=1.0):
    """The guided prediction of either network at (0.8, 0.6)."""
    c, u = (
        p["mean"] + shift + 0.8 * p["var"] * factor / (0.64 * p["var"] * factor + 0.36) * (x_t - 0.8 * (p["mean"] + shift))
        for p in (PROMPT.tensors, NULL.tensors)
    )
    return u + kappa * (c - u)


# kappa1..4 as configured, and the scale that the teacher, whose config says 3, is then asked with
KAPPAS = {
    "teacher alone": ((1.0, 1.0, 1.0, None), 3.0),
    "long and short": ((1.5, 1.5, 1.5, 1.5), 1.5),
    "all different": ((1.1, 1.5, 2.0, 4.0), 4.0),
    "zero-cfg": ((0.0, 0.0, 0.0, 1.0), 1.0),
    "anti-cfg": ((-0.5, -0.5, -0.5, 1.0), 1.0),
}
guidance = pytest.mark.parametrize("kappas, scale", KAPPAS.values(), ids=list(KAPPAS))


def lsg(kappas, **options):
    """A SiD whose normaliser is a constant: at its floor."""
    return SiD(steps=1, floor=1e6, **{f"kappa{i + 1}": kappa for i, kappa in enumerate(kappas)}, **options)


@guidance
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow", "sample"])
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_each_kappa_guides_what_it_is_said_to(kappas, scale, alpha, target):
    nets, to_teacher, to_critic = guided_game(target)
    rng = Quadrature(2)
    batch = Batch(PROMPT.expand(len(rng)), (len(rng), 1))
    found = lsg(kappas, alpha=alpha).student_loss(nets, batch, rng).terms["sid"] * 1e6
    x = -0.2 + 0.7 * rng.nodes[:, :1]
    x_t = 0.8 * x + 0.6 * rng.nodes[:, 1:]
    short, long = (x0(x_t, kappa, -0.5, 0.49) for kappa in kappas[1:3])
    delta = x0(x_t, scale) - short
    torch.testing.assert_close(found, (delta * ((1 - alpha) * delta + long - x))[:, 0], rtol=1e-9, atol=1e-12)
    # One call of each network, twice as large only where two predictions are combined.
    assert [len(v) for v in to_teacher.inputs] == [len(rng) * (1 + (scale != 1))]
    assert [len(v) for v in to_critic.inputs] == [len(rng) * (1 + (kappas[1:3] not in [(0, 0), (1, 1)]))]
    assert to_teacher.with_graph == to_critic.with_graph == [True]


def test_kappas_with_a_teacher_that_is_fed_its_scale_are_refused(tmp_path):
    teacher = load_teacher(str(save(MAKERS["flux"][0](), tmp_path)), size=MAKERS["flux"][1])
    kappas = [{"name": "sid", "kappa2": 1.5}, {"name": "sid", "kappa4": 1.5}, {"name": "vsd", "kappa": [0.5, 4.0]}]
    for objective in ({"name": "sid"}, {"name": "vsd"}, *kappas):
        config = parse({"teacher": {"path": teacher.path}, "objective": objective, "data": {"prompts": "zoo:sprites"}})
        with pytest.raises(ValueError, match="this teacher is fed its scale; leave") if objective in kappas else nullcontext():
            study_of(config, teacher)


@guidance
@pytest.mark.parametrize("target, a, b", [("epsilon", 0, 1), ("sample", 1, 0), ("v_prediction", -0.6, 0.8), ("flow", -1, 1)])
def test_the_critic_is_trained_as_guided_by_kappa_one(kappas, scale, target, a, b):
    """By the square in what networks of its kind say, a x0 + b eps."""
    nets, to_teacher, _ = guided_game(target)
    rng = Quadrature(2)
    batch = Batch(PROMPT.expand(len(rng)), (len(rng), 1))
    found = lsg(kappas, dropout=0.0).critic_loss(nets, batch, rng).terms["denoise"]
    x = -0.2 + 0.7 * rng.nodes[:, :1]
    x_t = 0.8 * x + 0.6 * rng.nodes[:, 1:]
    clean = x0(x_t, kappas[0], -0.5, 0.49)
    off = a * (clean - x) + b * ((x_t - 0.8 * clean) / 0.6 - rng.nodes[:, 1:])
    torch.testing.assert_close(found, off.square()[:, 0], rtol=1e-9, atol=1e-12)
    assert to_teacher.inputs == []


def test_a_guided_critic_also_learns_without_prompts():
    """Its null branch is trained by the share of prompts that are left out; an unguided one needs none."""
    batch = Batch(PROMPT.expand(4000), (4000, 1))
    for kappas, share in [((1, 1, 1, 3), 0), ((1, 1.5, 1.5, 1.5), 0.1), ((1.5, 1.5, 1.5, 1.5), 0.1)]:
        nets, _, to_critic = guided_game()
        lsg(kappas).critic_loss(nets, batch, stream(0, 0, 0, 0))
        prompts = to_critic.means[0][:4000, 0]
        assert set(prompts.tolist()) <= {0.3, -0.5}
        assert (prompts == -0.5).double().mean().item() == pytest.approx(share, abs=0.02 if share else 0)
        assert (to_critic.means[0][4000:] == -0.5).all()


@dataclass
class Hearing:
    """A judge that keeps the conditions' means, and finds all alike."""

    critic: Denoiser
    means: list = field(default_factory=list)

    def logits(self, x_t, t, cond):
        self.means.append(cond.tensors["mean"])
        return 0 * x_t

    def both(self, x_t, t, cond, graph=True):
        return self.critic(x_t, t, cond), self.logits(x_t, t, cond)


@guidance
def test_heads_judge_each_sample_under_its_own_prompt(kappas, scale):
    """Whatever a guided critic is asked in the same turn: without a prompt, in pairs, with prompts left out."""
    nets, _, _ = guided_game()
    batch = Batch(PROMPT.expand(50), (50, 1), torch.zeros(50, 1, dtype=torch.float64))
    judge = Hearing(nets.critic)
    for i, turn in enumerate(Adversarial(inner=lsg(kappas, dropout=0.5)).round(0)[-2:]):
        losses = turn.loss(replace(nets, judge=judge), batch, stream(0, 0, 0, i))
        assert all(term.shape == (50,) for term in losses.terms.values())
    assert sum(len(means) for means in judge.means) == 3 * 50
    assert all((means == 0.3).all() for means in judge.means)
