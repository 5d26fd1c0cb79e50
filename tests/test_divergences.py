import math

import pytest
import torch
from torch import Tensor

from fewstep.divergences import DIVERGENCES, divergence, relative

every = pytest.mark.parametrize("name", DIVERGENCES)

# f-distill's table of h at r = 0.1, 1, 10.
TABLE = {
    "rkl": (1, 1, 1),
    "kl": (0.1, 1, 10),
    "js": (0.1 / 1.1, 0.5, 10 / 11),
    "softened": (1 / 1.1, 0.5, 1 / 11),
    "squared_hellinger": (0.1**0.5, 1, 10**0.5),
    "neyman": (10, 1, 0.1),
    "jeffreys": (1.1, 2, 11),
}

# The convex functions themselves, of r = teacher / student.
F = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "squared_hellinger": lambda r: 2 * (1 - r.sqrt()) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


def logs():
    return torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)


def derivative(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


@every
def test_the_weights_are_those_of_the_table(name):
    """T19."""
    found = DIVERGENCES[name].weight(torch.tensor([0.1, 1, 10], dtype=torch.float64).log())
    assert found.tolist() == pytest.approx(TABLE[name], rel=1e-12)


@every
def test_the_weight_is_the_curvature_of_a_convex_function_that_is_zero_at_one(name):
    r = logs().detach().exp().requires_grad_()
    f = F[name](r)
    assert F[name](torch.ones(1, dtype=torch.float64)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(DIVERGENCES[name].weight(r.log()), r**2 * derivative(derivative(f, r), r), rtol=1e-9, atol=1e-12)


@every
def test_the_slope_is_that_of_uni_instructs_phi(name):
    """phi(rho) = rho h(1 / rho), differentiated in rho."""
    rho = logs().detach().exp().requires_grad_()
    phi = rho * DIVERGENCES[name].weight(-rho.log())
    torch.testing.assert_close(DIVERGENCES[name].slope(-rho.log()), derivative(phi, rho), rtol=1e-9, atol=1e-12)


@every
def test_both_functions_can_be_differentiated_in_the_logit(name):
    l = logs()
    total = DIVERGENCES[name].weight(l).sum() + DIVERGENCES[name].slope(l).sum()
    if total.requires_grad:  # those of rkl are constants
        assert torch.autograd.grad(total, l)[0].isfinite().all()


def test_an_unknown_divergence_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no divergence 'hellinger'; there are: rkl, kl, .*jeffreys"):
        divergence("hellinger")


def test_the_ratio_averages_one_in_each_group():
    torch.manual_seed(0)
    logit, group = torch.randn(64, requires_grad=True), torch.randint(5, (64,)) * 3
    ratio = relative(logit, group, int(group.max()) + 1, Tensor.detach).exp()
    assert not ratio.requires_grad
    for g in group.unique():
        assert ratio[group == g].mean() == pytest.approx(1, abs=1e-5)
    # Within a group ratios keep their proportions.
    a, b = (group == 0).nonzero()[:2, 0]
    assert (ratio[a] / ratio[b]).item() == pytest.approx(math.exp((logit[a] - logit[b]).item()), rel=1e-4)


def test_a_discriminator_that_is_sure_does_not_decide_alone():
    logit = torch.tensor([-50.0, 50.0, 0.0])
    assert relative(logit, torch.arange(3), 3, Tensor.detach).tolist() == pytest.approx([0, 0, 0])
    ratio = relative(logit, torch.zeros(3, dtype=torch.long), 1, Tensor.detach).exp()
    assert (ratio / ratio[2]).tolist() == pytest.approx([0.1, 20, 1], rel=1e-5)
