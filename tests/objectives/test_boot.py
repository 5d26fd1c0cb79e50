from dataclasses import replace

import pytest
import torch
from tiny import save, tiny_sd_pipeline
from toys import EPS_V_FLOW, NOTHING, SCHEDULES, TEACHERS, Counted, Gaussian, Linear, denoiser, game, gaussian, guided, phi, times

from fewstep import api
from fewstep.config import parse
from fewstep.families import FAMILIES
from fewstep.objectives import Batch
from fewstep.objectives.boot import Boot, decay, told
from fewstep.sampling import sample
from fewstep.schedules import like
from fewstep.stream import stream

MEAN, VAR = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.25, 2.0]).double()
EXACT = [(name, target) for name, target in TEACHERS if name != "edm"]  # whose noise end is scaled, and deployed by nobody
teachers = pytest.mark.parametrize("name, target", EXACT)
N = 256


class Signal(torch.nn.Module):
    """y_t of the exact trajectory from pure noise, told at 1 - t / 2."""

    def __init__(self, schedule, mean=MEAN):
        super().__init__()
        self.schedule, self.mean = schedule, mean

    def forward(self, e, label, alpha, sigma, cond):
        t = (2 * (1 - label)).clamp(0, 1 - 1e-9)
        a, s = (like(c, e) for c in self.schedule.alpha_sigma(t))
        return (phi(e, torch.ones_like(t), t, self.schedule, self.mean, VAR) - s * e) / a


class Draws:
    """A stream whose noise is float64."""

    def __init__(self, rng):
        self.rng = rng

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def normal(self, shape):
        return self.rng.normal(shape, torch.float64)


def loss(student, teacher, cond=NOTHING, **options):
    return Boot(**options).student_loss(game(student, teacher), Batch(cond, (N, 2)), Draws(stream(0, 0, 0, 0)))


def exact(name, target):
    return gaussian(MEAN.tolist(), VAR.tolist(), SCHEDULES[name], target)


