"""How the student of a config will be deployed on its teacher: the sampler and the times of its steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fewstep.adapters import Teacher, load_teacher
from fewstep.config import Config
from fewstep.objectives.samplers import deployed_sampler
from fewstep.plain import name_of

Grid = tuple[float, ...]


@dataclass(frozen=True)
class Walk:
    """sampler: a key of STEPS. grid: the times of the steps, falling. finer: those of as many steps as the objective asks its
    teacher in, a multiple, by their number; see `nested`."""

    sampler: str
    grid: Grid
    finer: dict[int, Grid]


def teacher_of(config: Config, device: str = "cpu") -> Teacher:
    """The teacher of a config, loaded afresh: no network that has been trained on."""
    return load_teacher(config.teacher.path, device, size=config.teacher.size, guidance=config.teacher.guidance)


def guidance_of(teacher: Teacher, config: Config) -> float:
    """The scale that a config has its teacher guided at."""
    return teacher.guidance if config.teacher.guidance is None or teacher.family.embedded else config.teacher.guidance


def as_deployed(teacher: Teacher, config: Config) -> Teacher:
    """The teacher's pipeline as the student is deployed in it."""
    return replace(teacher, first=config.student.conditioning_timestep)


def walk_of(teacher: Teacher, config: Config) -> Walk:
    """The student's. Raises ValueError where no stock pipeline would step so."""
    objective, place = config.objective, as_deployed(teacher, config)
    sampler = deployed_sampler(name_of(objective), objective, teacher.family.samplers)
    grid, n = place.deployed_grid(objective.steps, sampler), objective.asks
    return Walk(sampler, grid, {n: nested(place.grid(n, sampler), grid)} if n else {})


def nested(times: Grid, grid: Grid) -> Grid:
    """Falling times, a multiple of a grid's, with these among them: as they are, but for teachers whose shift depends on the
    number of steps (FLUX.2), where those of each deployed step are stretched onto it."""
    share = len(times) // len(grid)
    old, new = ([0.0, *reversed(ends)] for ends in (times[::share], grid))
    return times if old == new else tuple(np.interp(times, old, new).tolist())
