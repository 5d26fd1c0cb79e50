"""bfloat16 networks under float32 mathematics, against float64 throughout (distribution_matching.md, T26)."""

from dataclasses import dataclass

import pytest
import torch
from toys import NOTHING, SCHEDULES, Exact, Gaussian, denoiser, endpoint, game, times

from fewstep.denoiser import Denoiser
from fewstep.objectives import Batch
from fewstep.objectives.dmd import DMD
from fewstep.objectives.sid import SiD
from fewstep.stream import Stream, stream

TEACHERS = [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")]
INDICES = [20, 500, 980]
BOUND = 0.02  # T26, for the gradient of each sample and for the student's
# Where two networks say nearly the same: epsilons differ by alpha / sigma times what their x0 do, velocities by 1 / sigma times
# what shrinks like sigma^2. One part in 512 of what they say is then more of the difference.
WIDER = {("epsilon", 980): (0.05, 0.02), ("flow", 20): (0.07, 0.03)}


@dataclass(frozen=True)
class As:
    """A stream whose noise is given in another dtype."""

    rng: Stream
    dtype: torch.dtype

    @property
    def shared(self):
        return self.rng.shared

    def uniform(self, n):
        return self.rng.uniform(n)

    def normal(self, shape):
        return self.rng.normal(shape).to(self.dtype)

    def normal_like(self, x):
        return self.normal(x.shape)


def rounding(net, x, time, cond):
    """A network in bfloat16, as far as what it is given and what it says go."""
    return net(x.double(), time, cond).bfloat16()


@pytest.mark.parametrize("name, target", TEACHERS)
@pytest.mark.parametrize("kind", [DMD, SiD])
@pytest.mark.parametrize("index", INDICES)
def test_bfloat16_networks_keep_the_gradient(kind, index, name, target):
    schedule = SCHEDULES[name]
    level = schedule.t_of_model_time(times(index)).item()
    objective = kind(steps=1, low=level - 1e-9, high=level)

    def gradients(half):
        """Of the loss in each sample, and in the student's parameters."""
        student = denoiser(Gaussian([-0.5] * 4, [0.5] * 4, endpoint), schedule, target)
        told = {"call": rounding, "dtype": torch.bfloat16} if half else {"call": student.call}
        teacher, critic = (
            Denoiser(Exact(Gaussian([m] * 4, [v] * 4), schedule, target), schedule, target, **told)
            for m, v in ((0.5, 1.0), (-0.5, 0.3))
        )
        rng = As(stream(0, 0, 0, 0), torch.float32 if half else torch.float64)
        losses = objective.student_loss(game(student, teacher, critic), Batch(NOTHING, (4096, 4)), rng)
        clean = student.net.clean
        each, mean, log_std = torch.autograd.grad(losses.total, [losses.sample, clean.mean, clean.log_std])
        return each.double(), torch.cat([mean, log_std])

    for half, full, bound in zip(gradients(True), gradients(False), WIDER.get((target, index), (BOUND, BOUND)), strict=True):
        assert (half - full).norm() < bound * full.norm()


@pytest.mark.parametrize("name, target, factor", [("sd", "epsilon", 14.61), ("sd", "v_prediction", 0.998), ("flow", "flow", 1.0)])
def test_at_the_noise_end_only_an_epsilon_networks_rounding_is_magnified(name, target, factor):
    """By sigma / alpha (1 / alpha is 14.65), to which mathematics in float32 adds nothing."""
    schedule, t = SCHEDULES[name], times(*[1.0] * 64)
    alpha, _ = schedule.alpha_sigma(t)
    assert name == "flow" or 1 / alpha[0].item() == pytest.approx(14.65, abs=0.01)
    exact = denoiser(Gaussian([0.3] * 4, [0.5] * 4), schedule, target)
    half = Denoiser(exact.net, schedule, target, rounding)
    x_t = stream(0, 0, 0, 0).normal((64, 4))
    out = exact.net(x_t.double(), schedule.model_time(t), NOTHING)
    off = half(x_t, t, NOTHING).x0.double() - exact(x_t.double(), t, NOTHING).x0
    torch.testing.assert_close(off.abs(), factor * (out.bfloat16().double() - out).abs(), rtol=5e-3, atol=1e-4)