@teachers
def test_the_exact_signal_solves_the_ode(name, target):
    """dy/dt = l' (y - x0_T) with l = ln(sigma / alpha), along the teacher's trajectory from e (consistency.md 8 a)."""
    schedule, e = SCHEDULES[name], torch.randn(N, 2, dtype=torch.float64)
    t = (0.05 + 0.9 * (torch.arange(N).double() + 0.5) / N).requires_grad_()  # never a table's own time, where its slope jumps
    alpha, sigma = schedule.alpha_sigma(t)
    y = Signal(schedule)(e, 1 - t / 2, alpha, sigma, {})
    x0 = exact(name, target)(schedule.add_noise(y, e, t), t, NOTHING).x0
    speed = torch.stack([torch.autograd.grad(part.sum(), t, retain_graph=True)[0] for part in y.unbind(1)], 1)
    (rate,) = torch.autograd.grad((sigma / alpha).log().sum(), t)
    torch.testing.assert_close(speed, like(rate, y) * (y - x0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name, target", EPS_V_FLOW)
def test_guidance_moves_the_signal_by_the_distance_of_the_means(name, target):
    teacher, cond, mean = guided(name, target, MEAN, VAR)

    def wrong(centre):
        student = denoiser(Signal(SCHEDULES[name], centre), SCHEDULES[name], target)
        return loss(student, teacher, cond.expand(N), delta=0.01).terms["bootstrap"].median()

    assert wrong(mean) < 0.02 * wrong(MEAN)


@teachers
def test_the_exact_signal_takes_every_step_but_for_its_square(name, target):
    """Freezing x0 over a step of delta is wrong by O(delta^2), relative to the step O(delta), and the loss is its square."""
    student = denoiser(Signal(SCHEDULES[name]), SCHEDULES[name], target)
    large, small = (loss(student, exact(name, target), delta=d) for d in (0.02, 0.01))
    wrong = loss(exact(name, target), exact(name, target)).terms["bootstrap"].median()
    assert small.terms["bootstrap"].median() < 0.02 * wrong
    assert large.terms["bootstrap"].median() / small.terms["bootstrap"].median() == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("name, target", [(n, t) for n, t in EXACT if n != "sd"])
def test_the_exact_signal_begins_at_the_teachers_first_guess(name, target):
    """Exactly where the noise end has no signal (consistency.md 8 b)."""
    losses = loss(denoiser(Signal(SCHEDULES[name]), SCHEDULES[name], target), exact(name, target))
    assert losses.terms["boundary"].max() < 1e-8


@teachers
def test_where_the_teacher_agrees_nothing_moves(name, target):
    """One picture only: x0 = y everywhere."""
    law = denoiser(Gaussian([0.3, -0.2], [1e-30, 1e-30]), SCHEDULES[name], target)
    losses = loss(law, law)
    assert losses.terms["bootstrap"].max() < 1e-9 and losses.terms["boundary"].max() < 1e-9


@teachers
def test_a_frozen_guess_carries_the_signal_as_ddim_does(name, target):
    """x_s = alpha_s x0 + sigma_s eps says the same of y_s (consistency.md 8)."""
    schedule, t, s = SCHEDULES[name], times(0.9, 0.5, 0.2), times(0.7, 0.3, 0.0)
    e, x0, y_t = torch.randn(3, 3, 2, dtype=torch.float64)
    x_t = schedule.add_noise(y_t, e, t)
    (a, sigma), (a_s, sigma_s) = ((like(c, e) for c in schedule.alpha_sigma(u)) for u in (t, s))
    y_s = (a_s * x0 + sigma_s * (x_t - a * x0) / sigma - sigma_s * e) / a_s
    k = like(decay(schedule, t, s), e)
    torch.testing.assert_close((1 - k) * x0 + k * y_t, y_s)


def test_the_picture_is_told_where_one_deployed_step_asks():
    heard = Counted()
    student = denoiser(Linear(0.3, 0.8), SCHEDULES["sd"], "epsilon", heard)
    nets, e = game(student, exact("sd", "epsilon")), torch.randn(4, 2, dtype=torch.float64)
    deployed = sample(student, e, (1.0,), NOTHING, rng=stream(0, 0, 0, 0))
    assert torch.equal(told(nets, e, torch.zeros(4).double(), NOTHING), deployed)
    told(nets, e, torch.ones(4).double(), NOTHING)
    assert heard.times[0].unique().tolist() == heard.times[1].unique().tolist() == [999.0]
    assert heard.times[2].unique().tolist() == [499.0]


class Raising:
    """A batch that has conditions and nothing else."""

    cond, shape = NOTHING, (8, 2)

    def __getattr__(self, name):
        raise AssertionError(f"the data set was asked for its {name}")


def test_prompts_are_enough():
    needs = Boot().needs
    assert not (needs.images or needs.pairs or needs.roles)
    student = denoiser(Linear(0.3, 0.8), SCHEDULES["flow"], "flow")
    for turn in Boot().round(0):
        turn.loss(game(student, exact("flow", "flow")), Raising(), Draws(stream(0, 0, 0, 0))).total.backward()


def test_a_run_reads_no_picture_and_encodes_none(tmp_path, monkeypatch):
    """consistency.md 11, point 12: prompts, and nothing else, from a config to a trained student."""

    def raising(*given, **named):
        raise AssertionError("a picture was asked for")

    path, prompts = save(tiny_sd_pipeline(), tmp_path / "sd"), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    monkeypatch.setattr("fewstep.data.source.read_images", raising)
    name = "StableDiffusionPipeline"
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], encode_pixels=raising))
    monkeypatch.setattr(api.Study, "preview", lambda *_: None)
    tree = {"teacher": {"path": str(path)}, "student": {"weights": "lora", "rank": 2}, "objective": {"name": "boot"}}
    train = {"rounds": 1, "batch": 2, "lr": 1e-3, "ema": 0.0, "device": "cpu"}
    run = api.train(parse({**tree, "data": {"prompts": str(prompts)}, "train": train}), tmp_path / "run")
    assert any(value.abs().max() > 0 for key, value in run.weights.items() if "lora_B" in key)


@teachers
def test_only_the_step_behind_and_the_beginning_have_a_graph(name, target):
    heard = Counted()
    student = denoiser(Linear(0.3, 0.8), SCHEDULES[name], target, heard)
    teacher = exact(name, target)
    losses = loss(student, teacher)
    losses.total.backward()
    assert heard.with_graph == [False, True, True]
    assert all(p.grad is None for p in teacher.net.parameters())
    assert all(term.isfinite().all() for term in losses.terms.values())


def test_a_step_is_a_part_of_the_range():
    with pytest.raises(ValueError, match="between 0 and 1"):
        Boot(delta=0.0)
