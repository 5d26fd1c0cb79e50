"""Times and scales of methods that follow a teacher's steps: where these lie, and how they fit the student's."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.objectives.base import Nets
from fewstep.objectives.ranges import at_least
from fewstep.stream import Stream


def check_grid(steps: int, segments: int, solver_steps: int) -> None:
    """Raises ValueError for counts that do not fit into each other."""
    at_least(1, steps=steps, segments=segments, solver_steps=solver_steps)
    if steps % segments:
        raise ValueError(f"segments ({segments}) must divide steps ({steps}), so that segments meet at deployed times")
    if solver_steps % steps:
        raise ValueError(f"solver_steps ({solver_steps}) must be a multiple of steps ({steps})")


def scales(guidance: tuple[float, float] | None, n: int, rng: Stream) -> Tensor | None:
    """A guidance scale for each sample (n,), uniform in a range; None where there is no range."""
    return None if guidance is None else guidance[0] + (guidance[1] - guidance[0]) * rng.uniform(n)


def solver_times(grid: tuple[float, ...], solver_steps: int) -> Tensor:
    """The teacher's times (solver_steps + 1,), rising from 0: each deployed step in equal parts of t."""
    corners = torch.tensor((0.0, *reversed(grid)), dtype=torch.float64)
    inner = torch.arange(solver_steps + 1, dtype=torch.float64) / (solver_steps // len(grid))
    low = inner.floor().clamp(max=len(grid) - 1).long()
    return torch.lerp(corners[low], corners[low + 1], inner - low)


def nested_times(nets: Nets, n: int) -> Tensor:
    """The times (n + 1,), rising from 0, at which a student of n steps is deployed, a multiple of this one's, whose times are
    among them."""
    return torch.tensor((0.0, *reversed(nets.finer(n))), dtype=torch.float64)


def first_of_segment(solver_steps: int, segments: int) -> Tensor:
    """Index (solver_steps + 1,) of the edge below each of the teacher's times; an edge belongs to the segment that ends there."""
    length = solver_steps // segments
    return (torch.arange(solver_steps + 1) - 1).clamp(min=0) // length * length
