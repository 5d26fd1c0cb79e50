"""Families that renorm what guidance makes: whoever is guided like the teacher is renormed like it, too."""

import pytest
import torch
from toys import Gaussian, denoiser, game, law, stable_diffusion

from fewstep.denoiser import Guided
from fewstep.objectives import Batch
from fewstep.objectives.decoupled import augmentation
from fewstep.objectives.sid import SiD
from fewstep.objectives.vsd import VSD
from fewstep.schedules import RectifiedFlow
from fewstep.stream import stream

WORLDS = [(RectifiedFlow(), "flow"), (stable_diffusion(), "v_prediction"), (stable_diffusion(), "epsilon")]
BATCH = Batch(law(2.0, 0.5), (1, 5))


def renormed(conditional, guided):
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def world(schedule, target):
    """A student, a teacher that is renormed, and a critic that is the teacher's own network."""
    told = denoiser(Gaussian([9.0], [9.0]), schedule, target)
    student = denoiser(Gaussian([9.0], [9.0]), schedule, target)
    return game(student, Guided(told, 4.0, law(-1.0, 1.5), renormed), told)


@pytest.mark.parametrize(("schedule", "target"), WORLDS)
def test_a_critic_that_is_the_teacher_and_guided_like_it_leaves_no_difference(schedule, target):
    """SiD-LSG with kappa1-4 alike, and VSD for every kappa: the same network under the same guidance has the same opinion."""
    nets = world(schedule, target)
    sid = SiD(kappa1=4.0, kappa2=4.0, kappa3=4.0).student_loss(nets, BATCH, stream(0, 0, 0, 0))
    vsd = VSD(kappa=(2.0, 5.0)).student_loss(nets, BATCH, stream(0, 0, 0, 0))
    assert float(sid.stats["delta"]) == float(vsd.stats["direction"]) == 0


@pytest.mark.parametrize(("schedule", "target"), WORLDS)
@pytest.mark.parametrize("kappas", [(4.0, 2.0), (0.0, 3.0), (1.0, 0.0)])
def test_two_kappas_from_one_call_are_two_guided_critics(schedule, target, kappas):
    nets = world(schedule, target)
    x_t, t = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6]).double()
    found = SiD(kappa2=kappas[0], kappa3=kappas[1])._fakes(nets, x_t, t, BATCH.cond)
    for x0, kappa in zip(found, kappas, strict=True):
        alone = Guided(nets.critic, kappa, nets.teacher.null, renormed)(x_t, t, BATCH.cond)
        assert torch.allclose(x0, alone.x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("schedule", "target"), WORLDS)
def test_augmentation_is_what_guidance_and_renorm_add(schedule, target):
    teacher = world(schedule, target).teacher
    x_t, t = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6]).double()
    plain, x = teacher.denoiser(x_t, t, BATCH.cond).x0, torch.zeros_like(x_t)
    expected = (plain - teacher(x_t, t, BATCH.cond).x0) / plain.abs().mean()
    assert torch.allclose(augmentation(teacher, BATCH, x, x_t, t, 1e-4), expected, rtol=1e-10)
