"""`fewstep plan`: what a config will do, from the teacher's configs alone; no weight is read."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.config import Config
from fewstep.study import Study, study_of
from fewstep.weightless import bare, weightless, weightless_teacher

# sigma / alpha at timesteps 399 and 699 of zoo:sprites-sd, where students of one step, and of more, were nearest to it
NEAR, FAR = 1.16, 3.32
MUCH = 5.0  # from here on it is worth saying


def plan(config: Config) -> dict[str, Any]:
    """Deploy grid, roles, parameters and disk of a run. Raises ValueError for what could not work.

    Of a run of stages: what its last one is, the disk of all, and each of them under `stages`."""
    if config.stages:
        return _of_stages(config)
    wish = config.teacher
    teacher = weightless_teacher(wish.path, weightless(), size=wish.size, guidance=wish.guidance)
    base = sum(p.numel() for p in teacher.net.parameters())
    bare(teacher.net)
    study = study_of(config, teacher)
    family, sampler = teacher.family, study.sampler
    grids = {}
    for n in study.steps():
        times = teacher.schedule.model_time(torch.tensor(study.deployed.grid(n, sampler), dtype=torch.float64))
        grids[str(n)] = [round(x, 3) for x in times.tolist()]
    frozen = ("teacher", "average", "tutor", "pixels")
    trained = {k: sum(p.numel() for p in role.parameters()) for k, role in study.roles.items() if k not in frozen}
    averages = 4 * trained["student"] * (1 + ("average" in study.roles))
    disk = sum(12 * n for n in trained.values()) + averages
    return {
        "teacher": f"{wish.path} ({type(teacher.pipe).__name__}, {base / 1e6:.2f} M parameters)",
        "sampler": f"{sampler} ({family.samplers[sampler][0]})",
        "grid (network times)": grids,
        "sizes": [list(size) for size in teacher.sizes(config.data.aspect)],
        "trained parameters": trained,
        "disk, a checkpoint (MiB)": round(disk / 2**20, 1),
        **_advice(study),
        "settings": config.model_dump(mode="json"),
    }


def _advice(study: Study) -> dict[str, str]:
    """What a student pays for predicting noise from pure noise, and where it would pay less."""
    student, objective, schedule = study.config.student, study.config.objective, study.teacher.schedule
    if study.teacher.target != "epsilon" or not objective.walks or student.conditioning_timestep is not None:
        return {}
    alpha, sigma = schedule.alpha_sigma(torch.tensor(study.grid[:1], dtype=torch.float64))
    ratio = float(sigma / alpha)
    if ratio < MUCH:
        return {}
    level = torch.tensor([NEAR if objective.steps == 1 else FAR], dtype=torch.float64)
    first = round(float(schedule.model_time(schedule.t_of_ratio(level))))
    return {
        "advice": f"at its first step an error of the predicted noise is {ratio:.1f} times as large in the picture; with "
        f"student.conditioning_timestep: {first} it is {float(level):.1f} times, and the student mostly ends nearer its teacher"
    }


def _of_stages(config: Config) -> dict[str, Any]:
    each = [plan(stage) for stage in config.stages]
    disk = "disk, a checkpoint (MiB)"
    own = ("sampler", "grid (network times)", "trained parameters", disk)
    return each[-1] | {
        disk: round(sum(found[disk] for found in each), 1),
        "stages": {f"stage-{i}": {key: found[key] for key in own} for i, found in enumerate(each, 1)},
        "settings": config.model_dump(mode="json"),
    }
