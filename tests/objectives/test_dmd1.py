import pytest
import torch
from toys import (
    NOTHING,
    SCHEDULES,
    Gaussian,
    Linear,
    OneLevel,
    Quadrature,
    denoiser,
    endpoint,
    expected_gradient,
    game,
    gaussian,
    reverse_kl,
)

from fewstep.config import parse
from fewstep.objectives import Batch
from fewstep.objectives.dmd1 import DMD1
from fewstep.sampling import uniform_grid
from fewstep.stream import stream

TARGETS = ["epsilon", "v_prediction", "flow"]


def nets_of(m, r, target, mu=0.3, s=1.0):
    level = OneLevel(0.8, 0.6)
    return game(denoiser(Linear(m, r), level, target), *(gaussian([x], [y**2], level, target) for x, y in ((mu, s), (m, r))))


def paired(rng, mean=0.3, std=1.0):
    """Fresh noise for the pairs, the map from it being the teacher's, mean + std z."""
    z = rng.nodes[:, :1]
    return Batch(NOTHING, (len(rng), 1), mean + std * z, z)


@pytest.mark.parametrize("target", TARGETS)
def test_the_pairs_are_regressed_in_the_mean_square(target):
    """E (m + r z - mu - s z)^2 has the slopes 2 (m - mu) and 2 (r - s), times the weight."""
    objective, rng = DMD1(regression=0.7), Quadrature(2)
    found = expected_gradient(objective, nets_of(-0.2, 0.7, target), rng, paired(rng), "regression")
    assert found == pytest.approx([0.7 * 2 * (-0.2 - 0.3), 0.7 * 2 * (0.7 - 1.0)], rel=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_the_other_term_is_dmds(target):
    objective, rng = DMD1(floor=1e6), Quadrature(2)
    found = [1e6 * g for g in expected_gradient(objective, nets_of(-0.2, 0.7, target), rng, paired(rng))]
    assert found == pytest.approx(reverse_kl(0.8, 0.6, 0.3, 1.0, -0.2, 0.7), rel=1e-9)


@pytest.mark.parametrize("name, target", [("sd", "epsilon"), ("sd", "v_prediction"), ("flow", "flow")])
def test_the_teachers_own_map_is_at_rest(name, target):
    """The probability flow's end is where both terms vanish: pairs and laws agree, whatever step is simulated."""
    law, schedule = ([0.3, -1.0], [0.5, 2.0]), SCHEDULES[name]
    student = denoiser(Gaussian(*law, endpoint), schedule, target)
    nets = game(student, gaussian(*law, schedule, target), gaussian(*law, schedule, target), grid=uniform_grid(3))
    noise = stream(0, 0, 0, "pairs").normal((8, 2), torch.float64)
    with torch.no_grad():
        ends = student(noise, torch.ones(8).double(), NOTHING).x0
    for seed in range(6):
        losses = DMD1(steps=3).student_loss(nets, Batch(NOTHING, (8, 2), ends, noise), stream(seed, 0, 0, 0))
        losses.total.backward()
        assert losses.terms["regression"].max() < 1e-12
    assert all(p.grad.abs().max() < 1e-9 for p in student.net.parameters())


def test_it_wants_pairs_and_says_so():
    tree = {"teacher": {"path": "zoo:sprites-sd"}, "objective": {"name": "dmd1"}, "data": {"prompts": "zoo:sprites"}}
    with pytest.raises(ValueError, match="objective dmd1 needs pairs of noise and the teacher's sample from it: add data.pairs"):
        parse(tree)
    parse(tree | {"data": {"prompts": "zoo:sprites", "pairs": 8}})
