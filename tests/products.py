"""A Gaussian world in the plane, and the students at which the losses of discrete maps (consistency, shortcuts) vanish in it."""

import pytest
import torch
from torch import nn
from toys import NOTHING, SCHEDULES, TEACHERS, Exact, ddim_factor, gaussian, heard

from fewstep.objectives import Batch
from fewstep.schedules import like

MEAN, VAR = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.25, 2.0]).double()
teachers = pytest.mark.parametrize("name, target", TEACHERS)
N = 256


class Optimum(nn.Module):
    """The student that lands where the Gaussian teacher's DDIM steps, down to the segment's edge, land: a product of factors."""

    def __init__(self, objective, schedule, grid, mean=MEAN):
        super().__init__()
        self.schedule, self.mean = schedule, mean
        self.times, self.edges = objective.times(grid)
        self.factors = torch.ones(len(self.times), 2, dtype=torch.float64)
        for i in range(1, len(self.times)):
            step = ddim_factor(schedule, self.times[i], self.times[i - 1], VAR)
            fresh = self.edges[i] != self.edges[i - 1] or i == 1
            self.factors[i] = step if fresh else step * self.factors[i - 1]

    def forward(self, x, t, alpha, sigma, cond):
        i = (t[:, None] - self.times).abs().argmin(1)
        a, s = (c[:, None] for c in self.schedule.alpha_sigma(self.edges[i]))
        landed = a * self.mean + self.factors[i] * (x - alpha * self.mean)
        return (s * x - sigma * landed) / (alpha * s - sigma * a)  # the x0 whose DDIM jump to the edge lands there


class Told(nn.Module):
    """The network that jumps from any time to any lower one as the Gaussian teacher's steps between them do.

    factor: (schedule, t, s, variances) -> what a step multiplies the distance to alpha mean by."""

    def __init__(self, schedule, target, times, mean=MEAN, factor=ddim_factor):
        super().__init__()
        self.factor = factor
        self.schedule, self.target, self.times, self.mean, self.ends = schedule, target, times, mean, []

    def forward(self, x, time, cond, end_time):
        t = heard(self.schedule, time)
        i, j = ((u.double()[:, None] - self.times).abs().argmin(1) for u in (t, end_time))
        self.ends.append((i, j))
        steps = [torch.ones(2).double()] + [
            self.factor(self.schedule, self.times[k], self.times[k - 1], VAR) for k in range(1, len(self.times))
        ]
        factor = torch.stack([torch.stack(steps[b + 1 : a + 1]).prod(0) for a, b in zip(i.tolist(), j.tolist(), strict=True)])
        (a, s), (a_r, s_r) = (self.schedule.alpha_sigma(self.times[k]) for k in (i, j))
        landed = like(a_r, x) * self.mean + factor * (x - like(a, x) * self.mean)
        x0 = (like(s_r, x) * x - like(s, x) * landed) / like(a * s_r - s * a_r, x)
        network = Exact(lambda *_: x0, self.schedule, self.target)
        return network(x, time, cond)


def batch(cond=NOTHING):
    return Batch(cond, (N, 2), MEAN + VAR.sqrt() * torch.randn(N, 2, dtype=torch.float64))


def exact(name, target):
    return gaussian(MEAN.tolist(), VAR.tolist(), SCHEDULES[name], target)
