"""Exact teachers of one law, and students that jump from anywhere to anywhere exactly: for methods about mean velocities."""

import pytest
import torch
from toys import SCHEDULES, TEACHERS, Jump, call, gaussian

from fewstep.denoiser import Denoiser

MEAN, VAR = torch.tensor([0.4, -1.0]).double(), torch.tensor([0.25, 2.0]).double()
teachers = pytest.mark.parametrize("name, target", TEACHERS)
N = 64


def exact(name, target):
    return gaussian(MEAN.tolist(), VAR.tolist(), SCHEDULES[name], target)


def jumper(name, target, mean=MEAN, var=VAR, grid=()):
    return Denoiser(Jump(mean, var, SCHEDULES[name], target), SCHEDULES[name], target, call, grid=grid)


def clean(n=N):
    return MEAN + VAR.sqrt() * torch.randn(n, 2, dtype=torch.float64)
