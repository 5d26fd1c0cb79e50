"""A Gaussian world in the plane, and the student at which the losses of discrete consistency vanish in it."""

import pytest
import torch
from torch import nn
from toys import NOTHING, SCHEDULES, TEACHERS, ddim_factor, gaussian

from fewstep.objectives import Batch

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


def batch(cond=NOTHING):
    return Batch(cond, (N, 2), MEAN + VAR.sqrt() * torch.randn(N, 2, dtype=torch.float64))


def exact(name, target):
    return gaussian(MEAN.tolist(), VAR.tolist(), SCHEDULES[name], target)
