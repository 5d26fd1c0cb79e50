"""Pairs of noise and a sample that lies straight above it, and the student that knows their lines: for methods about reflow."""

import pytest
import torch
from toys import NOTHING, TEACHERS

from fewstep.objectives import Batch

MEAN, STD = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.5, 1.4]).double()
teachers = pytest.mark.parametrize("name, target", TEACHERS)
N = 256


class Straight(torch.nn.Module):
    """What is left to learn of pairs (e, mean + std e): x0 from any point of their line, and from the pure noise at 1."""

    def forward(self, x, t, alpha, sigma, cond):
        e = (x - alpha * MEAN) / (alpha * STD + sigma)
        return MEAN + STD * torch.where(t[:, None] > 1 - 1e-9, x / sigma.clamp(min=1), e)


def pairs():
    noise = torch.randn(N, 2, dtype=torch.float64)
    return Batch(NOTHING, (N, 2), MEAN + STD * noise, noise)
